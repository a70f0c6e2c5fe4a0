"""`kvasir batch IN OUT`: a file of requests answered in this process, by the same code as over HTTP, without Ray.

IN holds one JSON object per line, either as OpenAI's batches have them ({"custom_id", "method", "url", "body"}) or
simple ({"prompt": ...} or {"messages": [...]}, sampling fields, an optional "id"). OUT gets one line for each, in the
order in which they are done: running the same command again does what is missing, and tries once more what failed.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Union

import orjson
from tqdm import tqdm

from kvasir.cluster.batch_line import (
    CHAT,
    COMPLETION,
    MAX_LINE_BYTES,
    Line,
    answer,
    dumped,
    error_json,
    line_label,
    line_object,
    openai_entry,
    openai_line,
)
from kvasir.cluster.local_desk import local_desk
from kvasir.cluster.rank_actor import MakeEngine, load_engine
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError, ConfigError, KvasirError, ServerError, UnavailableError

COPY_BYTES = 1 << 20
SYNC_S = 2.0
"""After a crash of the machine at most this much work is lost; after one of the process none."""

Json = dict[str, Any]
Key = Union[str, int]
Answer = Callable[[str, Json], Awaitable[Json]]
"""(url, body) -> body of the response. Raises the KvasirError that HTTP would tell."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How a run went, in lines. `skipped` were answered in OUT already."""

    succeeded: int
    failed: int
    skipped: int


def run_batch(
    input_path: Path,
    output_path: Path,
    config: EngineConfig,
    *,
    progress: bool = True,
    make_engine: MakeEngine = load_engine,
) -> Tally:
    """Answer the lines of IN that OUT lacks with the model of `config`.

    Raises ConfigError when a file or the model can't be used, ServerError when the engine fails. What is done by then
    is in OUT.
    """
    return asyncio.run(_run(input_path, output_path, config, progress, make_engine))


async def _run(
    input_path: Path, output_path: Path, config: EngineConfig, progress: bool, make_engine: MakeEngine
) -> Tally:
    concurrency = 2 * config.max_num_seqs  # a full batch, and as many that wait to take the places
    unlimited = dataclasses.replace(config, max_queue=2**31 - 1)  # a line may hold many prompts
    with Output.opened(input_path, output_path) as output:
        async with local_desk(unlimited, os.environ, make_engine) as desk:
            return await answer_lines(
                input_path, output, partial(answer, desk), concurrency=concurrency, progress=progress
            )


async def answer_lines(
    input_path: Path, output: Output, answer: Answer, *, concurrency: int, progress: bool = True
) -> Tally:
    """Answer the lines of IN that `output` lacks, `concurrency` at a time. Lines at fault get an error there."""
    total = _count_lines(input_path)
    with tqdm(total=total, unit="line", disable=not progress, dynamic_ncols=True, smoothing=0.1) as bar:
        work = _Work(answer, output, bar)
        await work.all(_lines(input_path), concurrency)
    return Tally(work.succeeded, work.failed, work.skipped)


class _Work:
    """One run over a file."""

    def __init__(self, answer: Answer, output: Output, bar: tqdm[Any]) -> None:
        self.succeeded = self.failed = self.skipped = 0
        self._answer = answer
        self._output = output
        self._bar = bar
        self._tokens = 0
        self._seen: dict[Key, int] = {}

    async def all(self, lines: Iterator[tuple[int, bytes | None]], concurrency: int) -> None:
        """Never more than `concurrency` lines in memory."""
        running: set[asyncio.Task[None]] = set()
        try:
            for number, raw in lines:
                if len(running) >= concurrency:
                    running = await _some_done(running)
                line = self._begin(number, raw)
                if line is not None:
                    running.add(asyncio.ensure_future(self._one(line)))
            while running:
                running = await _some_done(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, number: int, raw: bytes | None) -> Line | None:
        """The line, unless it is done: before this run, or right here because nothing can be asked."""
        label: Json = {}
        try:
            done = self._output.has_line(number)
            if not done:
                label = line_label(value := line_object(raw))
                self._check_unique(label, number)
                done = self._output.has(label)
            if done:
                self._bar.update()
                self.skipped += 1
                return None
            return _parsed(value, number, label)
        except ClientError as error:
            label = {} if error.param == "custom_id" else label  # a second line of that id must not count as the first
            self._write(number, {**label, "error": error_json(error)}, failed=True)
            return None

    def _check_unique(self, label: Json, number: int) -> None:
        for name, key in label.items():
            if key in self._seen:
                raise ClientError(f"{name} {key!r} is that of line {self._seen[key]} too", param="custom_id")
            self._seen[key] = number

    async def _one(self, line: Line) -> None:
        body, failure = None, None
        try:
            body = await self._answer(line.url, line.body)
        except UnavailableError as error:  # the engine is gone, and every other line with it
            text = f"line {line.number}: {error.message}; run the same command again to do what is missing"
            raise ServerError(text) from error
        except KvasirError as error:
            failure = error
        usage = body["usage"] if body else {}
        self._tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        entry = _simple_entry(line, body, failure) if line.simple else openai_entry(line.label, body, failure)
        self._write(line.number, entry, failed=failure is not None)

    def _write(self, number: int, entry: Json, *, failed: bool) -> None:
        self._output.append({**entry, "line": number})
        self.failed += failed
        self.succeeded += not failed
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix({"failed": self.failed, "tok/s": round(self._tokens / max(elapsed, 1e-3))}, refresh=False)
        self._bar.update()


