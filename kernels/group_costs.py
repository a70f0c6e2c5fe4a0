"""What `cluster.choices` says a request would cost at each group, by compiled code (group_costs.cpp). No torch."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROWS = 5
LENDERS = 4
NOBODY = -1


@dataclass(slots=True)
class Weighed:
    """Of equal length, one entry for each candidate, but for `lent`: see `cluster.choices`."""

    cached: Floats
    held: Floats
    rest: Floats
    fetched: Floats
    costs: Floats
    lent: Floats
    """By group's number: tokens that it lends."""
    lenders: list[float]
    """Numbers of those that lend most, of equals the least loaded first."""
    best: int
    """The most that one has cached."""
    home: int
    """Its place among the candidates, or NOBODY."""


class GroupCosts:
    """saved[tier]: what a cached token saves. others: how much tokens count that are computed before a request's own. affinity,
    like: shares of what is to be done, and of the most that is cached, that make a home."""

    def __init__(self, path: str, saved: Floats, others: float, affinity: float, like: float) -> None:
        self._call: Any = ctypes.PyDLL(path).group_costs
        arrays, numbers = (
            (c_void_p, c_int64),
            (c_double, c_void_p, c_double, c_double, c_double, c_double, c_int64, c_int64),
        )
        self._call.argtypes, self._call.restype = (*arrays, *arrays, *arrays, *numbers, c_void_p), None
        self._saved, self._weights = saved, (others, affinity, like)
        self._table, self._numbers = saved, np.empty(0, np.int64)
        self._addresses = [0, 0, saved.ctypes.data]
        """Of the last table, the last numbers, and `saved`: numpy takes its time to tell them."""

    def weigh(
        self, table: Floats, numbers: Ints, found: Ints, length: int, mean: float, source: int, source_tokens: int
    ) -> Weighed:
        """table[field, group] of all groups' standings, found[tier, group]: tokens of `length` that it holds; numbers: of the
        candidates. mean: what groups compute in a second. source: the group that lends source_tokens, or NOBODY."""
        if table is not self._table:
            self._table, self._addresses[0] = table, table.ctypes.data
        if numbers is not self._numbers:
            self._numbers, self._addresses[1] = numbers, numbers.ctypes.data
        at_table, at_numbers, at_saved = self._addresses
        count, places = len(numbers), found.shape[1]
        out = np.empty(ROWS * count + places + LENDERS + 2)
        asked = length, at_saved, mean, *self._weights, source, source_tokens
        found_at, out_at = found.ctypes.data, out.ctypes.data
        self._call(at_table, table.shape[1], found_at, places, at_numbers, count, *asked, out_at)
        cached, held, rest, fetched, costs = out[: ROWS * count].reshape(ROWS, count)
        *lenders, best, home = out[ROWS * count + places :].tolist()
        lent = out[ROWS * count : ROWS * count + places]
        return Weighed(cached, held, rest, fetched, costs, lent, lenders[:places], int(best), int(home))
