"""Router: which group a request goes to. Choosing and reserving are one step, so that a burst doesn't meet in one place.

Policy `cost`: where the request has least to wait for, in tokens: what must be computed first there (queue and uncached
prompt, by how fast the group is), what its decoding slows down, and what blocks from slower tiers or peers cost. A
conversation stays where most of it is cached until that group's predicted wait passes a limit: moving it costs others.

What a peer holds is fetched where that is cheaper than to compute it: the request carries the peers. Where groups have
roles a prompt is computed by a prefill group, whatever the policy, when its queue and the move cost less than what the
prompt would cost where it decodes, and those that stream there.

Blocks count from the moment at which a group says that it holds them. To count those that a request sent there will leave
behind was tried: who comes meanwhile computes them again, so that they draw others to a queue (benchmarks/results).
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from kvasir.cluster.choices import AFFINITY, LIKE, OTHERS, Choices
from kvasir.cluster.directory import BlockDirectory
from kvasir.cluster.fetch import Holdings, fetches
from kvasir.cluster.member import Member, Pace, Reservation
from kvasir.cluster.prompt_keys import Hashers
from kvasir.cluster.standings import REQUESTS, SERVES, Floats, Ints, Standings
from kvasir.engine.block_ids import NOBODY, GroupCosts, group_costs
from kvasir.engine.blocks import Tier
from kvasir.engine.errors import OverloadedError
from kvasir.engine.request import Peer, Request

Policy = Literal["round-robin", "least-load", "prefix", "cost"]

SAVED: Sequence[tuple[Tier, float]] = (("host", 0.95), ("disk", 0.75))
"""What a cached token saves that has to be brought back to the device, in tokens computed."""
SLACK = 0.75
"""Share of max_ttft_s that predictions may use up: those that come later take their part of each step."""
STAY_S = 0.25
"""A home is left when the predicted wait there is longer."""
TIE = 0.02
"""Costs that differ by less than this share count as equal."""
STREAM_HARM = 0.1
"""What a token computed beside a stream costs that stream."""
MOVE = 100.0
"""What a move costs besides the fetch, in tokens computed: a second request, and the steps until it is there."""
MAX_SESSIONS = 65536


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, and why: for traces and for who asks."""

    member: Member
    reservation: Reservation
    policy: Policy
    why: str
    """only, turn, load, prefix, cost, home, session, limit; split: another group decodes"""
    prompt_tokens: int
    cached_tokens: int
    """Expected hits on the device."""
    best_tokens: int
    """Expected hits where they are most."""
    wait_s: float
    """Predicted time to the first token; 0 while the group's speed isn't known."""
    queued_tokens: int
    """To be computed there before."""
    candidates: int
    fetched_tokens: int = 0
    """Of the prompt: to be fetched from peers."""
    peer_name: str = ""
    """The first of them."""
    peers: tuple[Peer, ...] = ()
    below_tokens: int = 0
    """Of the prompt, behind those that are cached: in the group's host memory or on its disk."""

    def facts(self) -> dict[str, str | int | float]:
        """For a trace's span."""
        facts: dict[str, str | int | float] = {
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
        if self.below_tokens:
            facts["below_tokens"] = self.below_tokens
        if self.member.role != "both":
            facts["role"] = self.member.role
        if self.fetched_tokens:
            facts |= {"peer": self.peer_name, "fetched_tokens": self.fetched_tokens}
        return facts

    def header(self) -> str:
        """The same in one line."""
        return "; ".join(f"{name}={value}" for name, value in self.facts().items())


class Asked:
    """What is the same for all requests that may go to the same groups. lenders: whoever may give them blocks."""

    def __init__(self, members: Sequence[Member], lenders: Iterable[Member], changes: int) -> None:
        self.members, self.changes = members, changes
        numbers = [member.group for member in members]
        self.numbers: Ints = np.array(numbers, np.int64)
        in_line = bool(numbers) and numbers == [*range(numbers[0], numbers[0] + len(numbers))]
        self.at: slice | Ints = slice(numbers[0], numbers[0] + len(numbers)) if in_line else self.numbers
        """The same: a view is had sooner than a copy."""
        kinds: dict[bytes, list[Member]] = {}
        for member in members:
            kinds.setdefault(_salt(member), []).append(member)
        self.kinds = [Asked(alike, lenders, changes) for alike in kinds.values()] if len(kinds) > 1 else []
        """Those of each version apart, where there are several."""
        salt = next(iter(kinds), b"")
        like = (member.hasher for member in (*members, *lenders) if salt and _salt(member) == salt)
        self.hashers = [*dict.fromkeys(hasher for hasher in like if hasher is not None)]
        """By which groups of their version know blocks: one for each block size."""
        self.roles = any(member.role == "prefill" for member in members)
        """Some only compute prompts."""


def _salt(member: Member) -> bytes:
    return member.hasher.salt if member.hasher is not None else b""


class Router:
    """Routes one model's requests. Not thread-safe: one loop calls it. `now` is that loop's clock.

    max_ttft_s: a request whose first token is predicted later than this everywhere is refused; 0: none is. later: as of
    BlockDirectory.
    """

    def __init__(
        self,
        policy: Policy = "cost",
        *,
        max_ttft_s: float = 0.0,
        draw: random.Random | None = None,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self.policy, self.max_ttft_s = policy, max_ttft_s
        self.directory = BlockDirectory(later=later)
        self._draw = draw or random.Random()
        self._hashers, self._pace, self._standings = Hashers(), Pace(), Standings()
        self._costs: GroupCosts | None = None
        """Once it is compiled."""
        self._lenders: dict[int, Member] = {}
        """Groups that serve blocks to others, by number."""
        self._asked = Asked([], (), 0)
        """The candidates of the last request, mostly those of the next one."""
        self._sessions: OrderedDict[str, Member] = OrderedDict()
        self._turn = 0

    def join(self, name: str, kv: tuple[str, str] = ("", "")) -> Member:
        """A new group; `kv`: address and secret with which peers fetch its blocks, if it serves any."""
        member = Member(name, self.directory, self._hashers, self._pace, self._standings, kv)
        if kv[0]:
            self._lenders[member.group] = member
        return member

    def leave(self, member: Member) -> None:
        """The group is no more."""
        self._lenders.pop(member.group, None)
        member.leave()

    def place(
        self, request: Request, members: Sequence[Member], now: float, session: str = "", source: Member | None = None
    ) -> Route:
        """Choose one of `members`, at least one, and reserve. `source`: where the request runs already, and whose blocks
        are fetched. Raises OverloadedError when none can serve it in time."""
        length = len(request.prompt_token_ids) + len(request.resume_token_ids)
        if members != self._asked.members or self._asked.changes != self._standings.changes:
            self._asked = Asked([*members], self._lenders.values(), self._standings.changes)
        choices = self._choices(request, self._asked, length, source)
        why, choices, place = self._by_role(choices, request, length, self._sessions.get(session) if session else None)
        limit = min(SLACK * self.max_ttft_s or math.inf, request.deadline_s or math.inf)
        if limit < math.inf and choices.late(place, limit, now):
            why, place = "limit", min(range(len(choices.members)), key=choices.clear)
            if choices.late(place, limit, now):
                raise self._late(choices.clear(place), limit)
        if session and choices.members[place].role != "prefill":
            self._remember(session, choices.members[place])
        return self._route(why, choices, place, length, len(members), source)

    def _route(
        self, why: str, choices: Choices, place: int, length: int, candidates: int, source: Member | None
    ) -> Route:
        member, cached = choices.members[place], int(choices.cached[place])
        wait, queued, best = choices.wait(place), member.prefill_tokens, choices.best
        peers = choices.peers(place)
        reservation = member.reserve(int(choices.rest[place]), -(-length // member.block_size))
        return Route(
            member,
            reservation,
            self.policy,
            why,
            length,
            cached,
            best,
            wait,
            queued,
            candidates,
            int(choices.fetched[place]) if peers else 0,
            peers[0][0].name if peers else "",
            tuple(Peer(one.kv_address, one.kv_secret, tokens, ordered=one is source) for one, tokens in peers),
            int(choices.held[place]) - cached,
        )

    @property
    def _looks(self) -> bool:
        return self.policy in ("prefix", "cost")

    def _choices(self, request: Request, asked: Asked, length: int, source: Member | None) -> Choices:
        standings = self._standings.table[:, asked.at]
        if not self._looks:
            return Choices.blank(asked.members, standings, length)
        if asked.kinds:
            return reduce(Choices.beside, (self._choices(request, kind, length, source) for kind in asked.kinds))
        if not asked.hashers:
            return Choices.blank(asked.members, standings, length)
        return self._held(asked, standings, request, length, source)

    def _held(self, asked: Asked, standings: Floats, request: Request, length: int, source: Member | None) -> Choices:
        """What each has cached, and what it costs to have the rest."""
        found, *more = [self.directory.found(one.prompt(request)) * one.block_size for one in asked.hashers]
        for tokens in more:  # blocks of another size are others, so that each group has its own alone
            found += tokens
        source_tokens = 0
        if source is not None and self._lenders.get(source.group) is not source:
            source = None
        elif source is not None:  # it has just computed them, and may not have told yet
            source_tokens = (length - 1) // source.block_size * source.block_size
        self._costs = self._costs or group_costs(
            np.array([1.0, *(saved for _, saved in SAVED)]), OTHERS, AFFINITY, LIKE
        )
        if self._costs is not None:
            return self._weighed(self._costs, asked, standings, found, length, source_tokens, source)
        cached = held = found[0, asked.at]
        rest = length - cached.astype(np.float64)
        for number, (tier, saved) in enumerate(SAVED, 1):
            if self.directory.has_tier(tier):
                near, held = held, found[number, asked.at]
                rest -= saved * (held - near)
        holdings = self._holdings(found[-1], source, source_tokens)
        most = holdings.most
        fetched = fetches(standings, held, rest, most) if most else np.zeros_like(held)
        return Choices(asked.members, standings, cached, held, rest, fetched, [holdings] * len(asked.members))

    def _weighed(
        self,
        costs: GroupCosts,
        asked: Asked,
        standings: Floats,
        found: Ints,
        length: int,
        source_tokens: int,
        source: Member | None,
    ) -> Choices:
        """The same by compiled code."""
        mean, number = self._pace.rate or 1.0, NOBODY if source is None else source.group
        weighed = costs.weigh(self._standings.table, asked.numbers, found, length, mean, number, source_tokens)
        holdings = Holdings(weighed.lent, self._lenders, weighed.lenders) if self._lenders else Holdings()
        parts = weighed.cached, weighed.held, weighed.rest, weighed.fetched
        known = weighed.best, weighed.home
        return Choices(asked.members, standings, *parts, [holdings] * len(asked.members), weighed.costs, known)

    def _holdings(self, found: Ints, source: Member | None, source_tokens: int) -> Holdings:
        if not self._lenders:
            return Holdings()
        tokens = found * (self._standings.table[SERVES, : len(found)] > 0)
        if source is not None and source.serves:
            tokens[source.group] = source_tokens
        return Holdings(tokens, self._lenders)

    # -- choosing

    def _by_role(
        self, choices: Choices, request: Request, length: int, at_home: Member | None
    ) -> tuple[str, Choices, int]:
        """(why, those that come into question, number of the choice among them)"""
        places = (
            [place for place, member in enumerate(choices.members) if member.role == "prefill"]
            if self._asked.roles
            else []
        )
        whole = [place for place, member in enumerate(choices.members) if member.role != "prefill"] if places else []
        if not whole:
            why, place = self._choose(choices, at_home)
            return why, choices, place
        decoders = choices.only(whole)
        why, place = self._choose(decoders, at_home)
        version = decoders.members[place].version
        places = [one for one in places if choices.members[one].version == version]  # no other could hand over
        if places and not request.resume_token_ids and request.pooling is None:
            prefillers = choices.only(places)
            costs = prefillers.costs(self._pace.rate or 1.0)
            first = int(costs.argmin())
            if costs[first] < self._alone(decoders, place, length):
                return "split", prefillers, first
        return why, decoders, place

    def _alone(self, choices: Choices, place: int, length: int) -> float:
        """What a prefill group may cost: what it costs to compute a prompt where it decodes, without the move."""
        member, rest, mean = choices.members[place], choices.rest.item(place), self._pace.rate or 1.0
        harm = STREAM_HARM * member.requests * rest
        move = MOVE + member.fetch_price(length - choices.held.item(place))
        return choices.costs(mean).item(place) + (harm - move) * mean / (member.rate or mean)

    def _choose(self, choices: Choices, at_home: Member | None) -> tuple[str, int]:
        """(why, number of the choice)"""
        if len(choices.members) == 1:
            return "only", 0
        if at_home is not None and at_home in choices.members:
            home = choices.members.index(at_home)
            if choices.queue(home) <= STAY_S:
                return "session", home
        if self.policy == "round-robin":
            self._turn += 1
            return "turn", self._turn % len(choices.members)
        if self.policy == "least-load":
            return "load", self._least(choices, choices.standings[REQUESTS], 0.0)
        if self.policy == "prefix":
            return "prefix", self._least(choices, -choices.cached.astype(np.float64), 0.0)
        return self._cheapest(choices)

    def _cheapest(self, choices: Choices) -> tuple[str, int]:
        mean = self._pace.rate or 1.0
        home = choices.home(mean)
        if home is not None and choices.queue(home) <= STAY_S:
            return "home", home
        return "cost", self._least(choices, choices.costs(mean), TIE)

    def _least(self, choices: Choices, costs: Floats, tie: float) -> int:
        """The least; of those that are about equal, the less loaded of two at random."""
        least = costs.min()
        near: list[int] = (costs <= least + tie * abs(least)).nonzero()[0].tolist()
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
