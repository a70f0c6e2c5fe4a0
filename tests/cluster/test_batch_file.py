"""Each line gets its answer once, whatever the file holds and wherever a run was broken off."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kvasir.cluster import batch_file, batch_line
from kvasir.cluster.batch_file import Output, Tally, answer_lines, run_batch
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError, ConfigError, ServerError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


async def _upper(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answers with the prompt in capitals, in OpenAI's shapes."""
    await asyncio.sleep(0)
    if body.get("bad"):
        raise ClientError("bad must not be set", param="bad")
    if url.endswith("chat/completions"):
        choice = {"message": {"role": "assistant", "content": body["messages"][-1]["content"].upper()}}
    else:
        choice = {"text": body["prompt"].upper()}
    choices = [{"index": i, **choice, "logprobs": None, "finish_reason": "length"} for i in range(body.get("n", 1))]
    return {"id": "cmpl-1", "choices": choices, "usage": USAGE}


def _run(source: Path, target: Path, answer: Any = _upper, concurrency: int = 4) -> Tally:
    async def run() -> Tally:
        with Output.opened(source, target) as output:
            return await answer_lines(source, output, answer, concurrency=concurrency, progress=False)

    return asyncio.run(run())


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda entry: entry["line"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_all_kinds_of_lines(tmp_path: Path, out: Path) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    source = _write(
        tmp_path / "in.jsonl",
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        "",
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "bad": 1}},
        {"prompt": "simple"},
        {"id": 7, "prompt": "two", "n": 2},
        {"id": "c", "messages": [{"role": "user", "content": "talk"}], "bad": 1},
    )
    assert _run(source, out) == Tally(succeeded=3, failed=2, skipped=0)
    a, b, simple, two, c = _read(out)
    assert a["custom_id"] == "a"
    assert a["id"].startswith("batch_req_")
    assert a["error"] is None
    assert a["response"]["status_code"] == 200
    assert a["response"]["body"]["choices"][0]["message"]["content"] == "HI"
    assert b["response"]["status_code"] == 400
    assert b["response"]["body"]["error"]["param"] == "bad"
    assert b["error"] == {"code": "invalid_request_error", "message": "bad must not be set", "param": "bad"}
    assert simple == {"line": 4, "text": "SIMPLE", "finish_reason": "length", "usage": USAGE}
    assert [choice["text"] for choice in two["choices"]] == ["TWO", "TWO"]
    assert (two["id"], two["line"]) == (7, 5)
    assert c == {
        "id": "c",
        "line": 6,
        "error": {"code": "invalid_request_error", "message": "bad must not be set", "param": "bad"},
    }


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "isn't valid JSON"),
        ("[1]", "must be a JSON object"),
        ({}, "must hold prompt, or messages"),
        ({"prompt": "a", "messages": []}, "must hold prompt, or messages"),
        ({"url": "/v1/completions", "body": {}}, "custom_id is missing"),
        ({"custom_id": "a", "url": "/v1/images", "body": {}}, "url must be"),
        ({"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}, "method must be POST"),
        ({"custom_id": "a", "url": "/v1/completions", "body": 3}, "body must be an object"),
        ({"id": [1], "prompt": "a"}, "id must be a string or an integer"),
        ({"id": True, "prompt": "a"}, "id must be a string or an integer"),
    ],
)
def test_a_line_at_fault_gets_an_error_and_the_run_goes_on(tmp_path: Path, out: Path, line: object, match: str) -> None:
    source = _write(tmp_path / "in.jsonl", line, {"prompt": "x"})
    assert _run(source, out) == Tally(1, 1, 0)
    bad, good = _read(out)
    assert match in bad["error"]["message"]
    assert good["text"] == "X"
    assert _run(source, out) == Tally(0, 1, 1)


