"""What runs without a client: responses that are made in the background, and batches.

A gateway holds leases on what it works on; what a gateway leaves behind, another one of the same machine takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from kvasir.cluster.auth import PRINCIPAL_HEADER
from kvasir.cluster.batch_run import BatchRun
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.idle import Idle
from kvasir.cluster.responses_fit import fitted
from kvasir.cluster.responses_history import add_to_conversation, said_before
from kvasir.cluster.responses_reply import ResponseReply, event, failed
from kvasir.cluster.responses_schema import ResponseAsk, parse_response
from kvasir.cluster.service_fields import in_session
from kvasir.cluster.store import Part, Store, Stored
from kvasir.engine.errors import ClientError, KvasirError, OverloadedError, ServerError, UnavailableError

log = logging.getLogger(__name__)
Json = dict[str, Any]

WATCH_S = 3.0
"""How often leases are renewed, and looked for what others left."""
RETRY_S = 1.0
FOLLOW_S = 0.1
"""How often a stream is looked at that another process writes."""
MAX_JOBS = 10_000
MAX_BATCHES = 8
"""Batches that one gateway works on at a time."""


class Background:
    """The jobs of one gateway."""

    def __init__(self, desk: Desk, store: Store) -> None:
        self._desk = desk
        self._store = store
        self._idle = Idle(desk)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look after what is stored, from now on. Any number of times."""
        if self._watcher is None:
            self._watcher = asyncio.ensure_future(self._watch())

    async def close(self) -> None:
        """Stop; what isn't done is left to another gateway, or to the next start."""
        tasks = [task for task in (self._watcher, *self._jobs.values()) if task is not None]
        left = list(self._jobs)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.release(left)

    def check_room(self) -> None:
        """Raises OverloadedError when more responses wait than can be looked after."""
        if len(self._jobs) >= MAX_JOBS:
            text = f"{MAX_JOBS} responses are being made in the background already"
            raise OverloadedError(text, retry_after_s=RETRY_S)

    async def respond(
        self, ask: ResponseAsk, reply: ResponseReply, stored: Stored, generation: Generation | None
    ) -> None:
        """Keep `stored`, and make the response. `generation` has begun already; None: it begins when there is room."""
        self.start()
        opening = _parts(0, reply.opening()) if stored.private["streamed"] else ()
        try:
            await self._store.put(stored, opening)
        except BaseException:
            if generation is not None:
                self._desk.end(generation)
            raise
        self._run(stored.id, self._respond(ask, reply, stored, generation))

    async def run_batch(self, stored: Stored) -> None:
        """Keep `stored`, and do it."""
        self.start()
        await self._store.put(stored)
        self._run(stored.id, BatchRun(self._desk, self._store, self._idle, stored).run())

    async def cancel(self, stored: Stored) -> Json:
        """The response as it is then."""

        def cancelled(body: Json) -> Json | None:
            return {**body, "status": "cancelled"} if body["status"] in ("queued", "in_progress") else None

        body = await self._store.change(stored.id, cancelled, done=True)
        self.stop(stored.id)
        return body or stored.body

    async def follow(self, response_id: str, after: int) -> AsyncIterator[list[Part]]:
        """Events behind number `after`, those too that are still to come."""
        more = True
        try:
            while more:
                news = self._news.setdefault(response_id, asyncio.Event())  # before we look, or we might miss some
                more, parts = await self._store.follow(response_id, after)
                if parts:
                    after = parts[-1].number
                    yield parts
                elif more:  # written in another process it is looked for again and again
                    seconds = 1.0 if response_id in self._jobs else FOLLOW_S
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(news.wait(), seconds)
        finally:
            if response_id not in self._jobs:
                self._news.pop(response_id, None)

    def stop(self, object_id: str) -> None:
        """End the work on it, if it is done here; elsewhere that is noticed by its lease."""
        if task := self._jobs.get(object_id):
            task.cancel()

    def _run(self, object_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._jobs[object_id] = asyncio.ensure_future(self._guarded(object_id, work))
        task.add_done_callback(lambda _: self._ended(object_id))

    def _ended(self, object_id: str) -> None:
        self._jobs.pop(object_id, None)
        self._tell(object_id)

    def _tell(self, object_id: str) -> None:
        """Wake those who follow."""
        if news := self._news.pop(object_id, None):
            news.set()

    async def _guarded(self, object_id: str, work: Coroutine[Any, Any, None]) -> None:
        """A state file that can't be written ends the work for now, not the gateway. A bug ends it for good, or it would
        be tried for ever."""
        try:
            await work
        except KvasirError as error:
            log.warning("%s: %s", object_id, error.message)
            with contextlib.suppress(ServerError):
                await self._store.release([object_id])
        except Exception:
            log.exception("%s failed", object_id)
            await self._store.change(object_id, _broken, done=True, ours=True)

    async def _watch(self) -> None:
        while True:
            try:
                known = list(self._jobs)
                mine = await self._store.renew()
                for object_id in known:
                    if object_id not in mine:
                        self.stop(object_id)
                await self._take_over()
            except ServerError as error:
                log.warning("%s", error.message)
            await asyncio.sleep(WATCH_S)

    async def _take_over(self) -> None:
        served = {model.name for model in self._desk.models}
        for stored in await self._store.claim("response", served, 256):
            self._run(stored.id, self._respond_again(stored))
        batches = sum(object_id.startswith("batch_") for object_id in self._jobs)
        for stored in await self._store.claim("batch", served, max(0, MAX_BATCHES - batches)):
            self._run(stored.id, BatchRun(self._desk, self._store, self._idle, stored).run())

    async def _respond_again(self, stored: Stored) -> None:
        """One whose gateway is gone. What a client has read of a stream can't be taken back: it ends."""
        if stored.private["streamed"]:
            numbers = await self._store.numbers(stored.id)
            body = failed(stored.body, UnavailableError("the server was stopped before this response was complete"))
            number = max(numbers, default=-1) + 1
            end = Part(number, event("response.failed", number, response=body))
            await self._store.finish(stored.id, body, [end])
            return
        try:  # what another version of this program took may be refused by now
            ask = dataclasses.replace(parse_response(stored.private["ask"]), items=stored.private["items"])
            earlier = await said_before(self._store, ask, stored.principal, 0.0)
            ask = await fitted(self._desk, ask, earlier)
        except ClientError as error:
            await self._store.finish(stored.id, failed(stored.body, error))
            return
        reply = ResponseReply(ask, self._desk.model(ask.call.model), stored.id)
        reply.response["created_at"] = stored.body["created_at"]
        await self._respond(ask, reply, stored, None)

    async def _respond(
        self, ask: ResponseAsk, reply: ResponseReply, stored: Stored, generation: Generation | None
    ) -> None:
        streamed = stored.private["streamed"]
        while True:
            try:
                generation = generation or await self._begin(ask, stored.id, stored.principal)
                last = await self._generate(generation, reply, stored.id, streamed)
                break
            except UnavailableError as error:
                if streamed and reply.begun:
                    last = _parts(reply.count, [reply.failure(error)])
                    break
                await asyncio.sleep(RETRY_S)
            except KvasirError as error:
                last = _parts(reply.count, [reply.failure(error)])
                break
            finally:
                if generation is not None:
                    self._desk.end(generation)
                generation = None
        if await self._store.finish(stored.id, reply.response, last if streamed else ()):
            await add_to_conversation(self._store, ask, reply.response, stored.expires)

    async def _begin(self, ask: ResponseAsk, response_id: str, principal: str) -> Generation:
        """When there is room."""
        while True:
            with contextlib.suppress(OverloadedError):
                headers = in_session({PRINCIPAL_HEADER: principal}, ask.session)
                return await self._desk.begin(ask.call, response_id, headers)
            await asyncio.sleep(RETRY_S)

    async def _generate(
        self, generation: Generation, reply: ResponseReply, response_id: str, streamed: bool
    ) -> list[Part]:
        """Run it to its end; the last events. Stops when somebody ended the response."""
        reply.begin(generation)
        await self._store.change(response_id, _in_progress)
        if not streamed:
            async for _ in generation:
                pass
            reply.whole()
            return []
        await self._append(response_id, reply.count, [reply.now()])
        async for deltas in generation:
            await self._append(response_id, reply.count, reply.events(deltas))
        return _parts(reply.count, reply.ending())

    async def _append(self, response_id: str, first: int, events: list[bytes]) -> None:
        if not await self._store.append(response_id, _parts(first, events)):
            raise asyncio.CancelledError  # somebody ended it
        self._tell(response_id)


def _broken(body: Json) -> Json:
    """A response or a batch after an error that nobody thought of."""
    message = "internal error; the server's log says more"
    if body["object"] == "response":
        return failed(body, ServerError(message))
    error = {"code": ServerError.code, "message": message, "param": None, "line": None}
    return {**body, "status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": [error]}}


def _in_progress(body: Json) -> Json | None:
    return {**body, "status": "in_progress"} if body["status"] == "queued" else None


def _parts(first: int, events: list[bytes]) -> list[Part]:
    """Events as parts, numbered from `first` on."""
    return [Part(first + i, data) for i, data in enumerate(events)]
