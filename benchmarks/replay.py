"""Replays a recorded trace, open loop: against a fleet of simulated groups on a virtual clock, policy by policy, or
against a real server.

    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 1 2 4 8             # four policies, a table
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 16 --max-ttft 2 --policy cost
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 1 2 4 8 --plot replay.svg
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 8 --policy cost --fetch --prefill 4   # peers, roles
    .venv/bin/python benchmarks/replay.py TRACE --url http://127.0.0.1:8000 --speed 0.5 --limit 200 --shrink 32
    .venv/bin/python benchmarks/replay.py --fit skald                                    # an engine's step times
    .venv/bin/python benchmarks/replay.py --route                                        # what a decision takes

TRACE: Mooncake's JSONL, a folder of agent sessions or one of them (JSON), Azure's CSV. Good is a request whose first token
came within --ttft and whose others took --itl each, on average. Hits are cached prompt tokens over those of one cache that
never forgets, for the requests that were admitted. Speed 2 plays a trace in half its time. --shrink 32 leaves one token of
32 of prompts and answers, for models with little room; which requests begin alike stays the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from traces import Ask, block_size, load

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.router import Policy, Router
from kvasir.cluster.simulator import Shape, Simulation, StepTime, ideal_hits
from kvasir.engine.blocks import chain_start, content_ids, token_bytes
from kvasir.engine.event import Event, Finished
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Stats

COLOURS = {
    "round-robin": "#999999",
    "least-load": "#d08000",
    "prefix": "#4070d0",
    "cost": "#c02030",
    "server": "#c02030",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that was admitted, and ended."""

    ttft: float
    itl: float
    cached: int
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Report:
    """One replay."""

    policy: str
    speed: float
    offered: float
    """Requests a second."""
    outcomes: Sequence[Outcome]
    refused: int
    good: int
    hits: float
    real_time: float
    """Simulated seconds in a second of one core."""
    fetched: float = 0.0
    """GB of blocks that came from peers."""
    moves: int = 0
    """Requests that another group took over."""

    @property
    def attained(self) -> float:
        """Share of all requests that were good."""
        return self.good / (len(self.outcomes) + self.refused)

    def row(self) -> str:
        ttft, itl = ([getattr(one, name) for one in self.outcomes] for name in ("ttft", "itl"))
        total = len(self.outcomes) + self.refused
        admitted = self.good / max(1, len(self.outcomes))
        return " | ".join(
            [
                f"| {self.policy} | {self.speed:g} | {self.offered:.1f} | {self.attained * self.offered:.1f}",
                f"{self.attained:.1%} | {self.refused / total:.1%} | {admitted:.1%} | {self.hits:.1%}",
                *(f"{_percentile(ttft, share):.2f}" for share in (0.5, 0.9, 0.99)),
                *(f"{_percentile(itl, share) * 1e3:.1f}" for share in (0.5, 0.99)),
                f"{self.fetched:.3g} | {self.moves} | {self.real_time:.0f} |",
            ]
        )


COLUMNS = (
    "policy", "speed", "offered, 1/s", "goodput, 1/s", "good", "refused", "good of admitted", "hits over ideal",
    "TTFT p50, s", "p90", "p99", "ITL p50, ms", "p99", "fetched, GB", "moves", "x real time",
)  # fmt: skip
HEAD = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def simulate(asks: Sequence[Ask], policy: Policy, speed: float, shape: Shape, args: argparse.Namespace) -> Report:
    """One policy at one speed."""
    routers = [Router(policy, max_ttft_s=args.max_ttft, draw=random.Random(n)) for n in range(args.gateways)]
    began = time.process_time()
    simulation = Simulation(args.groups, shape, routers, args.prefill)
    runs, refused = simulation.run((ask.at / speed, ask.prompt, ask.output) for ask in asks)
    spent = time.process_time() - began
    outcomes = [
        Outcome(run.first_token - run.arrived, (run.last.finished - run.first_token) / max(1, run.output - 1), run.cached,
                run.request.prompt_token_ids)
        for run in runs
    ]  # fmt: skip
    span = max(run.last.finished for run in runs)
    fetched = sum(group.stats().peer_bytes for group in simulation.groups) / 1e9
    moves = sum(run.heir is not None for run in runs)
    return _report(policy, speed, asks, outcomes, len(refused), shape.block_size, span / spent, args, fetched, moves)


