"""Fetching blocks from a peer instead of computing them: whether it pays, and from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvasir.cluster.member import Member

MAX_PEERS = 3
"""So many are told to a group: the first may be busy or gone."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who could give the leading blocks of one prompt."""

    tokens: Mapping[int, int] = field(default_factory=dict)
    """Group's number -> tokens that it holds in any tier."""
    servers: Mapping[int, Member] = field(default_factory=dict)
    """Group's number -> group: those of all that serve blocks."""

    @property
    def most(self) -> int:
        """Tokens that one of them holds."""
        if not self.servers:
            return 0
        return max((count for group, count in self.tokens.items() if group in self.servers), default=0)

    def peers(self, member: Member, own: int) -> list[tuple[Member, int]]:
        """(group, tokens) of those that hold more than the `own` tokens of `member`: most tokens, then least load first."""
        found = [
            (self.servers[group], count)
            for group, count in self.tokens.items()
            if count > own and group in self.servers and group != member.group
        ]
        return sorted(found, key=lambda one: (-one[1], one[0].requests))[:MAX_PEERS]


def fetches(members: Sequence[Member], held: Sequence[int], rest: list[float], most: int) -> list[int]:
    """Tokens that are worth fetching for each member, that holds `held` tokens itself; `rest`, what each has to compute,
    becomes less by what that saves. Written out: it is most of what fetching costs a decision."""
    found = [0] * len(held)
    for place, own in enumerate(held):
        if (lacking := most - own) > 0:
            member = members[place]
            price = member.fetch_floor + member.fetch_token * lacking
            if price < lacking:
                rest[place] -= lacking - price
                found[place] = lacking
    return found
