"""`kvasir serve` of a test's own: what its users see when it starts, fails, loses a rank, begins again or ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from kvasir_server import ROOM, Server, start
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_rank_killed_during_a_stream(tmp_path: Path, data: Callable[[str], Path]) -> None:
    """Kill -9 of rank 0, without failover: an error within 2 s, red health, and it comes back by itself."""
    flags = ("--served-model-name", "stories", "--failover-timeout", "0", *ROOM)
    server = start(tmp_path, "--model", str(data("model-stories260k/hf")), *flags)
    try:
        body = {"model": "stories", "prompt": "Once", "max_tokens": 20_000, "ignore_eos": True, "stream": True, "n": 4}
        rank = server.rank()
        with (
            httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply,
            server.nothing_starts(),
        ):
            lines = reply.iter_lines()
            next(lines)
            os.kill(rank, signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: {")]
            assert "error" in json.loads(rest[-1][6:])
            assert server.get("/health")[0] == 503
        until(lambda: server.get("/health")[0] == 200)
        reply = httpx.post(server.url + "/v1/completions", json=body | {"stream": False, "max_tokens": 5}, timeout=60)
        assert reply.status_code == 200
    finally:
        status = server.stop()
    assert status == 0


def test_a_prompt_starts_from_the_disk_after_a_kill_and_after_a_restart(
    tmp_path: Path, data: Callable[[str], Path]
) -> None:
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())["greedy_ids"]
    flags = ("--model", str(data("model-stories260k/hf")), "--served-model-name", "stories", "--dtype", "float32")
    body = {"model": "stories", "prompt": known[:100], "max_tokens": 50, "temperature": 0}

    def ask(server: Server, loaded: int) -> int:
        reply = httpx.post(server.url + "/v1/completions", json=body | {"return_token_ids": True}, timeout=60).json()
        assert reply["choices"][0]["token_ids"] == known[100:150]
        until(lambda: server.metric("kvasir:kv_blocks_loaded_total") == loaded)
        assert server.metric("kvasir:kv_blocks_failed_total") == 0
        return int((reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    server = start(tmp_path, *flags)
    try:
        assert ask(server, 0) == 0
        until(lambda: server.metric("kvasir:kv_blocks_stored_total") >= 9)
        with server.nothing_starts():
            os.kill(server.rank(), signal.SIGKILL)
            until(lambda: server.get("/health")[0] != 200)
        until(lambda: server.get("/health")[0] == 200)
        assert ask(server, 6) == 96
    finally:
        assert server.stop() == 0, "".join(server.log)
    server = start(tmp_path, *flags)
    try:
        assert ask(server, 6) == 96
        assert ask(server, 6) == 96  # out of the cache
    finally:
        assert server.stop() == 0, "".join(server.log)
    assert list((tmp_path / "cache" / "kvasir" / "kv").iterdir())


@dataclass
class Heard:
    """What a client got of a streamed completion."""

    texts: list[str]
    tokens: list[list[str]]
    sums: list[float]
    """Of log probabilities."""
    usage: Any = None


def hear(server: Server, kill_at: int | None, fields: dict[str, Any]) -> Heard:
    """A completion by OpenAI's client; kills rank 0 when the chunk of that number has come."""
    n, rank = fields["n"], server.rank()
    heard = Heard([""] * n, [[] for _ in range(n)], [0.0] * n)
    with server.client() as client:
        for number, chunk in enumerate(client.completions.create(**fields)):
            if number == kill_at:
                os.kill(rank, signal.SIGKILL)
            for choice in chunk.choices:
                heard.texts[choice.index] += choice.text
                if choice.logprobs is not None:
                    heard.tokens[choice.index] += choice.logprobs.tokens or []
                    heard.sums[choice.index] += sum(score or 0.0 for score in choice.logprobs.token_logprobs or [])
            heard.usage = chunk.usage or heard.usage
    if kill_at is not None:
        until(lambda: server.rank() != rank and server.get("/health")[0] == 200)
    return heard


