"""Constraint: where one sequence stands in its grammar. It lives on the rank that samples; tokens alone drive it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from kvasir.engine.step import NewSequence

Words = npt.NDArray[np.int32]


class Constraint:
    """`begin` makes the grammar's state; it is called once the tokens `after` have been seen.

    End tokens are allowed exactly where the grammar may end, from min_tokens on. Where nothing else is allowed the
    sequence is over whatever min_tokens and ignore_eos say: `over` is set, and `end` (the model's own end) is what is
    sampled if that is so from the start.
    """

    def __init__(self, new: NewSequence, begin: Callable[[], LLMatcher], end: int) -> None:
        wanted = new.sampling.structured_outputs
        assert wanted is not None
        self.matcher: LLMatcher | None = None
        self.over = False
        self.why: str | None = None
        """Why no token can be chosen any more, when the grammar's limits are exceeded."""
        self._begin, self._end = begin, end
        self._after, self._seen = tuple(wanted.after), []  # type: tuple[int, ...], list[int]
        self._stops, self._unstopped = tuple(new.stop_token_ids), new.prompt_len + new.sampling.min_tokens
        if not self._after:
            self.matcher = begin()
        for token in new.token_ids[new.prompt_len :]:
            self.advance(token)

    def advance(self, token: int) -> None:
        """A token was sampled."""
        if self.matcher is None:
            self._seen = [*self._seen, token][-len(self._after) :]
            if tuple(self._seen) == self._after:
                self.matcher = self._begin()
            return
        if token == self._end or (token in self._stops and self.matcher.is_accepting()):
            self.over = True
            return
        if not self.matcher.consume_token(token):
            self.why = f"structured output: {self.matcher.get_error() or f'token {token} does not fit the grammar'}"
        elif self.matcher.is_error():
            self.why = f"structured output: {self.matcher.get_error()}"
        else:
            self.over = self.matcher.is_stopped()

    def close(self, words: Words, position: int) -> None:
        """Of the library's mask words[W]: ends where they may be, and at least one token."""
        assert self.matcher is not None
        before = words.copy()
        ends = {self._end, *self._stops}
        for token in ends:
            _clear(words, token)
        if self.matcher.is_accepting() and position >= self._unstopped:
            for token in self._stops:
                _set(words, token)
        if not words.any():
            words[:] = before
            if self.matcher.is_accepting() or not before.any():
                _set(words, self._end)


class Constraints:
    """Those of all seats, and one mask for a step's rows."""

    def __init__(self, vocab: int) -> None:
        self._words = -(-vocab // 32)
        self._executor: LLExecutor | None = None
        self._seats: dict[int, Constraint] = {}

    def enter(self, seat: int, constraint: Constraint | None) -> None:
        """A sequence takes a seat, with a grammar or without."""
        self._seats.pop(seat, None)
        if constraint is not None:
            self._seats[seat] = constraint

    def has(self, seat: int) -> bool:
        return seat in self._seats

    def masks(self, seats: Sequence[int], positions: Sequence[int]) -> tuple[list[int], Words]:
        """(rows that a grammar holds, their masks[N, W])."""
        if not self._seats:
            return [], np.zeros((0, self._words), np.int32)
        found = [(row, c, c.matcher) for row, seat in enumerate(seats) if (c := self._seats.get(seat))]
        held = [(row, c, matcher) for row, c, matcher in found if matcher is not None]
        words = np.zeros((len(held), self._words), np.int32)
        if held:
            self._fill([matcher for _, _, matcher in held], words)
        for line, (row, constraint, _) in zip(words, held, strict=True):
            constraint.close(line, positions[row])
        return [row for row, _, _ in held], words

    def advance(self, seats: Sequence[int], token_ids: Sequence[int]) -> dict[int, str | None]:
        """row -> None when its grammar is over, or else why it can't go on."""
        ended: dict[int, str | None] = {}
        if not self._seats:
            return ended
        for row, (seat, token) in enumerate(zip(seats, token_ids, strict=True)):
            constraint = self._seats.get(seat)
            if constraint is None:
                continue
            constraint.advance(token)
            if constraint.over or constraint.why is not None:
                ended[row] = constraint.why
        return ended

    def _fill(self, matchers: list[LLMatcher], words: Words) -> None:
        """All cores of the machine take part, without Python's lock."""
        self._executor = self._executor or LLExecutor()
        lines = [(matcher, line) for line, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(lines, words.ctypes.data, 4 * self._words, len(lines))


def _set(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _clear(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
