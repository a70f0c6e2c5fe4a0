"""benchmarks/replay.py: recorded traces are read as they are, every request is counted, and no run finds what another left."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from aiohttp import web

from kvasir.cluster.router import Router
from kvasir.cluster.simulated_group import Shape

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def module(name: str) -> Any:
    return importlib.import_module(name)


# -- traces


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_mooncake_s_lines(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 2500, "input_length": 1030, "output_length": 0, "hash_ids": [1, 2, 9]},
        {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = module("traces").load(tmp_path / "trace.jsonl", vocab=3000)
    assert (first.at, len(first.prompt), first.output, first.session) == (0.0, 1100, 7, "")
    assert (second.at, len(second.prompt), second.output) == (2.5, 1030, 1)
    assert 1024 <= common(first.prompt, second.prompt) < 1028
    assert max(*first.prompt, *second.prompt) < 3000
    shrunk = module("traces").load(tmp_path / "trace.jsonl", shrink=32)
    assert [len(ask.prompt) for ask in shrunk] == [48, 38]  # 16 of each 512, and all of a shorter rest up to 16
    assert 32 <= common(shrunk[0].prompt, shrunk[1].prompt) < 36
    assert len(module("traces").load(tmp_path / "trace.jsonl", limit=1)) == 1


def test_sessions_of_agents(tmp_path: Path) -> None:
    """Block ids are each session's own; what sub-agents ask belongs to it."""
    inner = {"requests": [{"t": 3.0, "in": 128, "out": 2, "hash_ids": [1, 3]}]}
    told = {"block_size": 64, "requests": [{"t": 0.0, "in": 100, "out": 5, "hash_ids": [1, 2]}, inner, {"t": 1.0}]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    one = module("traces").load(tmp_path / "a.json")
    assert [(ask.at, len(ask.prompt), ask.output, ask.session) for ask in one] == [
        (0.0, 100, 5, "a"),
        (3.0, 128, 2, "a"),
    ]
    assert 64 <= common(one[0].prompt, one[1].prompt) < 68
    both = module("traces").load(tmp_path)
    starts = {ask.session: ask for ask in reversed(both)}
    assert [ask.at for ask in both] == sorted(ask.at for ask in both)
    assert set(starts) == {"a", "b"}
    assert common(starts["a"].prompt, starts["b"].prompt) < 4
    assert both == module("traces").load(tmp_path)


def test_azure_s_table(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,48,10"]
    rows += ["2023-11-16 18:17:04.2299600,0,3", "2023-11-16 18:17:04.4799600,48,0"]
    (tmp_path / "trace.csv").write_text("\n".join(rows))
    asks = module("traces").load(tmp_path / "trace.csv")
    assert [(ask.at, len(ask.prompt), ask.output) for ask in asks] == [(0.0, 48, 10), (0.5, 48, 1)]
    assert common(asks[0].prompt, asks[1].prompt) < 4


@pytest.mark.parametrize("folder", ["traces-mooncake", "traces-azure-llm", "traces-agentic-weka"])
def test_real_traces(data: Callable[[str], Path], tmp_path: Path, folder: str) -> None:
    """The smallest of each kind, where the data are; of lines the first."""
    found = [path for end in ("jsonl", "csv", "json") for path in data(folder).rglob(f"*.{end}")]
    path = min(found, key=lambda path: path.stat().st_size)
    with path.open() as file:
        (tmp_path / path.name).write_text("".join(islice(file, 21)))
    asks = module("traces").load(tmp_path / path.name, limit=20)
    assert asks[0].at >= 0.0
    assert [ask.at for ask in asks] == sorted(ask.at for ask in asks)
    assert all(ask.prompt and ask.output for ask in asks)
    assert all(bool(ask.session) == (folder == "traces-agentic-weka") for ask in asks)


# -- reports


def report(policy: str, offered: float, good: int, *, refused: int = 0, failed: int = 0, answered: int = 10) -> Any:
    replay_report = module("replay_report")
    outcomes = [replay_report.Outcome(0.1 * n, 0.01, 0, [1]) for n in range(answered)]
    return replay_report.Report(policy, 1.0, offered, outcomes, good, 0.5, refused, Counter({"died": failed}))


def test_every_request_is_counted() -> None:
    found = report("server", 4.0, 6, refused=8, failed=2)
    assert (found.total, found.attained) == (20, 0.3)
    cells = dict(
        zip(module("replay_report").COLUMNS, (cell.strip() for cell in found.row().split("|")[1:]), strict=False)
    )
    assert cells["offered, 1/s"] == "4.0"
    assert cells["goodput, 1/s"] == "1.2"
    assert (cells["good"], cells["refused"], cells["failed"]) == ("30.0%", "40.0%", "2")
    assert (cells["good of admitted"], cells["hits over ideal"], cells["TTFT p50, s"]) == ("50.0%", "50.0%", "0.50")
    assert found.row().count("|") == len(module("replay_report").COLUMNS) + 1
    assert "nan" in report("server", 4.0, 0, refused=1, answered=0).row()


def test_the_load_that_is_carried() -> None:
    carried = module("replay_report").carried
    points = [report("cost", 8.0, 5), report("cost", 2.0, 10), report("cost", 4.0, 10)]
    assert carried(points, 0.9) == pytest.approx(4.0 + 4.0 * 0.1 / 0.5)  # on the line from 100 % at 4 to 50 % at 8
    assert carried(points[1:], 0.9) == 4.0  # not beyond what was measured
    assert carried(points[:1], 0.9) == 0.0


def test_a_plot_is_svg_with_a_line_for_each_policy(tmp_path: Path) -> None:
    reports = [report(policy, load, 8) for policy in ("cost", "prefix") for load in (1.0, 2.0)]
    module("replay_report").plot(reports, tmp_path / "plot.svg")
    lines = ElementTree.parse(tmp_path / "plot.svg").findall("{http://www.w3.org/2000/svg}polyline")
    points = [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in lines[-2:]]
    assert points[0] == points[1]
    assert len(points[0]) == 3  # from the origin on
    (x0, y0), (x1, y1), (x2, y2) = points[0]
    assert x0 < x1 < x2
    assert y0 > y1 > y2


# -- simulated groups


def test_a_session_goes_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation tells the router which session each request is of, and so it stays with one group."""
    replay, traces = module("replay"), module("traces")
    placed: list[tuple[str, str]] = []
    place = Router.place

    def noted(self: Router, request: Any, members: Any, now: float, session: str = "", source: Any = None) -> Any:
        route = place(self, request, members, now, session, source)
        placed.append((session, route.member.name))
        return route

    monkeypatch.setattr(Router, "place", noted)
    asks = [traces.Ask(float(n), [n] * 40, 2, f"s{n % 3}") for n in range(30)]
    args = argparse.Namespace(groups=4, gateways=1, prefill=0, max_ttft=0.0, ttft=2.0, itl=25.0)
    found = replay.simulate(asks, "cost", 1.0, Shape(), args)
    assert (found.total, len(placed)) == (30, 30)
    assert len(set(placed)) == 3


# -- a real server


class Server:
    """Answers the n-th request by `script[n]`, the rest as it should be."""

    def __init__(self, *script: str) -> None:
        self.script, self.bodies, self.headers = script, list[Any](), list[Any]()

    async def __aenter__(self) -> Server:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self._models), web.get("/metrics", self._metrics)])
        app.add_routes([web.post("/v1/completions", self._complete)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        return web.json_response({"data": [{"id": "m", "max_model_len": 100}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=f"kvasir:moves_total {len(self.bodies)}\n")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers)
        self.bodies.append(await request.json())
        said = dict(enumerate(self.script)).get(len(self.bodies) - 1, "good")
        if said.isdigit():
            return web.json_response({"error": {"message": "no"}}, status=int(said))
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        if said == "closed":
            request.transport.close()  # type: ignore[union-attr]
            return stream
        events: list[Any] = [{"choices": [{"text": "a"}]}] * 2
        usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        ends = {"error": [{"error": {"message": "group died"}}], "short": [], "odd": [{"choices": None}]}
        events += ends.get(said, [{"choices": [], "usage": usage}])
        for event in events:
            await stream.write(f"data: {json.dumps(event)}\n\n".encode())
        if said not in ("error", "short"):
            await stream.write(b"data: {\n\n" if said == "garbled" else b"data: [DONE]\n\n")
        return stream


async def replayed(server: Server, count: int = 1, session: str = "", length: int = 3) -> Any:
    args = argparse.Namespace(url=server.url, block_size=1, ttft=60.0, itl=60e3)
    asks = [module("traces").Ask(0.02 * (n + 1), [1] * length, 2, session) for n in range(count)]
    return await module("replay").replay(asks, 1.0, args)


def test_what_fails_is_counted_and_the_others_go_on() -> None:
    async def main() -> None:
        script = ("good", "500", "error", "429", "closed", "short", "503", "garbled", "odd")
        async with Server(*script) as server:
            found = await replayed(server, 10)
        assert (len(found.outcomes), found.refused, found.failures.total(), found.total) == (3, 2, 5, 10)
        assert (found.good, found.attained, found.moves) == (3, 0.3, 10)
        assert [one.cached for one in found.outcomes] == [2, 0, 2]
        said = "\n".join(found.failures)
        for part in ("HTTP 500", "group died", "Client", "before the answer did", "JSONDecodeError"):
            assert part in said
        assert not math.isnan(found.outcomes[0].ttft)

    asyncio.run(main())


def test_a_run_finds_nothing_of_the_run_before() -> None:
    async def main() -> None:
        async with Server() as server:
            for _ in range(2):
                await replayed(server, 2, "talk")
        salts = [body["cache_salt"] for body in server.bodies]
        sessions = [headers["kvasir-session"] for headers in server.headers if "kvasir-session" in headers]
        assert salts[0] == salts[1] != salts[2] == salts[3]
        assert sessions[0] == sessions[1] != sessions[2] == sessions[3]

    asyncio.run(main())


def test_a_key_is_sent_and_not_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with Server("500") as server:
            found = await replayed(server, 2)
        assert all(headers["authorization"] == "Bearer hush-hush" for headers in server.headers)
        assert len(server.headers) == 3
        assert "hush" not in str(found) + capsys.readouterr().out

    monkeypatch.setenv("OPENAI_API_KEY", "hush-hush")
    asyncio.run(main())


def test_requests_that_do_not_fit_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with Server() as server:
            with pytest.raises(SystemExit, match="--shrink"):
                await replayed(server, 2, length=99)

    asyncio.run(main())
    assert "2 of 2 requests are longer than 100 tokens" in capsys.readouterr().out
