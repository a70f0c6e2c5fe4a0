"""Constraint: where one sequence stands in its thoughts and its grammar. It lives on the rank that samples;
tokens alone drive it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from kvasir.engine.grammar import Compiled
from kvasir.engine.step import NewSequence
from kvasir.engine.thoughts import Thinking

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]
RENEWED = 64
"""A grammar is compiled anew for a sequence when it has said so many tokens more."""


Begin = Callable[[Compiled | None, bool], Compiled]
"""A grammar's beginning: another than this one, and for one sequence alone."""


class Constraint:
    """`begin` gives the compiled grammar, once the thoughts are over; None: there are thoughts alone to watch.

    End tokens are allowed exactly where the grammar may end, from min_tokens on. Where nothing else is allowed the
    sequence is over whatever min_tokens and ignore_eos say: `over` is set, and `end` (the model's own end) is what is
    sampled if that is so from the start.
    """

    __slots__ = (
        "_alone", "_begin", "_end", "_grammar", "_left", "_renewed", "_said", "_stops", "ends", "matcher", "over", "thinking",
        "why",
    )  # fmt: skip

    def __init__(self, new: NewSequence, begin: Begin | None, end: int) -> None:
        self.matcher: LLMatcher | None = None
        """Of the answer; before it is known that there are no thoughts, too."""
        self.over = False
        self.why: str | None = None
        """Why no token can be chosen any more, when the grammar's limits are exceeded."""
        self.thinking = Thinking(new.sampling.thoughts) if new.sampling.thoughts is not None else None
        self._begin, self._end = begin, end
        self._grammar: Compiled | None = None
        """`matcher` is a copy of its."""
        self._alone = False
        """Nobody else's is."""
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
        return self.matcher if self.thinking is None or self.thinking.forced is None else None

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
        has been asked for often enough goes beyond it, though each sequence alone stays far below. Where others use up the new
        one as fast, this sequence gets one for itself."""
        early = len(self._said) < self._renewed + RENEWED
        if early and self._alone:
            return False
        spent, said, self._renewed = self.matcher, self._said, len(self._said)
        for alone in (False, True):
            if alone >= (early or self._alone) and self._opens(said, alone):
                return True
        self.matcher, self._said = spent, said
        return False

    def _opens(self, said: list[int], alone: bool) -> bool:
        """Stand behind what was said, in another grammar than this one."""
        self._open(self._grammar, alone)
        self._said = said
        return self.matcher is not None and self.matcher.try_consume_tokens(said) == len(said)

    def _open(self, spent: Compiled | None = None, alone: bool = False) -> None:
        """Stand at the grammar's beginning."""
        assert self._begin is not None
        self._grammar, self._alone = self._begin(spent, alone), alone
        self.matcher, self._said = self._grammar.matcher.deep_copy(), []

    def _consume(self, matcher: LLMatcher, token: int) -> None:
        if token == self._end or (token in self._stops and matcher.is_accepting()):
            self.over = True
        elif matcher.try_consume_tokens([token]):
            self._took(matcher, token)
        elif _is_spent(matcher) and self.renew() and self.matcher is not None:
            self._consume(self.matcher, token)
        else:
            self.why = f"structured output: {matcher.get_error() or f'token {token} does not fit the grammar'}"

    def _took(self, matcher: LLMatcher, token: int) -> None:
        assert self._grammar is not None
        self._grammar.said += 1
        self._said.append(token)
        self.over = matcher.is_stopped()


def _is_spent(matcher: LLMatcher) -> bool:
    """Of one that doesn't take a token: whether its limits are exceeded. A mask says so, a token doesn't."""
    matcher.compute_bitmask()
    return matcher.is_error()


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
        for place, bits in self.places:  # noqa: SIM110  any() of a generator takes four times as long
            if words[row, place] & bits:
                return True
        return False

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


def _set(words: Words, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