@dataclass(slots=True)
class Output:
    """OUT, locked against a second run: which lines it has, and the place where to append."""

    file: IO[bytes]
    keys: set[Key] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    """Of entries without an id."""
    failed: list[tuple[int, int]] = field(default_factory=list)
    """Where in the file the lines are that tell of an error: (begin, end)."""
    synced: float = 0.0

    @classmethod
    def opened(cls, input_path: Path, output_path: Path) -> Output:
        """Read what is there, repair a last line that a crash left half written, and take out what failed."""
        try:
            if not input_path.is_file():
                raise ConfigError(f"there is no file {str(input_path)!r}", param="input")
            input_path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"can't read {str(input_path)!r}: {_why(error)}", param="input") from error
        try:
            file = output_path.open("a+b")
        except OSError as error:
            raise ConfigError(f"can't write {str(output_path)!r}: {_why(error)}", param="output") from error
        try:
            return cls._from_file(file, input_path, output_path)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _from_file(cls, file: IO[bytes], input_path: Path, output_path: Path) -> Output:
        if os.path.samefile(input_path, output_path):
            raise ConfigError("IN and OUT are the same file", param="output")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another run is writing {str(output_path)!r}", param="output") from error
        output = cls(file)
        output._load(output_path)
        if not output.failed:
            return output
        real = output_path.resolve()  # a link keeps leading to it
        try:
            return output._without_failed(real)
        except OSError as error:
            text = f"lines of {str(output_path)!r} failed; to try them again, {str(real.parent)!r} must take a new file"
            raise ConfigError(f"{text}: {_why(error)}", param="output") from error

    def _without_failed(self, path: Path) -> Output:
        """The same without the lines that failed: a crash leaves the old file or the new one."""
        self.file.flush()
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as rest:
            new = Path(rest.name)
            try:
                at = 0
                for begin, end in [*self.failed, (path.stat().st_size, 0)]:
                    _copy(self.file, rest, at, begin)
                    at = end
                os.fsync(rest.fileno())
                shutil.copymode(path, new)
                file = new.open("a+b")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                new.replace(path)
            except BaseException:
                new.unlink()
                raise
        self.file.close()
        return Output(file, self.keys, self.lines)

    def _load(self, path: Path) -> None:
        self.file.seek(0)
        end = 0
        for number, raw in enumerate(self.file, start=1):
            at = f"{path}, line {number}"
            if raw.endswith(b"\n"):
                if not self._note(raw, at):
                    self.failed.append((end, end + len(raw)))
                end += len(raw)
            else:
                self._repair(raw, at, end)
                break

    def _repair(self, raw: bytes, at: str, start: int) -> None:
        """The last line has no end: that alone is missing, or more. Another program's file is left alone."""
        try:
            orjson.loads(raw)
        except ValueError:
            if raw[:2] == b'{"'[: len(raw)]:
                self.file.truncate(start)
                return
        if not self._note(raw, at):
            self.failed.append((start, start + len(raw) + 1))
        self.file.write(b"\n")

    def _note(self, raw: bytes, at: str) -> bool:
        """Remember whose line it is; false: it failed."""
        try:
            entry = orjson.loads(raw)
            line = entry["line"]
        except (ValueError, KeyError, TypeError) as error:
            text = f"{at} wasn't written by kvasir batch; name another file for OUT, or remove that line"
            raise ConfigError(text, param="output") from error
        if entry.get("error") is not None:
            return False
        label = {name: entry[name] for name in ("custom_id", "id") if entry.get(name) is not None}
        if "custom_id" in label or ("id" in label and "response" not in entry):
            self.keys.add(next(iter(label.values())))
        else:
            self.lines.add(line)
        return True

    def has(self, label: Json) -> bool:
        """Whether the line with that label has its entry."""
        return any(key in self.keys for key in label.values())

    def has_line(self, number: int) -> bool:
        """Whether the line of that number, which has no label, has its entry."""
        return number in self.lines

    def append(self, entry: Json) -> None:
        """One whole line at a time, so that a crash leaves at most one broken."""
        self.file.write(dumped(entry))
        self.file.flush()
        if time.monotonic() - self.synced > SYNC_S:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sync()
        self.file.close()


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _copy(source: IO[bytes], target: IO[bytes], begin: int, end: int) -> None:
    """Bytes `begin` to `end`."""
    source.seek(begin)
    while begin < end and (part := source.read(min(COPY_BYTES, end - begin))):
        target.write(part)
        begin += len(part)
    target.flush()


async def _some_done(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """What still runs once at least one is done. Raises what a task raised."""
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return rest


def _count_lines(path: Path) -> int:
    """Lines that aren't blank."""
    return sum(1 for _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of those that aren't blank; None for one that is longer than MAX_LINE_BYTES."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            if not raw.endswith(b"\n") and len(raw) == MAX_LINE_BYTES:
                while len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield number, None
            elif text := raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield number, text


def _parsed(value: Json, number: int, label: Json) -> Line:
    if "body" in value or "url" in value or "method" in value:
        return openai_line(value, number, label)
    body = {name: field for name, field in value.items() if name not in ("custom_id", "id")}
    if ("messages" in body) == ("prompt" in body):
        raise ClientError("the line must hold prompt, or messages, or OpenAI's custom_id, method, url and body")
    return Line(number, CHAT if "messages" in body else COMPLETION, body, label, simple=True)


def _simple_entry(line: Line, body: Json | None, failure: KvasirError | None) -> Json:
    """The text, or several as `choices`, and the usage."""
    if body is None:
        assert failure is not None
        return {**line.label, "error": error_json(failure)}
    choices = [_simple_choice(choice) for choice in body["choices"]]
    answer: Json = choices[0] if len(choices) == 1 else {"choices": choices}
    return {**line.label, **answer, "usage": body["usage"]}


def _simple_choice(choice: Json) -> Json:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    rest = {name: value for name, value in choice.items() if name not in ("index", "message", "text")}
    return {"text": text, **{name: value for name, value in rest.items() if value is not None}}
