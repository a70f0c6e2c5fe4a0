"""Choices: what one request would find at each group that could serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir.cluster.fetch import Holdings
from kvasir.cluster.member import Member

OTHERS = 2.0
"""A request waits for others' tokens, and they for as many of its own."""


@dataclass(slots=True)
class Choices:
    """Lists of equal length, one entry for each candidate."""

    members: Sequence[Member]
    cached: list[int]
    """Tokens on the device."""
    held: list[int]
    """Tokens in any tier of its own."""
    rest: list[float]
    """What all others cost, in tokens computed."""
    fetched: list[int]
    """Tokens that are worth fetching from a peer."""
    holdings: list[Holdings]
    """Who has them; groups of one version share it."""

    @classmethod
    def none(cls) -> Choices:
        return cls([], [], [], [], [], [])

    @classmethod
    def blank(cls, members: Sequence[Member], length: int) -> Choices:
        """Nothing is known of what they hold."""
        zeros = [0] * len(members)
        return cls(members, zeros, zeros, [float(length)] * len(members), zeros, [Holdings()] * len(members))

    def only(self, places: Sequence[int]) -> Choices:
        """Those of some candidates."""
        columns = (self.members, self.cached, self.held, self.rest, self.fetched, self.holdings)
        return Choices(*([column[place] for place in places] for column in columns))  # type: ignore[arg-type]

    def add(self, other: Choices) -> None:
        """Candidates of another version; what they hold is nothing to these."""
        self.members = [*self.members, *other.members]
        self.cached, self.held = self.cached + other.cached, self.held + other.held
        self.rest, self.fetched = self.rest + other.rest, self.fetched + other.fetched
        self.holdings = self.holdings + other.holdings

    def peers(self, place: int) -> list[tuple[Member, int]]:
        """(group, tokens) from which it should fetch, best first; none when that doesn't pay."""
        return self.holdings[place].peers(self.members[place], self.held[place]) if self.fetched[place] else []

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
