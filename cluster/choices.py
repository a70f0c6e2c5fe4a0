"""Choices: what one request would find at each group that could serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvasir.cluster.fetch import Holdings
from kvasir.cluster.member import Member
from kvasir.cluster.standings import DECODING, PREFILL_TOKENS, PREFILLS, RATE, Amounts, Floats
from kvasir.engine.block_ids import NOBODY

OTHERS = 2.0
"""A request waits for others' tokens, and they for as many of its own."""
AFFINITY = 0.8
"""Share of a prompt that makes a group its home."""
LIKE = 0.98
"""Of the most that is cached: who has so much is as good."""


@dataclass(slots=True)
class Choices:
    """Of equal length, one entry for each candidate."""

    members: Sequence[Member]
    standings: Floats
    """[field, candidate]"""
    cached: Amounts
    """Tokens on the device."""
    held: Amounts
    """Tokens in any tier of its own."""
    rest: Floats
    """What all others cost, in tokens computed."""
    fetched: Amounts
    """Tokens that are worth fetching from a peer."""
    holdings: Sequence[Holdings]
    """Who has them; groups of one version share it."""
    priced: Floats | None = None
    """What `costs` says, if that is known already."""
    known: tuple[int, int] | None = None
    """And what `best` and `home` say, NOBODY for None."""

    @classmethod
    def blank(cls, members: Sequence[Member], standings: Floats, length: int) -> Choices:
        """Nothing is known of what they hold."""
        zeros, rest = np.zeros(len(members), np.int64), np.full(len(members), length, np.float64)
        return cls(members, standings, zeros, zeros, rest, zeros, [Holdings()] * len(members))

    def only(self, places: Sequence[int]) -> Choices:
        """Those of some candidates."""
        at, members = np.array(places), [self.members[place] for place in places]
        cached, held, rest, fetched = self.cached[at], self.held[at], self.rest[at], self.fetched[at]
        holdings = [self.holdings[place] for place in places]
        priced = None if self.priced is None else self.priced[at]
        return Choices(members, self.standings[:, at], cached, held, rest, fetched, holdings, priced)

    def beside(self, other: Choices) -> Choices:
        """And candidates of another version; what they hold is nothing to these."""
        return Choices(
            [*self.members, *other.members],
            np.concatenate([self.standings, other.standings], axis=1),
            np.concatenate([self.cached, other.cached]),
            np.concatenate([self.held, other.held]),
            np.concatenate([self.rest, other.rest]),
            np.concatenate([self.fetched, other.fetched]),
            [*self.holdings, *other.holdings],
        )

    def costs(self, mean: float) -> Floats:
        """Of each, in tokens that a group computes that is as fast as `mean`, the mean of all."""
        if self.priced is not None:
            return self.priced
        table, rest = self.standings, self.rest
        before = np.minimum(table[PREFILL_TOKENS], table[PREFILLS] * rest)  # as Member.before
        rates = np.where(table[RATE], table[RATE], mean)
        found: Floats = (table[DECODING] + OTHERS * before + rest) * (mean / rates)
        return found

    @property
    def best(self) -> int:
        """Tokens that are cached where they are most."""
        return self.known[0] if self.known else int(self.cached.max())

    def home(self, mean: float) -> int | None:
        """The cheapest of those that have about as much cached as any, if that is nearly all that there is to do."""
        if self.known:
            return self.known[1] if self.known[1] != NOBODY else None
        best = self.best
        if not best or best < AFFINITY * (best + self.rest.min()):
            return None
        places = (self.cached >= LIKE * best).nonzero()[0]
        return int(places[self.costs(mean)[places].argmin()])

    def peers(self, place: int) -> list[tuple[Member, int]]:
        """(group, tokens) from which it should fetch, best first; none when that doesn't pay."""
        return self.holdings[place].peers(self.members[place], int(self.held[place])) if self.fetched[place] else []

    def wait(self, place: int) -> float:
        """Predicted seconds to the first token."""
        return self.members[place].wait(self.rest.item(place))

    def queue(self, place: int) -> float:
        """Predicted seconds until its own tokens' turn."""
        return self.members[place].queue(self.rest.item(place))

    def clear(self, place: int) -> float:
        """Predicted seconds until this and all before have their first token."""
        return self.members[place].wait(self.rest.item(place), together=True)

    def late(self, place: int, limit: float, now: float) -> bool:
        """It would come, or make others come, too late there. What an idle group can do is tried again now and then."""
        member = self.members[place]
        return self.clear(place) > limit and (member.requests > 0 or member.known(now))
