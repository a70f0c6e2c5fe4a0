"""Router: which group a request goes to. Choosing and reserving are one step, so that a burst doesn't meet in one place.

Policy `cost`: where the request has least to wait for, in tokens: what must be computed first there (queue and uncached
prompt, by how fast the group is), what its decoding slows down, and what blocks from slower tiers or peers cost. A
conversation stays where most of it is cached until that group's predicted wait passes a limit: moving it costs others.

Blocks count from the moment at which a group says that it holds them. To count those that a request sent there will leave
behind was tried: who comes meanwhile computes them again, so that they draw others to a queue (benchmarks/results).
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvasir.cluster.directory import BlockDirectory
from kvasir.cluster.member import Member, Pace, Reservation
from kvasir.cluster.prompt_keys import Hasher, Hashers, PromptKeys
from kvasir.engine.errors import OverloadedError
from kvasir.engine.request import Request

Policy = Literal["round-robin", "least-load", "prefix", "cost"]
FetchPrice = Callable[[int], float]
"""Tokens of blocks that a peer holds -> what fetching them costs, in tokens computed."""

HOST_PRICE, DISK_PRICE = 0.05, 0.25
"""What a cached token costs that has to be brought back to the device, in tokens computed."""
OTHERS = 2.0
"""A request waits for others' tokens, and they for as many of its own."""
AFFINITY = 0.8
"""Share of a prompt that makes a group its home."""
SLACK = 0.75
"""Share of max_ttft_s that predictions may use up: those that come later take their part of each step."""
STAY_S = 0.25
"""A home is left when the predicted wait there is longer."""
TIE = 0.02
"""Costs that differ by less than this share count as equal."""
MAX_SESSIONS = 65536


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, and why: for traces and for who asks."""

    member: Member
    reservation: Reservation
    policy: Policy
    why: str
    """only, turn, load, prefix, cost, home, session, limit"""
    prompt_tokens: int
    cached_tokens: int
    """Expected hits."""
    best_tokens: int
    """Expected hits where they are most."""
    wait_s: float
    """Predicted time to the first token; 0 while the group's speed isn't known."""
    queued_tokens: int
    """To be computed there before."""
    candidates: int

    def facts(self) -> dict[str, str | int | float]:
        """For a trace's span."""
        return {
            "policy": self.policy,
            "why": self.why,
            "group": self.member.name,
            "candidates": self.candidates,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "best_tokens": self.best_tokens,
            "queued_tokens": self.queued_tokens,
            "wait_s": round(self.wait_s, 4),
        }

    def header(self) -> str:
        """The same in one line."""
        return "; ".join(f"{name}={value}" for name, value in self.facts().items())


@dataclass(slots=True)
class _Choices:
    """What one request would find at each candidate; three lists of equal length."""

    members: Sequence[Member]
    cached: list[int]
    """Tokens on the device."""
    rest: list[float]
    """What all others cost, in tokens computed."""

    def wait(self, place: int) -> float:
        """Predicted seconds to the first token."""
        return self.members[place].wait(self.rest[place])

    def queue(self, place: int) -> float:
        """Predicted seconds until its own tokens' turn."""
        return self.members[place].queue(self.rest[place])

    def clear(self, place: int) -> float:
        """Predicted seconds until this and all before have their first token."""
        return self.members[place].wait(self.rest[place], together=True)

    def late(self, place: int, limit: float, now: float) -> bool:
        """It would come, or make others come, too late there. What an idle group can do is tried again now and then."""
        member = self.members[place]
        return self.clear(place) > limit and (member.requests > 0 or member.known(now))

    def add(self, other: _Choices) -> None:
        self.members = [*self.members, *other.members]
        self.cached += other.cached
        self.rest += other.rest