def test_streams_survive_their_group(tmp_path: Path, data: Callable[[str], Path]) -> None:
    """Kill -9 of rank 0 in mid-stream: OpenAI's client sees a pause, and the text, scores and counts of an undisturbed one."""
    common = {"model": "stories", "prompt": "Once upon a time", "temperature": 1.0, "seed": 11, "logprobs": 1}
    common |= {"stream": True, "stream_options": {"include_usage": True}}
    long = {"n": 2, "max_tokens": 800, "extra_body": {"ignore_eos": True, "repetition_penalty": 1.1}}
    steered = {"ignore_eos": True, "mirostat": 2, "mirostat_tau": 3.0, "repetition_penalty": 1.2, "repeat_last_n": 32}
    steered = {"n": 1, "max_tokens": 400, "extra_body": steered | {"bad_words": ["Lily"]}}
    bound = {"n": 1, "max_tokens": 2500, "extra_body": {"guided_regex": "([a-z]{1,9} ){200}"}}
    flags = ("--served-model-name", "stories", "--failover-timeout", "120", *ROOM)
    server = start(tmp_path, "--model", str(data("model-stories260k/hf")), *flags)

    def survives(kill_at: int, fields: dict[str, Any], expected: Heard) -> bool:
        """Whether it ran on behind the kill: a client that is held up kills when all is over."""
        before = sum(server.series("kvasir:failovers_total"))
        heard = hear(server, kill_at, fields)
        assert (heard.texts, heard.tokens) == (expected.texts, expected.tokens)
        assert heard.sums == pytest.approx(expected.sums, rel=1e-4)
        assert heard.usage.completion_tokens == expected.usage.completion_tokens
        return sum(server.series("kvasir:failovers_total")) > before

    try:
        for kill_at, fields in ((40, common | long), (50, common | steered), (30, common | bound)):
            expected = hear(server, None, fields)
            if fields["extra_body"] is bound["extra_body"]:
                assert re.fullmatch(bound["extra_body"]["guided_regex"], expected.texts[0])
            until(partial(survives, kill_at, fields, expected))
    finally:
        status = server.stop()
    assert status == 0, "".join(server.log)


def test_streams_are_found_whichever_gateway_is_asked(tmp_path: Path, data: Callable[[str], Path]) -> None:
    """Two gateways share the port: a client that lost its connection gets the rest from either, and cancels by either."""
    flags = ("--served-model-name", "stories", "--num-gateways", "2", "--stream-ttl", "600")
    server = start(tmp_path, "--model", str(data("model-stories260k/hf")), *flags)
    body = {"model": "stories", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True, "seed": 2}

    def ask(seed: int) -> tuple[str, str]:
        headers = {"kvasir-resumable": "true"}
        with httpx.stream("POST", server.url + "/v1/completions", json=body | {"seed": seed}, headers=headers) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            return reply.headers["kvasir-stream-id"], next(line for line in lines if line == "id: 7")

    def gateways(streams: list[tuple[str, str]]) -> set[str]:
        return {stream_id.partition("-")[0] for stream_id, _ in streams}

    try:
        asked = [ask(0)]
        while len(gateways(asked)) < 2:  # the system draws one for each connection
            assert len(asked) < 200
            asked.append(ask(len(asked)))
        held = asked[-12:]
        for stream_id, _ in held:
            texts = {httpx.get(f"{server.url}/v1/streams/{stream_id}?after=7", timeout=60).text for _ in range(4)}
            (text,) = texts
            assert text.startswith("id: 8\n")
            assert text.endswith("data: [DONE]\n\n")
        for stream_id, _ in held:
            assert httpx.delete(f"{server.url}/v1/streams/{stream_id}").status_code == 200
            assert httpx.get(f"{server.url}/v1/streams/{stream_id}").status_code == 404
    finally:
        status = server.stop()
    assert status == 0, "".join(server.log)


def test_files_are_named_as_seen_from_here_and_sigterm_drains(tmp_path: Path, data: Callable[[str], Path]) -> None:
    """A relative folder, and a relative key file; a stream that runs at the end is answered to its end."""
    (tmp_path / "mine").symlink_to(data("model-stories260k/hf"))
    (tmp_path / "keys.txt").write_text("secret\n")
    server = start(tmp_path, "./mine", "--api-key-file", "keys.txt", "--drain-timeout", "300", *ROOM)
    key = {"Authorization": "Bearer secret"}
    try:
        assert httpx.get(server.url + "/v1/models", headers=key).json()["data"][0]["id"] == "./mine"
        assert httpx.get(server.url + "/v1/models").status_code == 401
        body = {"model": "./mine", "prompt": "Once", "max_tokens": 5000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=key, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    except BaseException:
        server.stop()
        raise
    assert server.wait() == 0, "".join(server.log)


def test_failure_is_one_plain_block(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "kvasir.cluster.cli", "serve", str(tmp_path / "nothing"), "--port", "0", "--grpc-port", "0"],
        capture_output=True, text=True, timeout=90, cwd=tmp_path,
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode != 0
    assert "nothing" in said
    assert "Traceback" not in said
