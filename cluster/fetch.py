"""Fetching blocks from a peer instead of computing them: whether it pays, and from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvasir.cluster.member import Member
from kvasir.cluster.standings import FETCH_FLOOR, FETCH_TOKEN, Amounts, Floats, Ints

MAX_PEERS = 3
"""So many are told to a group: the first may be busy or gone."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who could give the leading blocks of one prompt."""

    tokens: Amounts | None = None
    """By group's number: tokens that it holds in any tier, if it serves blocks; None: nobody does."""
    lenders: Mapping[int, Member] = field(default_factory=dict)
    """By group's number."""
    first: Sequence[float] | None = None
    """Numbers of MAX_PEERS + 1 that hold most, or None: who they are isn't known yet."""

    @property
    def most(self) -> int:
        """Tokens that one of them holds."""
        return int(self.tokens.max()) if self.tokens is not None else 0

    def peers(self, member: Member, own: int) -> list[tuple[Member, int]]:
        """(group, tokens) of those that hold more than the `own` tokens of `member`: most tokens, then least load first."""
        if self.tokens is None:
            return []
        groups = (self.tokens > own).nonzero()[0].tolist() if self.first is None else map(int, self.first)
        found = [(group, int(self.tokens.item(group))) for group in groups if group != member.group]
        peers = [(self.lenders[group], count) for group, count in found if count > own]
        return sorted(peers, key=lambda one: (-one[1], one[0].requests))[:MAX_PEERS]


def fetches(standings: Floats, held: Ints, rest: Floats, most: int) -> Ints:
    """Tokens that are worth fetching for each candidate, that holds `held` tokens itself; `rest`, what each has to compute,
    becomes less by what that saves. standings: [field, candidate]."""
    lacking = np.maximum(most - held, 0)
    gain = np.maximum(lacking - standings[FETCH_FLOOR] - standings[FETCH_TOKEN] * lacking, 0.0)
    rest -= gain
    worth: Ints = lacking * (gain > 0)
    return worth