def _report(
    policy: str,
    speed: float,
    asks: Sequence[Ask],
    outcomes: Sequence[Outcome],
    refused: int,
    size: int,
    real_time: float,
    args: argparse.Namespace,
    fetched: float = 0.0,
    moves: int = 0,
) -> Report:
    good = sum(one.ttft <= args.ttft and one.itl <= args.itl / 1e3 for one in outcomes)
    ideal = sum(ideal_hits([one.prompt for one in outcomes], size))
    hits = sum(one.cached for one in outcomes) / max(1, ideal)
    offered = len(asks) * speed / max(1e-9, asks[-1].at)
    return Report(policy, speed, offered, outcomes, refused, good, hits, real_time, fetched, moves)


def _percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def carried(reports: Sequence[Report], share: float) -> float:
    """Goodput as DistServe defines it: the highest load, between those measured, of which `share` is good."""
    points = sorted((one.offered, one.attained) for one in reports)
    best = 0.0
    for (load_, attained), (more, less) in zip(points, [*points[1:], (math.inf, 0.0)], strict=True):
        if attained >= share:
            best = (
                load_
                if more == math.inf or less >= share
                else load_ + (more - load_) * (attained - share) / (attained - less)
            )
    return best


# -- a real server


async def replay(asks: Sequence[Ask], speed: float, args: argparse.Namespace) -> Report:
    """POST /v1/completions with token ids, each at its time whether or not those before are answered."""
    import aiohttp

    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(None), connector=aiohttp.TCPConnector(limit=0)
    ) as client:
        async with client.get(f"{args.url}/v1/models") as answer:
            card = (await answer.json())["data"][0]
        model, room = card["id"], card.get("max_model_len") or math.inf
        asks = [ask for ask in asks if len(ask.prompt) + ask.output <= room]
        before = await _counters(client, args.url)
        began = time.perf_counter()

        async def one(ask: Ask) -> Outcome | None:
            await asyncio.sleep(max(0.0, began + ask.at / speed - time.perf_counter()))
            body = {"model": model, "prompt": list(ask.prompt), "max_tokens": ask.output, "ignore_eos": True}
            options = {"stream": True, "stream_options": {"include_usage": True}}
            headers = {"kvasir-session": ask.session} if ask.session else {}
            due, times, usage = began + ask.at / speed, list[float](), dict[str, int]()
            async with client.post(f"{args.url}/v1/completions", json=body | options, headers=headers) as answer:
                if answer.status in (429, 503):
                    return None
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        told = json.loads(line[6:])
                        usage = told.get("usage") or usage
                        if told["choices"]:
                            times.append(time.perf_counter())
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)  # type: ignore[attr-defined]
            return Outcome(times[0] - due, (times[-1] - times[0]) / max(1, ask.output - 1), cached, ask.prompt)

        answers = await asyncio.gather(*map(one, asks))
        fetched, moves = (after - was for after, was in zip(await _counters(client, args.url), before, strict=True))
    outcomes = [answer for answer in answers if answer is not None]
    refused, size = len(asks) - len(outcomes), args.block_size or 16
    return _report("server", speed, asks, outcomes, refused, size, 1.0, args, fetched / 1e9, int(moves))


async def _counters(client: "aiohttp.ClientSession", url: str) -> tuple[float, float]:  # type: ignore[name-defined]  # noqa: F821, UP037
    """(bytes that groups fetched, moves) since the server's start."""
    async with client.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return _total(text, "kvasir:kv_fetched_bytes_total"), _total(text, "kvasir:moves_total")


def _total(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


# -- a plot


def plot(reports: Sequence[Report], path: Path) -> None:
    """Goodput over offered load, a line for each policy; SVG."""
    wide, high, left, low = 640, 360, 50, 320
    most = max(one.offered for one in reports)
    top = max(one.attained * one.offered for one in reports) * 1.05 or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + x / most * (wide - left - 110):.1f},{low - y / top * (low - 20):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<polyline points="{left},20 {left},{low} {wide - 110},{low}" fill="none" stroke="black"/>',
        f'<text x="{wide // 2 - 60}" y="{high - 8}">offered load, requests/s</text>',
        f'<text x="6" y="14">goodput, requests/s</text><text x="{left - 32}" y="30">{top:.0f}</text>',
        f'<text x="{wide - 130}" y="{low + 16}">{most:.0f}</text>',
        f'<polyline points="{place(0, 0)} {place(min(most, top), min(most, top))}" stroke="#ccc" stroke-dasharray="4"/>',
    ]
    for number, policy in enumerate(dict.fromkeys(one.policy for one in reports)):
        mine = sorted((one.offered, one.attained * one.offered) for one in reports if one.policy == policy)
        points, colour = " ".join(place(*pair) for pair in [(0.0, 0.0), *mine]), COLOURS[policy]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{wide - 100}" y="{40 + 18 * number}" fill="{colour}">{policy}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))


