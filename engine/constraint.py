"""Constraint: where one sequence stands in its thoughts and its grammar. It lives on the rank that samples;
tokens alone drive it.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from kvasir.engine.cores import usable_cores
from kvasir.engine.step import NewSequence
from kvasir.engine.thoughts import Thinking

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]
ALONE_S = 3e-4
"""Masks that take one thread no longer are made by it alone."""
RENEWED = 64
"""A grammar is compiled anew for a sequence when it has said so many tokens more."""
WORKERS = min(32, usable_cores() * 4 // 5)
"""Threads that make the others; where it is one, that has to be woken first, the thread that asks is sooner done."""


class Constraint:
    """`begin` gives the compiled grammar, once the thoughts are over, and another than the one it is told; None: there are
    thoughts alone to watch.

    End tokens are allowed exactly where the grammar may end, from min_tokens on. Where nothing else is allowed the
    sequence is over whatever min_tokens and ignore_eos say: `over` is set, and `end` (the model's own end) is what is
    sampled if that is so from the start.
    """

    __slots__ = (
        "_begin", "_end", "_grammar", "_left", "_renewed", "_said", "_stops", "ends", "matcher", "over", "thinking", "why",
    )  # fmt: skip

    def __init__(self, new: NewSequence, begin: Callable[[LLMatcher | None], LLMatcher] | None, end: int) -> None:
        self.matcher: LLMatcher | None = None
        """Of the answer; before it is known that there are no thoughts, too."""
        self.over = False
        self.why: str | None = None
        """Why no token can be chosen any more, when the grammar's limits are exceeded."""
        self.thinking = Thinking(new.sampling.thoughts) if new.sampling.thoughts is not None else None
        self._begin, self._end = begin, end
        self._grammar: LLMatcher | None = None
        """What `matcher` is a copy of."""
        self._said: list[int] = []
        """What `matcher` has taken in."""
        self._renewed = -RENEWED
        """Tokens of these when the grammar was compiled anew."""
        self._stops = tuple(new.stop_token_ids)
        self.ends = ends_of(end, self._stops)
        self._left = new.sampling.min_tokens
        """Outputs that are missing before it may end."""
        if begin is not None and (self.thinking is None or self.thinking.opening):
            self._open()
        for token in new.token_ids[new.prompt_len :]:
            self.advance(token)

    @property
    def holds(self) -> bool:
        """Not every token may come next."""
        if self.why is not None:
            return False
        if self.matcher is not None:
            return True
        thinking = self.thinking is not None and not self.thinking.over
        return thinking and (self._begin is not None or self.forced is not None)

    @property
    def forced(self) -> int | None:
        """The one token that may come next, by the thoughts' marks."""
        return self.thinking.forced if self.thinking is not None else None

    @property
    def lexing(self) -> LLMatcher | None:
        """What makes the mask. When the grammar is over from the start, the model's end is what it makes."""
        return self.matcher if self.forced is None else None

    @property
    def may_end(self) -> bool:
        """Its grammar may, and it has outputs enough."""
        return self._left <= 0 and self.matcher is not None and self.matcher.is_accepting()

    def advance(self, token: int) -> None:
        """A token was sampled. One that follows the end, when that wasn't known yet, means nothing."""
        if self.over or self.why is not None:
            return
        self._left -= 1
        if self.thinking is None or self.thinking.over:
            if self.matcher is not None:
                self._consume(self.matcher, token)
            return
        answer = self.thinking.advance(token)
        if self.thinking.inside:
            self.matcher, self._said = None, []
        elif self.thinking.over and self.matcher is None and self._begin is not None:
            self._open()
        for one in answer:
            if self.matcher is not None:
                self._consume(self.matcher, one)

    def fitting(self, drafted: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other, without saying them: for speculation, whose drafts need
        no look at a model where they can't be. Where thoughts are about to begin, none."""
        drafted = list(itertools.takewhile(lambda token: token != self._end and token not in self._stops, drafted))
        if self.over or self.why is not None:
            return 0
        if self.thinking is None or self.thinking.over:
            return len(drafted) if self.matcher is None else self.matcher.validate_tokens(drafted)
        thinking, count = copy.deepcopy(self.thinking), 0
        for token in drafted:
            if not thinking.inside or thinking.forced not in (None, token):
                break
            thinking.advance(token)
            count += 1
        return count

    def take(self, token: int) -> bool:
        """`advance` by this token if it `fits`: one call of the library instead of two. False: nothing was taken in."""
        if self.over or self.why is not None:
            return False
        matcher = self.matcher
        if matcher is None or token in self.ends.tokens or not (self.thinking is None or self.thinking.over):
            if fits := self.fits(token):
                self.advance(token)
            return fits
        if not matcher.try_consume_tokens([token]):
            return False
        self._left -= 1
        self._took(matcher, token)
        return True

    def fits(self, token: int) -> bool:
        """Whether the mask surely has it, without making one. An end that nothing but the mask allows isn't sure."""
        if (thinking := self.thinking) is not None and not thinking.over:
            if (forced := thinking.forced) is not None:
                return token == forced
            if thinking.opening and token == thinking.first:
                return True
        if token == self._end or token in self._stops:
            return token in self._stops and self.may_end
        return self.matcher is None or self.matcher.validate_tokens([token]) == 1

    def fill(self, words: Words) -> None:
        """The whole mask words[W]."""
        if self.lexing is not None:
            self.lexing.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self.close(words)

    def close(self, words: Words) -> None:
        """Of the library's mask words[W], or one of zeros: what else holds, ends where they may be, and at least one token."""
        if (forced := self.forced) is not None:
            words[:] = 0
            _set(words, forced)
            return
        if self.matcher is None:  # in thoughts, which an answer must follow
            self.ends.bar(words)
            return
        self.ends.close(words, self)
        if self.thinking is not None and self.thinking.opening:
            _set(words, self.thinking.first)

    def renew(self) -> bool:
        """Go on with a grammar that is compiled anew, where this one is. False: that doesn't help.

        All copies of a grammar share the states that their lexer came to, whatever the sequence, and the limit of these: what
        has been asked for often enough goes beyond it, though each sequence alone stays far below."""
        if len(self._said) < self._renewed + RENEWED:
            return False
        spent, said, self._renewed = self.matcher, self._said, len(self._said)
        self._open(self._grammar)
        if self.matcher is not None and self.matcher.try_consume_tokens(said) == len(said):
            self._said = said
            return True
        self.matcher, self._said = spent, said
        return False

    def _open(self, spent: LLMatcher | None = None) -> None:
        """Stand at the grammar's beginning."""
        assert self._begin is not None
        self._grammar = self._begin(spent)
        self.matcher, self._said = self._grammar.deep_copy(), []

    def _consume(self, matcher: LLMatcher, token: int) -> None:
        if token == self._end or (token in self._stops and matcher.is_accepting()):
            self.over = True
        elif matcher.consume_token(token):
            self._took(matcher, token)
        elif matcher.is_error() and self.renew() and self.matcher is not None:
            self._consume(self.matcher, token)
        else:
            self.why = f"structured output: {matcher.get_error() or f'token {token} does not fit the grammar'}"

    def _took(self, matcher: LLMatcher, token: int) -> None:
        self._said.append(token)
        if not matcher.is_stopped():
            return
        if not matcher.is_error():
            self.over = True
        elif not self.renew():
            self.why = f"structured output: {matcher.get_error()}"
        elif self.matcher is not None and self.matcher.is_stopped():
            self.over = True


@dataclass(frozen=True, eq=False)
class Ends:
    """The tokens that end some constraints: the model's own, which is sampled where nothing else is left, and the stops."""

    end: int
    stops: tuple[int, ...]
    tokens: frozenset[int] = field(init=False)
    places: tuple[tuple[int, int], ...] = field(init=False)
    """Words of a mask that hold one, each with those one's bits."""
    stop_places: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", frozenset({self.end, *self.stops}))
        for prefix, tokens in (("", self.tokens), ("stop_", set(self.stops))):
            found: dict[int, int] = {}
            for token in tokens:
                found[token // 32] = found.get(token // 32, 0) | 1 << token % 32
            signed = tuple((place, bits - (bits >> 31 << 32)) for place, bits in found.items())
            object.__setattr__(self, f"{prefix}places", signed)

    def bar(self, mask: Words) -> None:
        """Everything else is allowed by mask[W]."""
        mask[:] = -1
        for place, bits in self.places:
            mask[place] &= ~bits

    def among(self, words: memoryview, row: int) -> bool:
        """Whether words[R, W] allow any of them in this row."""
        return any(words[row, place] & bits for place, bits in self.places)

    def close(self, mask: Words, constraint: Constraint) -> None:
        """Of a grammar's mask[W]: ends are allowed where they may be, and where nothing else is what was there before.

        A few words: numbers of Python's are sooner done than arrays. Where a grammar may end the library allows the model's
        end, so a mask without any end is as it should be."""
        words = memoryview(mask)  # type: ignore[arg-type]
        before = [words[place] for place, _ in self.places]
        for place, bits in self.places:
            words[place] &= ~bits
        if self.stops and constraint.may_end:
            for place, bits in self.stop_places:
                words[place] |= bits
        if np.count_nonzero(mask):
            return
        for (place, _), word in zip(self.places, before, strict=True):
            words[place] = word
        matcher = constraint.matcher
        assert matcher is not None
        if matcher.is_accepting():
            _set(mask, self.end)
        elif matcher.is_error():  # the library says so by the model's end, at which the sequence would seem to be whole
            if constraint.renew():
                constraint.fill(mask)
                return
            constraint.why = f"structured output: {matcher.get_error()}"
            self.bar(mask)


@lru_cache(256)
def ends_of(end: int, stops: tuple[int, ...]) -> Ends:
    """The same object for the same tokens."""
    return Ends(end, stops)


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


def _set(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
