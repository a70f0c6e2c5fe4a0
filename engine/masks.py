"""Masks: what the grammars of all seats allow next, on the rank that samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLMatcher

from kvasir.engine.constraint import Constraint, Ints, Words
from kvasir.engine.cores import usable_cores

ALONE_S = 3e-4
"""Masks that take one thread no longer are made by it alone."""
WORKERS = min(32, usable_cores() * 4 // 5)
"""Threads that make the others; where it is one, that has to be woken first, the thread that asks is sooner done."""


class Constraints:
    """Those of all seats, and their masks. apart: as soon as a token is known it is taken in and the next mask is made, by a
    thread of their own, while the next step's forward runs. Where the forward runs on the same cores that delays it by more
    than it hides (half of its threads wait for the one that lost its core), and the host has the logits at once: there
    masks are made when they are asked for, and only for rows that need one."""

    def __init__(self, max_num_seqs: int, vocab: int, *, apart: bool) -> None:
        self._apart = apart
        self._shape = max_num_seqs, -(-vocab // 32)
        self._masks, self._address, self._words = np.zeros((0, 0), np.int32), 0, memoryview(b"")
        self._held = np.zeros(max_num_seqs, np.bool_)
        self._seats: dict[int, Constraint] = {}
        self._entered: list[int] = []
        self._taken: set[int] = set()
        """Seats that have taken in what their rows of the last `masks` are about to say."""
        self._executor: LLExecutor | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._newest: Future[dict[int, str | None]] | None = None

    @property
    def looks(self) -> bool:
        """`masks` has use for the rows' likeliest tokens."""
        return bool(self._seats) and not self._apart

    def enter(self, seat: int, constraint: Constraint | None) -> None:
        """A sequence takes a seat, with a grammar or without."""
        if constraint is None and seat not in self._seats:
            return
        self._wait()
        self._taken.discard(seat)
        self._held[seat] = False
        self._seats.pop(seat, None)
        if constraint is not None:
            self._seats[seat] = constraint
            if self._apart:
                self._entered.append(seat)

    def prepare(self) -> None:
        """Begin the first masks of those that entered."""
        if self._entered:
            entered, self._entered = self._entered, []
            self._begin(lambda: self._hold(entered))

    def masks(self, seats: Ints, likeliest: Sequence[int] | None = None) -> tuple[Ints, Words]:
        """(rows that a grammar holds, their masks[N, W], until the next call). likeliest: of each row the token that is taken if
        it fits, or -1. Rows where it does are left out, if it `looks`, and have taken it in when `advance` is told of it."""
        if not self._seats:
            return seats[:0], self._masks
        if not self._apart:
            return self._asked(seats.tolist(), likeliest)
        self.prepare()
        self._wait()
        rows = np.flatnonzero(self._held[seats])
        return rows, self._masks[seats[rows]] if len(rows) else self._masks

    def advance(self, seats: Ints, token_ids: Callable[[], Sequence[int]]) -> Future[dict[int, str | None]] | None:
        """row -> None when its grammar is over, or else why it can't go on. None: it is known that there is no such row."""
        if not self._seats:
            return None
        if self._apart:
            rows = [(row, seat) for row, seat in enumerate(seats.tolist()) if seat in self._seats]
            return self._begin(lambda: self._advance(rows, token_ids())) if rows else None
        ended = self._advance(enumerate(seats.tolist()), token_ids())
        if not ended:
            return None
        done: Future[dict[int, str | None]] = Future()
        done.set_result(ended)
        return done

    def _asked(self, seats: Sequence[int], likeliest: Sequence[int] | None) -> tuple[Ints, Words]:
        """As `masks`, of those that need one."""
        rows: list[int] = []
        found: list[Constraint] = []
        self._taken.clear()
        for row, seat in enumerate(seats):
            constraint = self._seats.get(seat)
            if constraint is None:
                continue
            if likeliest is not None and (token := likeliest[row]) >= 0 and constraint.take(token):
                self._taken.add(seat)
            elif constraint.holds:
                rows.append(row)
                found.append(constraint)
        if rows:
            self._fill([*enumerate(found)])
        return np.array(rows, np.int64), self._masks[: len(rows)]

    # -- in the thread, if there is one

    def _advance(self, rows: Iterable[tuple[int, int]], token_ids: Sequence[int]) -> dict[int, str | None]:
        ended: dict[int, str | None] = {}
        for row, seat in rows:
            if (constraint := self._seats.get(seat)) is None:
                continue
            if seat not in self._taken:
                constraint.advance(token_ids[row])
            if constraint.over or constraint.why is not None:
                ended[row] = constraint.why
        self._taken.clear()
        if self._apart:
            self._hold([seat for _, seat in rows])
        return ended

    def _hold(self, seats: Sequence[int]) -> dict[int, str | None]:
        """Make the masks of these seats, each at its place."""
        found = [(seat, self._seats[seat]) for seat in seats]
        self._held[seats] = [constraint.holds for _, constraint in found]
        self._fill([(seat, constraint) for seat, constraint in found if self._held[seat]])
        return {}

    def _fill(self, found: Sequence[tuple[int, Constraint]]) -> None:
        """(place, whose mask)"""
        if not len(self._masks):
            self._masks = np.zeros(self._shape, np.int32)
            self._address, self._words = self._masks.ctypes.data, memoryview(self._masks)  # type: ignore[arg-type]
        lines: list[tuple[LLMatcher, int]] = []
        for place, one in found:
            if (matcher := one.lexing) is None:
                self._masks[place] = 0
            else:
                lines.append((matcher, place))
        self._compute(lines)
        for place, one in found:
            if one.thinking is not None or one.ends.among(self._words, place):
                one.close(self._masks[place])

    def _compute(self, lines: list[tuple[LLMatcher, int]]) -> None:
        """(matcher, the mask's row): one after the other as long as that takes less than to wake other threads."""
        size, until = 4 * self._shape[1], time.perf_counter() + (ALONE_S if WORKERS > 1 else math.inf)
        while lines and time.perf_counter() < until:
            matcher, row = lines.pop()
            matcher.unsafe_compute_mask_ptr(self._address + row * size, size)
        if lines:
            self._executor = self._executor or LLExecutor(WORKERS)
            self._executor.unsafe_compute_mask_ptr(lines, self._address, size, self._shape[0])

    def _begin(self, work: Callable[[], dict[int, str | None]]) -> Future[dict[int, str | None]]:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="kvasir-masks")
        self._newest = self._thread.submit(work)
        return self._newest

    def _wait(self) -> None:
        """What was begun last is done, and all before it."""
        if self._newest is not None:
            self._newest.result()
            self._newest = None