# -- step times of an engine, and times of decisions


def fit(model: str) -> StepTime:
    """Least squares over measured steps: prompts of several lengths alone, then streams, few and many, short and long."""
    import numpy as np

    from kvasir.engine.config import EngineConfig
    from kvasir.engine.engine import Engine

    ends: list[float] = []

    def note(events: Sequence[Event]) -> None:
        ends.extend(time.perf_counter() for event in events if isinstance(event, Finished))

    engine = Engine(EngineConfig(model=model, enable_prefix_caching=False), note)
    engine.start()
    rows, seconds = [], []
    longest = min(1024, engine.info.max_model_len // 2)
    for streams, length, output in itertools.product((1, 4, 16), (16, longest // 4, longest), (2, 34)):
        ends.clear()
        began, before, draw = time.perf_counter(), engine.stats().steps, random.Random(streams * length)
        for number in range(streams):
            prompt = [draw.randrange(engine.info.vocab_size) for _ in range(length)]
            sampling = SamplingParams(max_tokens=output, ignore_eos=True)
            engine.submit(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
        while len(ends) < streams or engine.stats().running:
            time.sleep(0.01)
        decoded = streams * (output - 1)
        rows.append([engine.stats().steps - before, streams * length, decoded, decoded * (length + output / 2)])
        seconds.append(ends[-1] - began)
    engine.shutdown()
    weights = 1 / np.array(seconds)  # relative errors count, so that short measurements aren't drowned
    found = _not_negative(np.array(rows, float) * weights[:, None], np.ones(len(seconds)))
    return StepTime(base_s=found[0], prefill_s=found[1], stream_s=found[2], context_s=found[3])


def _not_negative(rows: "np.ndarray", wanted: "np.ndarray") -> list[float]:  # type: ignore[name-defined]  # noqa: F821, UP037
    """Least squares; a term that would be negative is left out."""
    import numpy as np

    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all():
            return [float(found[kept.index(term)]) if term in kept else 0.0 for term in range(rows.shape[1])]
        kept.pop(int(found.argmin()))


def route_times(groups: int, tokens: int) -> str:
    """Microseconds of the processor for a decision over `groups` groups and prompts of `tokens` tokens."""
    draw, router, shape = random.Random(0), Router(draw=random.Random(0)), Shape(token_bytes=0.33e6)
    common = [draw.randrange(2**17) for _ in range(tokens // 4)]
    prompts = [common + [draw.randrange(2**17) for _ in range(tokens - len(common))] for _ in range(400)]
    start = chain_start(shape.info.salt, "", None, False)
    members = [router.join(f"g{number}", (f"host:{number}", "secret")) for number in range(groups)]
    for number, member in enumerate(members):
        member.welcome(shape.info, str(number))
        journal = BlockJournal(str(number))
        for prompt in draw.sample(prompts, 20):
            held = prompt[: draw.randrange(len(common), tokens)]
            journal.take("device", dict.fromkeys(content_ids(start, token_bytes(held), shape.block_size), True))
        for message in (*journal.flush(), *journal.snapshot()):
            member.blocks(message)
        load_ = draw.randrange(4000)
        member.report(Stats(running=20, queued_prefill_tokens=load_, prefills=2, free_blocks=9999), 0, 0.0)
    lines = []
    for label in ("prompts that are new here", "prompts whose tokens were seen before"):
        took = []
        for prompt in prompts:
            fresh = array("I", prompt).tolist()  # as a tokeniser has just made them: not out of the processor's cache
            asked = Request(request_id="r", prompt_token_ids=fresh, sampling=SamplingParams())
            began = time.thread_time()
            route = router.place(asked, members, 0.0)
            took.append(time.thread_time() - began)
            route.reservation.settle()
        lines.append(
            f"{label}: median {statistics.median(took) * 1e6:.0f} us, p99 {_percentile(took, 0.99) * 1e6:.0f} us"
        )
    return "\n".join([*lines, _event_rate(router, members[0].group)])


def _event_rate(router: Router, group: int) -> str:
    draw, count = random.Random(1), 400_000
    keys = [draw.getrandbits(64) for _ in range(count)]
    began = time.process_time()
    for at in range(0, count, 500):
        router.directory.change(group, "device", keys[at : at + 500], keys[max(0, at - 50_000) : max(0, at - 49_500)])
    return (
        f"the directory takes in {count * 1.75 / (time.process_time() - began):,.0f} stored and evicted blocks a second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--speed", type=float, nargs="+", default=[1.0])
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit in seconds")
    parser.add_argument("--itl", type=float, default=25.0, help="limit in milliseconds")
    parser.add_argument("--policy", nargs="+", choices=get_args(Policy), default=get_args(Policy))
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--max-ttft", type=float, default=0.0, help="as of kvasir serve; 0: nothing is refused")
    parser.add_argument("--block-size", type=int, help="of the groups; default: the trace's own unit")
    parser.add_argument(
        "--kv-tokens", type=int, default=Shape().num_blocks * Shape().block_size, help="a group's cache"
    )
    parser.add_argument("--fetch", action="store_true", help="simulated groups fetch blocks from each other")
    parser.add_argument("--link", type=float, default=Shape().fetch_bytes_per_s / 1e9, help="of each group, GB/s")
    parser.add_argument("--token-bytes", type=float, default=0.33e6, help="keys and values of a token")
    parser.add_argument("--prefill", type=int, default=0, help="so many simulated groups only compute prompts")
    parser.add_argument("--prefill-budget", type=int, default=Shape().prefill_budget, help="tokens of their steps")
    parser.add_argument("--shrink", type=int, default=1, help="leave one token of so many")
    parser.add_argument("--budget", type=int, default=Shape().budget, help="tokens of a step")
    parser.add_argument("--step", type=float, nargs=4, metavar="S", help="base, prefill, stream, context; see StepTime")
    parser.add_argument("--plot", type=Path, help="goodput over load, as SVG")
    parser.add_argument("--url", help="a real server instead of simulated groups")
    parser.add_argument("--vocab", type=int, default=2**17, help="token ids stay below")
    parser.add_argument("--fit", metavar="MODEL", help="measure an engine's step times, for --step")
    parser.add_argument("--route", action="store_true", help="time the decision: 64 groups, 8,000 tokens")
    args = parser.parse_args()
    if args.fit:
        found = fit(args.fit)
        print(f"--step {found.base_s:.3g} {found.prefill_s:.3g} {found.stream_s:.3g} {found.context_s:.3g}")
    elif args.route:
        print(route_times(64, 8000))
    elif args.trace is None:
        parser.error("which trace?")
    else:
        _replay_all(args)


def _replay_all(args: argparse.Namespace) -> None:
    asks = load(args.trace, vocab=args.vocab, limit=args.limit, shrink=args.shrink)
    print(HEAD)
    reports = []
    for speed in args.speed:
        for policy in ("server",) if args.url else args.policy:
            reports.append(_one(asks, policy, speed, args))
            print(reports[-1].row(), flush=True)
    for share in (0.95, 0.9):
        best = {policy: carried([one for one in reports if one.policy == policy], share) for policy in
                dict.fromkeys(one.policy for one in reports)}  # fmt: skip
        print(
            f"\nload of which {share:.0%} is good, 1/s: "
            + ", ".join(f"{name} {rate:.1f}" for name, rate in best.items())
        )
    if args.plot:
        plot(reports, args.plot)


def _one(asks: Sequence[Ask], policy: str, speed: float, args: argparse.Namespace) -> Report:
    if args.url:
        return asyncio.run(replay(asks, speed, args))
    size = args.block_size or block_size(args.trace)
    step = (
        StepTime(**dict(zip(("base_s", "prefill_s", "stream_s", "context_s"), args.step, strict=True)))
        if args.step
        else StepTime()
    )
    shape = Shape(
        step_time=step,
        block_size=size,
        num_blocks=args.kv_tokens // size,
        budget=args.budget,
        prefill_budget=args.prefill_budget,
        token_bytes=args.token_bytes if args.fetch or args.prefill else 0.0,
        fetch_bytes_per_s=args.link * 1e9,
    )
    return simulate(asks, policy, speed, shape, args)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
