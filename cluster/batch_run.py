"""BatchRun: the lines of a stored file answered one by one in idle capacity; what is answered survives a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson

from kvasir.cluster.auth import PRINCIPAL_HEADER
from kvasir.cluster.batch_line import (
    Line,
    answer,
    dumped,
    error_json,
    line_label,
    line_object,
    openai_entry,
    openai_line,
)
from kvasir.cluster.desk import Desk
from kvasir.cluster.files import FileWriter, find_file, lines
from kvasir.cluster.idle import Idle
from kvasir.cluster.service_fields import BATCH_PRIORITY
from kvasir.cluster.store import Part, Store, Stored
from kvasir.engine.errors import ClientError, KvasirError, OverloadedError, UnavailableError

Json = dict[str, Any]

MAX_LINES = 50_000
MAX_ERRORS = 100
"""Of a file that can't be used: as many are told."""
RETRY_S = 1.0
LOOK_S = 0.5
"""How often it is asked whether a batch has been cancelled."""


class ExpiredError(ClientError):
    """The completion window is over."""

    code = "batch_expired"


class BatchRun:
    """One batch that this gateway works on."""

    def __init__(self, desk: Desk, store: Store, idle: Idle, stored: Stored) -> None:
        self._desk = desk
        self._store = store
        self._idle = idle
        self._stored = stored
        self._id = stored.id
        self._body = stored.body

    async def run(self) -> None:
        """To the end of the batch, or until it is cancelled. Ends early where other gateways serve its models."""
        if self._body["status"] == "validating" and not await self._validate():
            return
        if not set(self._stored.private["models"]) <= {model.name for model in self._desk.models}:
            await self._store.release([self._id])
            return
        status = self._body["status"]
        await self._conclude(
            await self._all() if status in ("in_progress", "cancelling") else self._stored.private["ends"]
        )

    async def _validate(self) -> bool:
        """Look at every line before the first is answered."""
        seen: dict[Any, int] = {}
        models: set[str] = set()
        errors: list[Json] = []
        try:
            await find_file(self._store, self._body["input_file_id"], self._stored.principal)
            async for number, raw in lines(self._store, self._body["input_file_id"]):
                try:
                    line = self._line(number, raw, seen)
                    models.add(_name(line))
                except ClientError as error:
                    errors.append(self._refused(error, number))
                if len(seen) > MAX_LINES:
                    raise ClientError(f"the file has more than {MAX_LINES} lines")
                if len(errors) >= MAX_ERRORS:
                    break
            if not seen and not errors:
                raise ClientError("the file is empty", param="input_file_id")
        except ClientError as error:
            errors.append(self._refused(error, None))
        if errors:
            failed = {"status": "failed", "failed_at": _now(), "errors": {"object": "list", "data": errors}}
            await self._store.change(self._id, lambda body: {**body, **failed}, done=True, ours=True)
            return False
        return await self._begin(len(seen), models)

    def _refused(self, error: ClientError, number: int | None) -> Json:
        """What the batch tells of it; of its line, or the whole file."""
        self._desk.metrics.refused(error)
        return {**error_json(error), "line": number}

    def _line(self, number: int, raw: bytes | None, seen: dict[Any, int]) -> Line:
        label = line_label(value := line_object(raw))
        line = openai_line(value, number, label)
        if line.url != self._body["endpoint"]:
            raise ClientError(
                f"url must be the batch's endpoint {self._body['endpoint']}, got {line.url!r}", param="url"
            )
        key = label["custom_id"]
        if key in seen:
            raise ClientError(f"custom_id {key!r:.60} is in line {seen[key]} already", param="custom_id")
        seen[key] = number
        return line

    async def _begin(self, total: int, models: set[str]) -> bool:
        """All lines are fine. False: it is gone, or another gateway took it over."""
        here = {name: model.name for model in self._desk.models for name in model.names}
        ours = sorted({here.get(name, "") for name in models} - {""})
        self._stored.private["models"] = ours
        await self._store.note(self._id, self._stored.private)
        facts = {
            "status": "in_progress",
            "in_progress_at": _now(),
            "request_counts": {"total": total, "completed": 0, "failed": 0},
            "model": next(iter(models)) if len(models) == 1 else None,
        }
        changed = await self._store.change(
            self._id, lambda body: {**body, **facts} if body["status"] == "validating" else None, ours=True
        )
        if changed is None:
            return False
        self._body = changed
        return True

    async def _all(self) -> str:
        """Answer the lines that aren't yet; the status that follows."""
        work, ended = asyncio.ensure_future(self._answer_lines()), asyncio.ensure_future(self._cancelled())
        left = max(0.0, self._body["expires_at"] - time.time())
        try:
            await asyncio.wait((work, ended), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return "completed"
            return "cancelled" if ended.done() else "expired"
        finally:
            work.cancel()
            ended.cancel()
            await asyncio.gather(work, ended, return_exceptions=True)

    async def _cancelled(self) -> None:
        """Returns when somebody cancels it, here or at another gateway."""
        while (await self._store.get(self._id, "batch", self._stored.principal)).body["status"] != "cancelling":
            await asyncio.sleep(LOOK_S)

    async def _answer_lines(self) -> None:
        """Never more of them in memory than the model has room for."""
        done = await self._store.numbers(self._id)
        running: set[asyncio.Task[None]] = set()
        try:
            async for number, raw in lines(self._store, self._body["input_file_id"]):
                if number not in done:
                    line = self._line(number, raw, {})
                    model = self._model(line)
                    await self._idle.enter(model)
                    running.add(asyncio.ensure_future(self._one(line, model)))
                    running = _not_done(running)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _model(self, line: Line) -> str:
        """The model that a line is for; any name where there is none, so that answering it says so."""
        try:
            return self._desk.model(_name(line)).name
        except ClientError:
            return self._desk.models[0].name

    async def _one(self, line: Line, model: str) -> None:
        """Answer a line that has entered. A server that is full, or away, is no fault of the line."""
        headers = {PRINCIPAL_HEADER: self._stored.principal}
        try:
            while True:
                try:
                    asked = {**line.body, "priority": BATCH_PRIORITY}
                    body, failure = await answer(self._desk, line.url, asked, headers), None
                    break
                except (OverloadedError, UnavailableError):
                    await asyncio.sleep(RETRY_S)
                except KvasirError as error:
                    self._desk.metrics.refused(error)
                    body, failure = None, error
                    break
        finally:
            self._idle.leave(model)
        entry = dumped(openai_entry(line.label, body, failure))
        await self._store.append(self._id, [Part(line.number, entry, failure is not None)])

    async def _conclude(self, status: str) -> None:
        """Write the files, and the batch as it stays."""
        await self._store.note(self._id, {**self._stored.private, "ends": status})
        begun = {"status": "finalizing", "finalizing_at": _now()}
        if await self._store.change(self._id, lambda body: {**body, **begun}, ours=True) is None:
            raise asyncio.CancelledError  # gone, or another gateway took it over
        if status == "expired":
            await self._expire_rest()
        completed, failed = await self._store.counts(self._id)
        facts: Json = {
            "status": status,
            f"{status}_at": _now(),
            "request_counts": {**self._body["request_counts"], "completed": completed, "failed": failed},
            "usage": await self._usage(),
            "output_file_id": await self._file("output", failed=False) if completed else None,
            "error_file_id": await self._file("error", failed=True) if failed else None,
        }
        if status == "completed" and completed + failed < facts["request_counts"]["total"]:
            facts |= _failure(ClientError("the input file was deleted before all of it was read"))
        await self._store.settle(self._id, lambda body: {**body, **facts})

    async def _expire_rest(self) -> None:
        done, why = await self._store.numbers(self._id), ExpiredError("the completion window ended before this line")
        async for number, raw in lines(self._store, self._body["input_file_id"]):
            if number not in done:
                entry = {**openai_entry(line_label(line_object(raw)), None, why), "response": None}
                await self._store.append(self._id, [Part(number, dumped(entry), True)])

    async def _file(self, what: str, *, failed: bool) -> str:
        """Id of a file with the lines that failed, or those that didn't."""
        seconds = self._stored.private["output_seconds"]
        name = f"{self._id}_{what}.jsonl"
        file = FileWriter(self._store, self._stored.principal, "batch_output", name)
        async for part in self._parts():
            if part.failed == failed:
                await file.write(part.data)
        return str((await file.done(seconds))["id"])

    async def _usage(self) -> Json:
        """Sum over all lines."""
        read = written = cached = 0
        async for part in self._parts():
            if not part.failed:
                usage = orjson.loads(part.data)["response"]["body"].get("usage") or {}
                read += usage.get("prompt_tokens", usage.get("input_tokens", 0))
                written += usage.get("completion_tokens", usage.get("output_tokens", 0))
                details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
                cached += details.get("cached_tokens", 0)
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }

    async def _parts(self) -> AsyncIterator[Part]:
        number = -1
        while found := await self._store.parts(self._id, number):
            for part in found:
                yield part
            number = found[-1].number


def _name(line: Line) -> str:
    """Of the model that a line is for; empty where that is no name: answering the line says so."""
    name = line.body.get("model")
    return name if isinstance(name, str) else ""


def _not_done(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Those that still run. Raises what one raised."""
    for task in tasks:
        if task.done():
            task.result()
    return {task for task in tasks if not task.done()}


def _failure(error: KvasirError) -> Json:
    """Fields of a batch that failed as a whole."""
    data = [{**error_json(error), "line": None}]
    return {"status": "failed", "failed_at": _now(), "errors": {"object": "list", "data": data}}


def _now() -> int:
    return int(time.time())
