"""Groups of fakes behind a directory, and what a client sees of a stream over them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
from functools import partial

from waiting import until_async

from kvasir.cluster.failover import Failover, LastingStream
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Finished, Token
from kvasir.engine.request import Request, SamplingParams


def draw(seed, position):
    """A token that depends on seed and position alone, as the sampler's do."""
    return (
        65
        + int.from_bytes(hashlib.blake2b(f"{seed % 2**64}/{position}".encode(), digest_size=4).digest(), "little") % 26
    )


def request(prompt=(1, 2, 3), **sampling):
    fields = {"seed": 7, "max_tokens": 40, **sampling}
    return Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(**fields))


class Fleet:
    """Groups of fakes behind a directory; `kill` ends one, `add` starts another."""

    def __init__(self, make, count, step_s):
        self.directory = GroupDirectory({"m": "m"})
        self.groups, self._make, self._count, self._step_s = [], make, count, step_s
        self.moves = []
        """Why streams moved."""
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self):
        for _ in range(self._count):
            await self.add()
        return self

    async def __aexit__(self, *_):
        await self.directory.close()
        await self._stack.aclose()

    async def add(self, version=b""):
        group = self._make(step_s=self._step_s)
        group.engine.info = dataclasses.replace(group.engine.info, version=version)
        await self._stack.enter_async_context(group)
        group.engine.token = draw
        self.groups.append(group)
        self._tell()
        await until_async(lambda: len([c for c in self.directory.clients("m") if c.alive]) == len(self.groups))

    async def kill(self, group, how="crash"):
        """crash: its process ends; fail: its engine does, and the process a little later."""
        if how == "fail":
            group.engine.refusal = UnavailableError("the engine has stopped")
            group.engine.fail()
            await asyncio.sleep(0.02)
        self.groups.remove(group)
        await group.service.stop()
        self._tell()

    def serving(self):
        """Groups that hold a request."""
        return [group for group in self.groups if group.engine.requests]

    def _tell(self):
        self.directory.update("m", [group.endpoint for group in self.groups])

    async def drain(self, group):
        """It gives away what it has, then ends."""
        await group.service.drain(30.0)
        assert not group.engine.requests
        await self.kill(group)

    def failover(self, timeout_s=60.0):
        def note(why, to, seconds):
            self.moves.append(why)

        move = partial(self.directory.move, "m")
        return Failover(partial(self.directory.place, "m"), timeout_s, move=move, moved=note)


async def read(stream):
    """All events, whichever way they come."""
    events, turns = [], itertools.cycle([True, True, False])
    stream.pour(events.extend, lambda: next(turns))
    while batch := await stream.batch():
        events += batch
    return events


def outcome(events, n):
    """What a client sees of each continuation: tokens, scores, reason and count."""
    found = []
    for index in range(n):
        mine = [event for event in events if event.index == index]
        tokens = [event for event in mine if isinstance(event, Token)]
        ends = [event for event in mine if isinstance(event, Finished)]
        assert [type(event) for event in mine] == [Token] * len(tokens) + [Finished] * len(ends)
        ids = [token for event in tokens for token in event.token_ids]
        scores = [score for event in tokens for score in event.logprobs or ()]
        prompt = [event.prompt_logprobs for event in tokens if event.prompt_logprobs]
        found.append((ids, scores, prompt, [(end.reason, end.output_tokens) for end in ends]))
    return found


def check(found, n, max_tokens, seed, scores):
    """The outcome is what one group that lives would have given."""
    expected = []
    for index in range(n):
        ids = [draw(seed + index, position) for position in range(max_tokens)]
        expected.append((ids, [("length", max_tokens)]))
    assert [(ids, ends) for ids, _, _, ends in found] == expected
    if scores:
        assert [[score.logprob for score in scored] for _, scored, _, _ in found] == [
            [-0.25 * position for position in range(max_tokens)]
        ] * n
        assert [len(prompt) for _, _, prompt, _ in found] == [1] + [0] * (n - 1)


async def some(stream, count=5):
    """Read until so many tokens came."""
    events = []
    while sum(isinstance(event, Token) for event in events) < count:
        batch = await stream.batch()
        assert batch, "it ended early"
        events += batch
    return events


def held(group):
    """Its engine makes no steps. Returns what lets it make so many more; all, when it isn't told how many."""
    advance = group.engine._advance
    group.engine._advance = lambda name: []

    def let_go(steps=10**9):
        left = itertools.repeat(True, steps)
        group.engine._advance = lambda name: advance(name) if next(left, False) else []

    return let_go


def freed(group):
    """It is held no more."""
    del group.engine._advance


async def halfway(fleet, asked=None, timeout_s=60.0):
    """A stream that has delivered five tokens, and these. Its group makes no more until it is freed, and is there to be killed
    however late."""
    let_go = {group: held(group) for group in fleet.groups}
    stream = LastingStream(asked or request(), fleet.failover(timeout_s))
    await stream.start()
    await until_async(fleet.serving)
    for group, go in let_go.items():
        go(*([5] if group in fleet.serving() else []))
    return stream, await some(stream)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))
