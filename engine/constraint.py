"""Constraint: where one sequence stands in its thoughts and its grammar. It lives on the rank that samples;
tokens alone drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from kvasir.engine.step import NewSequence
from kvasir.engine.thoughts import Thinking

Words = npt.NDArray[np.int32]


class Constraint:
    """`begin` makes the grammar's state, once the thoughts are over; None: there are thoughts alone to watch.

    End tokens are allowed exactly where the grammar may end, from min_tokens on. Where nothing else is allowed the
    sequence is over whatever min_tokens and ignore_eos say: `over` is set, and `end` (the model's own end) is what is
    sampled if that is so from the start.
    """

    def __init__(self, new: NewSequence, begin: Callable[[], LLMatcher] | None, end: int) -> None:
        self.matcher: LLMatcher | None = None
        """Of the answer; before it is known that there are no thoughts, too."""
        self.over = False
        self.why: str | None = None
        """Why no token can be chosen any more, when the grammar's limits are exceeded."""
        self.thinking = Thinking(new.sampling.thoughts) if new.sampling.thoughts is not None else None
        self._begin, self._end = begin, end
        self._stops, self._unstopped = tuple(new.stop_token_ids), new.prompt_len + new.sampling.min_tokens
        if begin is not None and (self.thinking is None or self.thinking.opening):
            self.matcher = begin()
        for token in new.token_ids[new.prompt_len :]:
            self.advance(token)

    @property
    def holds(self) -> bool:
        """Not every token may come next."""
        thinking = self.thinking is not None and not self.thinking.over
        return self.matcher is not None or (thinking and (self._begin is not None or self.forced is not None))

    @property
    def forced(self) -> int | None:
        """The one token that may come next, by the thoughts' marks."""
        return self.thinking.forced if self.thinking is not None else None

    @property
    def lexing(self) -> LLMatcher | None:
        """What makes the mask."""
        return self.matcher if self.forced is None else None

    def advance(self, token: int) -> None:
        """A token was sampled."""
        answer = [token]
        if self.thinking is not None and not self.thinking.over:
            answer = self.thinking.advance(token)
            if self.thinking.inside:
                self.matcher = None
            elif self.thinking.over and self.matcher is None and self._begin is not None:
                self.matcher = self._begin()
        if self.matcher is not None:
            for one in answer:
                self._consume(self.matcher, one)

    def close(self, words: Words, position: int) -> None:
        """Of the library's mask words[W], or one of zeros: what else holds, ends where they may be, and at least one token."""
        if (forced := self.forced) is not None:
            words[:] = 0
            _set(words, forced)
            return
        if self.matcher is None:  # in thoughts, which an answer must follow
            words[:] = -1
            for token in (self._end, *self._stops):
                _clear(words, token)
            return
        self._close(words, position, self.matcher)
        if self.thinking is not None and self.thinking.opening:
            _set(words, self.thinking.first)

    def _consume(self, matcher: LLMatcher, token: int) -> None:
        if token == self._end or (token in self._stops and matcher.is_accepting()):
            self.over = True
            return
        if not matcher.consume_token(token):
            self.why = f"structured output: {matcher.get_error() or f'token {token} does not fit the grammar'}"
        elif matcher.is_error():
            self.why = f"structured output: {matcher.get_error()}"
        else:
            self.over = matcher.is_stopped()

    def _close(self, words: Words, position: int, matcher: LLMatcher) -> None:
        before = words.copy()
        ends = {self._end, *self._stops}
        for token in ends:
            _clear(words, token)
        if matcher.is_accepting() and position >= self._unstopped:
            for token in self._stops:
                _set(words, token)
        if not words.any():
            words[:] = before
            if matcher.is_accepting() or not before.any():
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
        held = [(row, c) for row, seat in enumerate(seats) if (c := self._seats.get(seat)) and c.holds]
        words = np.zeros((len(held), self._words), np.int32)
        if lines := [(matcher, line) for line, (_, c) in enumerate(held) if (matcher := c.lexing) is not None]:
            self._fill(lines, words)
        for line, (row, constraint) in zip(words, held, strict=True):
            constraint.close(line, positions[row])
        return [row for row, _ in held], words

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

    def _fill(self, lines: list[tuple[LLMatcher, int]], words: Words) -> None:
        """All cores of the machine take part, without Python's lock."""
        self._executor = self._executor or LLExecutor()
        self._executor.unsafe_compute_mask_ptr(lines, words.ctypes.data, 4 * self._words, len(words))


def _set(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _clear(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
