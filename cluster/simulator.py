"""A fleet in one process on a virtual clock: the router, hashes, block pools and messages are the real ones; groups are
simulated. A group whose role is prefill hands a request over with its first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvasir.cluster.failover import MIN_LEFT
from kvasir.cluster.member import Member
from kvasir.cluster.router import Route, Router
from kvasir.cluster.simulated_group import LETTER, Run, Shape, SimulatedGroup
from kvasir.engine.blocks import ContentId, content_ids, salted, token_bytes
from kvasir.engine.errors import OverloadedError
from kvasir.engine.request import Request, SamplingParams

REPORT_S = 0.1
"""How often a group reports, if anything changed: what gateways know is at most this old, as in a real fleet."""
ALL_COUNTED = 2**32


class Arrival(NamedTuple):
    """A request, and when it comes."""

    at: float
    """Seconds from the beginning."""
    prompt: Sequence[int]
    output: int
    """Tokens."""
    session: str = ""


class Simulation:
    """`groups` behind one gateway or more, that take turns with the requests; `prefill` of them compute prompts."""

    def __init__(self, groups: int, shape: Shape, routers: Sequence[Router], prefill: int = 0) -> None:
        self.routers = routers
        self.groups = [SimulatedGroup(f"group {number}", shape, self._on_tokens) for number in range(groups)]
        serves = bool(shape.token_bytes)
        self._members = [
            [router.join(f"g{number}", (str(number), "") if serves else ("", "")) for number in range(groups)]
            for router in routers
        ]
        self._decoders = [members[prefill:] for members in self._members]
        self._prefill = prefill
        self._begun: list[tuple[int, Run]] = []
        """(its gateway, request) that a prefill group has its first token of."""
        self._turn: dict[int, int] = {}
        """id of a request that a prefill group has -> its gateway"""
        self._busy: set[int] = set()
        """Groups that have something to report."""
        self._number: dict[Member, int] = {}
        for members in self._members:
            for number, (member, group) in enumerate(zip(members, self.groups, strict=True)):
                self._number[member] = number
                if prefill:
                    member.role = group.role = "prefill" if number < prefill else "decode"
                member.welcome(group.info, f"group {number}")
                member.report(group.stats(), ALL_COUNTED, 0.0)
                for message in group.journal.snapshot():
                    member.blocks(message)

    def run(self, arrivals: Iterable[Arrival]) -> tuple[list[Run], list[float]]:
        """Play them, sorted by time, to the end. Returns (what ran, when others were refused)."""
        runs, refused, tick, now = [], list[float](), 0.0, 0.0
        for turn, (now, prompt, output, session) in enumerate(arrivals):
            while tick <= now:
                self._report(tick)
                tick += REPORT_S
            asked = Request(request_id=str(turn), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=output))
            try:
                runs.append(self._begin(Run(asked, output, now), turn % len(self.routers), now, session))
            except OverloadedError:
                refused.append(now)
        while self._busy:
            self._report(tick)
            tick += REPORT_S
        return runs, refused

    def _begin(self, run: Run, turn: int, now: float, session: str) -> Run:
        self._hand_over(now)
        return self._submit(run, self.routers[turn].place(run.request, self._members[turn], now, session), turn, now)

    def _submit(self, run: Run, route: Route, turn: int, now: float) -> Run:
        run.route = route
        route.reservation.number = 1
        number = self._number[route.member]
        self._busy.add(number)
        if number < self._prefill:
            self._turn[id(run)] = turn
        group = self.groups[number]
        group.advance(now)
        group.submit(run, now, self.groups[int(route.peers[0].address)] if route.peers else None)
        return run

    def _on_tokens(self, run: Run, count: int) -> None:
        if run.route is not None and run.produced == count:
            run.route.reservation.streams()
            if (turn := self._turn.pop(id(run), None)) is not None and run.output - count >= MIN_LEFT:
                self._begun.append((turn, run))

    def _hand_over(self, now: float) -> None:
        """Prefill groups' first tokens until now: others go on with them."""
        for number in [number for number in self._busy if number < self._prefill]:
            self.groups[number].advance(now)
        begun, self._begun = self._begun, []
        for turn, run in begun:
            if run.produced < run.output and run.route is not None:
                self._move(run, run.route.member, turn)

    def _move(self, run: Run, source: Member, turn: int) -> None:
        old = self.groups[self._number[source]]
        resumed = replace(run.request, resume_token_ids=[LETTER] * run.produced)
        route = self.routers[turn].place(resumed, self._decoders[turn], old.now, "", source)
        prompt = [*run.request.prompt_token_ids, *resumed.resume_token_ids]
        heir = Run(replace(run.request, prompt_token_ids=prompt), run.output - run.produced, old.now)
        old.abort(run)
        run.heir = self._submit(heir, route, turn, old.now)

    def _report(self, now: float) -> None:
        """Every group that did something until now says so."""
        self._hand_over(now)
        for number in [*self._busy]:
            group = self.groups[number]
            group.advance(now)
            stats = group.stats()
            group.journal.take("device", group.pool.drain())
            messages = [*group.journal.flush()]
            for members in self._members:
                member = members[number]
                member.report(stats, ALL_COUNTED, now)
                for message in messages:
                    member.blocks(message)
            if group.idle:
                self._busy.discard(number)


def ideal_hits(prompts: Iterable[Sequence[int]], block_size: int) -> list[int]:
    """Cached tokens of each prompt with one cache that never forgets."""
    known: set[ContentId] = set()
    found = []
    for prompt in prompts:
        ids = content_ids(salted("ideal"), token_bytes(prompt), block_size)
        most = (len(prompt) - 1) // block_size
        count = next((place for place, one in enumerate(ids[:most]) if one not in known), most)
        found.append(count * block_size)
        known.update(ids)
    return found