def test_an_id_twice(tmp_path: Path, out: Path) -> None:
    source = _write(tmp_path / "in.jsonl", {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"})
    assert _run(source, out) == Tally(1, 1, 0)
    first, second = _read(out)
    assert first["text"] == "X"
    assert "that of line 1 too" in second["error"]["message"]
    assert _run(source, out) == Tally(0, 1, 1)


def test_lines_that_are_too_long(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(batch_line, "MAX_LINE_BYTES", 64)
    source = _write(tmp_path / "in.jsonl", {"prompt": "x" * 40}, {"prompt": "y" * 300}, {"prompt": "z"})
    source.write_text(source.read_text().rstrip("\n"))
    assert _run(source, out) == Tally(2, 1, 0)
    assert "longer than 64 bytes" in _read(out)[1]["error"]["message"]


def test_encodings(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r\n  \n{"prompt": "\xff"}')
    assert _run(source, out) == Tally(1, 1, 0)
    assert _read(out)[0]["text"] == "É"


def test_every_crash_is_resumed(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT cut off at every single byte: the next run completes it, and no line is answered twice."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of runs
    lines = [
        {"id": "é1", "prompt": "a"},
        {"prompt": "b"},
        "{",
        {"custom_id": "q", "url": "/v1/completions", "body": {"prompt": "c"}},
    ]
    source = _write(tmp_path / "in.jsonl", *lines)
    _run(source, out, concurrency=1)
    whole = out.read_bytes()
    expected = [{name: value for name, value in entry.items() if name != "id"} for entry in _read(out)]
    for size in range(len(whole)):
        out.write_bytes(whole[:size])
        tally = _run(source, out, concurrency=1)
        entries = _read(out)
        assert [{name: value for name, value in entry.items() if name != "id"} for entry in entries] == expected
        assert tally.succeeded + tally.failed + tally.skipped == 4
        there = whole[: size + 1].split(b"\n")[:-1]
        assert tally.skipped == sum(b'"error":{' not in line for line in there)


def test_what_failed_is_tried_again(tmp_path: Path, out: Path) -> None:
    """OUT has one entry for each line, and those that were answered stay as they are."""
    lines = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b", "bad": 1}, "{", {"prompt": "c", "bad": 1}]
    lines += [{"custom_id": "d", "url": "/v1/completions", "body": {"prompt": "d", "bad": 1}}]
    source = _write(tmp_path / "in.jsonl", *lines)
    assert _run(source, out) == Tally(succeeded=1, failed=4, skipped=0)
    (good,) = [line for line in out.read_bytes().splitlines() if b'"error"' not in line]
    out.chmod(0o640)
    assert _run(source, out) == Tally(succeeded=0, failed=4, skipped=1)
    assert good in out.read_bytes().splitlines()
    _write(source, *[{name: one[name] for name in one if name != "bad"} if "bad" in one else one for one in lines])
    assert _run(source, out) == Tally(succeeded=2, failed=2, skipped=1)
    assert sorted(entry["line"] for entry in _read(out)) == [1, 2, 3, 4, 5]
    assert out.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_appended_and_reordered_input_is_known_by_its_ids(tmp_path: Path, out: Path) -> None:
    source = _write(tmp_path / "in.jsonl", {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"})
    _run(source, out)
    _write(source, {"id": 3, "prompt": "c"}, {"id": 2, "prompt": "b"}, {"id": 1, "prompt": "a"})
    assert _run(source, out) == Tally(1, 0, 2)


@pytest.mark.parametrize("content", ["hello", '{"a": 1}', '{"a": 1}\n{"line": 1}\n', "[1]\n", '[{"line": 1}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, out: Path, content: str) -> None:
    out.write_text(content)
    with pytest.raises(ConfigError, match="wasn't written by kvasir batch"):
        _run(_write(tmp_path / "in.jsonl", {"prompt": "x"}), out)
    assert out.read_text() == content


def test_files_that_cannot_be_used(tmp_path: Path, out: Path) -> None:
    source = _write(tmp_path / "in.jsonl", {"prompt": "x"})
    with pytest.raises(ConfigError, match="there is no file"):
        _run(tmp_path / "absent", out)
    with pytest.raises(ConfigError, match="can't write"):
        _run(source, tmp_path / "absent" / "out")
    with pytest.raises(ConfigError, match="the same file"):
        _run(source, source)
    assert source.read_text()
    with Output.opened(source, out), pytest.raises(ConfigError, match="another run is writing"):
        _run(source, out)


def test_an_output_that_is_a_link_stays_one(tmp_path: Path, out: Path) -> None:
    real = tmp_path / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    out.symlink_to(real)
    source = _write(tmp_path / "in.jsonl", {"prompt": "a", "bad": 1}, {"prompt": "b"})
    assert _run(source, out) == Tally(1, 1, 0)
    _write(source, {"prompt": "a"}, {"prompt": "b"})
    assert _run(source, out) == Tally(1, 0, 1)
    assert out.is_symlink()
    assert [entry["text"] for entry in _read(real)] == ["A", "B"]
    assert [*real.parent.iterdir()] == [real]


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A folder of its own for who may not do everything: root may, whatever a file's mode says."""
    with TemporaryDirectory() as folder:
        if root := os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o700)


def test_files_that_may_not_be_used(stranger: Path) -> None:
    source = _write(stranger / "in.jsonl", {"prompt": "a", "bad": 1})
    out = stranger / "out.jsonl"
    assert _run(source, out) == Tally(0, 1, 0)
    before = out.read_bytes()
    stranger.chmod(0o500)
    with pytest.raises(ConfigError, match="must take a new file: Permission denied"):
        _run(source, out)
    assert out.read_bytes() == before
    with pytest.raises(ConfigError, match=r"can't write .*: Permission denied"):
        _run(source, stranger / "other.jsonl")
    source.chmod(0)
    with pytest.raises(ConfigError, match=r"can't read .*: Permission denied"):
        _run(source, out)
    stranger.chmod(0)
    with pytest.raises(ConfigError, match=r"can't read .*: Permission denied"):
        _run(source, out)


def test_memory_and_concurrency_are_bounded(tmp_path: Path, out: Path) -> None:
    running = peak = 0

    async def answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        running -= 1
        return await _upper(url, body)

    source = _write(tmp_path / "in.jsonl", *({"prompt": str(i)} for i in range(3000)))
    assert _run(source, out, answer, concurrency=7) == Tally(3000, 0, 0)
    assert peak == 7
    assert [entry["text"] for entry in _read(out)] == [str(i) for i in range(3000)]


def test_a_dead_engine_ends_the_run_and_the_next_one_does_the_rest(tmp_path: Path, out: Path) -> None:
    count = itertools.count()

    async def answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
        if next(count) >= 10:
            raise UnavailableError("the group died")
        return await _upper(url, body)

    source = _write(tmp_path / "in.jsonl", *({"prompt": str(i)} for i in range(50)))
    with pytest.raises(ServerError, match=r"the group died; run the same command again"):
        _run(source, out, answer)
    assert _run(source, out) == Tally(40, 0, 10)
    assert len(_read(out)) == 50


class EchoEngine:
    """Gives each continuation the prompt's own tokens, then one more, up to max_tokens."""

    def __init__(self, config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> None:
        self.info = ModelInfo(name="echo", max_model_len=512, vocab_size=512, eos_token_ids=(1, 2), max_num_seqs=4)
        self.failure: BaseException | None = None
        self._deliver = deliver
        self._queue: queue.Queue[Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def heartbeat(self) -> float:
        return time.monotonic()

    def start(self, *, measure: bool = False) -> None:
        self._thread.start()

    def shutdown(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, request: Request) -> None:
        self._queue.put(request)

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None:
        pass

    def stats(self) -> Stats:
        return Stats(running=0, waiting=0, kv_usage=0.0)

    stats_at = 0.0

    def serve_blocks(self, host: str) -> tuple[str, str]:
        return "", ""

    def listen(self, on_blocks: Callable[..., None]) -> None:
        pass

    def _run(self) -> None:
        while (request := self._queue.get()) is not None:
            name, ids = request.request_id, [*request.prompt_token_ids, 410][: request.sampling.max_tokens]
            if request.cache_salt == "fail":
                self._deliver([Failed(name, "deadline_exceeded", "too late")])
                continue
            for index in range(request.sampling.n):
                events: list[Event] = [Token(name, index, (token,)) for token in ids]
                end = Finished(
                    name, index, "length", prompt_tokens=len(request.prompt_token_ids), output_tokens=len(ids)
                )
                self._deliver([*events, end])


def test_in_this_process_as_over_http(tmp_path: Path, out: Path, data: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(data("model-stories260k/hf")), served_model_name=("stories",), max_num_seqs=4)
    body = {"model": "stories", "prompt": "Once upon", "max_tokens": 100, "n": 2}
    source = _write(
        tmp_path / "in.jsonl",
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {**body, "model": "other"}},
        {"prompt": "Lily", "max_tokens": 100},
        {"prompt": "Lily", "stream": True},
        {"prompt": "Lily", "temperature": -1},
        {"prompt": "Lily", "cache_salt": "fail"},
        {"messages": [{"role": "user", "content": "hi"}]},
        *({"id": i, "prompt": f"number {i}", "max_tokens": 100} for i in range(200)),
    )
    assert run_batch(source, out, config, progress=False, make_engine=EchoEngine) == Tally(202, 5, 0)
    a, b, lily, stream, cold, late, chat, *numbers = _read(out)
    assert [choice["text"].strip() for choice in a["response"]["body"]["choices"]] == ["Once upon"] * 2
    assert (
        a["response"]["body"]["usage"]["completion_tokens"] == 2 * a["response"]["body"]["usage"]["prompt_tokens"] + 2
    )
    assert b["response"]["status_code"] == 404
    assert lily["text"].startswith(" Lily")
    assert stream["error"]["param"] == "stream"
    assert "temperature must be" in cold["error"]["message"]
    assert late["error"]["code"] == "deadline_exceeded"
    assert "no chat template" in chat["error"]["message"]
    assert all(entry["text"].startswith(f" number {entry['id']}") for entry in numbers)
    assert run_batch(source, out, config, progress=False, make_engine=EchoEngine) == Tally(0, 5, 202)