class Router:
    """Routes one model's requests. Not thread-safe: one loop calls it. `now` is that loop's clock.

    max_ttft_s: a request whose first token is predicted later than this everywhere is refused; 0: none is.
    fetch_price: set when groups can fetch blocks from peers.
    """

    def __init__(
        self,
        policy: Policy = "cost",
        *,
        max_ttft_s: float = 0.0,
        fetch_price: FetchPrice | None = None,
        draw: random.Random | None = None,
    ) -> None:
        self.policy, self.max_ttft_s, self.fetch_price = policy, max_ttft_s, fetch_price
        self.directory = BlockDirectory()
        self._draw = draw or random.Random()
        self._hashers, self._pace = Hashers(), Pace()
        self._sessions: OrderedDict[str, Member] = OrderedDict()
        self._turn = 0

    def join(self, name: str) -> Member:
        """A new group."""
        return Member(name, self.directory, self._hashers, self._pace)

    def place(self, request: Request, members: Sequence[Member], now: float, session: str = "") -> Route:
        """Choose one of `members`, at least one, and reserve. Raises OverloadedError when none can serve it in time."""
        length = len(request.prompt_token_ids) + len(request.resume_token_ids)
        choices = self._choices(request, members, length)
        why, place = self._choose(choices, self._sessions.get(session) if session else None)
        limit = min(SLACK * self.max_ttft_s or math.inf, request.deadline_s or math.inf)
        if choices.late(place, limit, now):
            why, place = "limit", min(range(len(choices.members)), key=choices.clear)
            if choices.late(place, limit, now):
                raise self._late(choices.clear(place), limit)
        member, cached = choices.members[place], choices.cached[place]
        if session:
            self._remember(session, member)
        wait, queued, best = choices.wait(place), member.prefill_tokens, max(choices.cached)
        reservation = member.reserve(int(choices.rest[place]), -(-length // member.block_size))
        return Route(member, reservation, self.policy, why, length, cached, best, wait, queued, len(members))

    @property
    def _looks(self) -> bool:
        return self.policy in ("prefix", "cost")

    def _choices(self, request: Request, members: Sequence[Member], length: int) -> _Choices:
        nothing = _Choices([], [], [])
        for hasher in {member.hasher for member in members} if self._looks else (None,):
            same = [member for member in members if member.hasher is hasher] if self._looks else members
            found = _Choices(same, [0] * len(same), [float(length)] * len(same))
            if hasher is not None:
                found = self._held(same, hasher.prompt(request), hasher, length)
            if len(same) == len(members):
                return found
            nothing.add(found)
        return nothing

    def _held(self, members: Sequence[Member], keys: PromptKeys, hasher: Hasher, length: int) -> _Choices:
        """What each has cached, and what it costs to have the rest."""
        size, found = hasher.block_size, self.directory.prefixes(keys)
        cached = [found.get(member.group, 0) * size for member in members]
        if self.fetch_price is None and not self.directory.has_tier("host") and not self.directory.has_tier("disk"):
            return _Choices(members, cached, [float(length - tokens) for tokens in cached])
        host, disk = self.directory.prefixes(keys, "host"), self.directory.prefixes(keys, "disk")
        most, rest = max(disk.values(), default=0) * size, []
        for member, near in zip(members, cached, strict=True):
            mid, far = host.get(member.group, 0) * size, disk.get(member.group, 0) * size
            cost = float(length - far)
            if self.fetch_price is not None and most > far:
                cost = min(cost, length - most + self.fetch_price(most - far))
            rest.append(cost + HOST_PRICE * (mid - near) + DISK_PRICE * (far - mid))
        return _Choices(members, cached, rest)

    # -- choosing

    def _choose(self, choices: _Choices, at_home: Member | None) -> tuple[str, int]:
        """(why, number of the choice)"""
        if len(choices.members) == 1:
            return "only", 0
        if at_home in choices.members:
            home = choices.members.index(at_home)
            if choices.queue(home) <= STAY_S:
                return "session", home
        if self.policy == "round-robin":
            self._turn += 1
            return "turn", self._turn % len(choices.members)
        if self.policy == "least-load":
            return "load", self._least(choices, [member.requests for member in choices.members], 0.0)
        if self.policy == "prefix":
            return "prefix", self._least(choices, [-tokens for tokens in choices.cached], 0.0)
        return self._cheapest(choices)

    def _cheapest(self, choices: _Choices) -> tuple[str, int]:
        costs, cached = self._costs(choices), choices.cached
        if (best := max(cached)) and best >= AFFINITY * (best + min(choices.rest)):
            places = [place for place, tokens in enumerate(cached) if tokens >= (1 - TIE) * best]
            home = min(places, key=costs.__getitem__)
            if choices.queue(home) <= STAY_S:
                return "home", home
        return "cost", self._least(choices, costs, TIE)

    def _costs(self, choices: _Choices) -> list[float]:
        pairs, mean = zip(choices.members, choices.rest, strict=True), self._pace.rate or 1.0
        return [
            (member.decoding + OTHERS * member.before(rest) + rest) * mean / (member.rate or mean)
            for member, rest in pairs
        ]

    def _least(self, choices: _Choices, costs: Sequence[float], tie: float) -> int:
        """The least; of those that are about equal, the less loaded of two at random."""
        limit = min(costs)
        limit += tie * abs(limit)
        near = [place for place, cost in enumerate(costs) if cost <= limit]
        if len(near) > 1:
            near = self._draw.sample(near, 2)
        return min(near, key=lambda place: choices.members[place].requests)

    def _late(self, wait: float, limit: float) -> OverloadedError:
        own = limit == SLACK * self.max_ttft_s
        which = f"too close to --max-ttft, {self.max_ttft_s:g} s" if own else f"the request's deadline is {limit:g} s"
        text = f"the first token would come in about {wait:.1f} s, {which}; ask again later"
        return OverloadedError(text, retry_after_s=max(1.0, wait - limit))

    def _remember(self, session: str, member: Member) -> None:
        self._sessions[session] = member
        self._sessions.move_to_end(session)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
