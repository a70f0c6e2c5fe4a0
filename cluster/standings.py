"""Standings: what a router compares among groups, a column for each: numpy compares 64 groups sooner than a loop
over them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, Union

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvasir.cluster.member import Member

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Amounts = Union[Ints, Floats]
"""Of tokens."""
Value = TypeVar("Value", bound=float)
FIELDS = ("decoding", "prefill_tokens", "prefills", "requests", "rate", "fetch_floor", "fetch_token", "serves")
DECODING, PREFILL_TOKENS, PREFILLS, REQUESTS, RATE, FETCH_FLOOR, FETCH_TOKEN, SERVES = range(len(FIELDS))


class Standings:
    """table[field, group's number]; zeros where there is no group."""

    def __init__(self) -> None:
        self.table: Floats = np.zeros((len(FIELDS), 16))
        self.changes = 0
        """How often a group's role or kind changed."""

    def join(self, group: int) -> None:
        """Make room for a group of this number."""
        if group >= self.table.shape[1]:
            self.table = np.pad(self.table, ((0, 0), (0, self.table.shape[1])))

    def leave(self, group: int) -> None:
        """The number is free."""
        self.table[:, group] = 0.0


class Column(Generic[Value]):
    """A member's attribute that lies in its router's standings."""

    def __init__(self, kind: Callable[[float], Value]) -> None:
        self._kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self._row = FIELDS.index(name)

    def __get__(self, member: Member, owner: type) -> Value:
        return self._kind(member.standings.table.item(self._row, member.group))

    def __set__(self, member: Member, value: Value) -> None:
        member.standings.table[self._row, member.group] = value
