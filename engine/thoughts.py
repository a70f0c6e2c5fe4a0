"""Thoughts: where in its output a model thinks before it answers. A grammar leaves them alone, a budget ends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir.engine.errors import ClientError

MAX_MARK = 16
"""Tokens of a mark."""


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """Marks by which a model's thoughts are told from its answer, as token ids."""

    begin: Sequence[int] = ()
    """An output that begins so has thoughts, any other has none; empty: the prompt has begun them."""
    end: Sequence[int]
    budget: int | None = None
    """Tokens of thoughts after which `end` is made to follow; None: as many as the model likes."""

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            mark = tuple(getattr(self, name))
            object.__setattr__(self, name, mark)
            if len(mark) > MAX_MARK or (name == "end" and not mark):
                raise ClientError(f"thoughts.{name} is 1 to {MAX_MARK} token ids, got {len(mark)}", param="thoughts")
            if not all(isinstance(token, int) and token >= 0 for token in mark):
                raise ClientError(f"thoughts.{name} holds token ids, got {mark!r:.60}", param="thoughts")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 0):
            raise ClientError(f"thoughts.budget must be at least 0, got {self.budget!r:.60}", param="thoughts")


class Thinking:
    """Where one sequence stands in its thoughts; its tokens alone drive it."""

    def __init__(self, thoughts: Thoughts) -> None:
        self._thoughts = thoughts
        self.opening = bool(thoughts.begin)
        """Nothing says yet whether there are thoughts."""
        self.inside = not self.opening
        self._said: list[int] = []
        self._count = 0

    @property
    def over(self) -> bool:
        """What follows is the answer."""
        return not (self.opening or self.inside)

    @property
    def first(self) -> int:
        """The token with which thoughts begin."""
        return self._thoughts.begin[0]

    @property
    def forced(self) -> int | None:
        """The one token that may come next, if so."""
        begin, end, budget = self._thoughts.begin, self._thoughts.end, self._thoughts.budget
        if self.opening:
            return begin[len(self._said)] if self._said else None
        if self.inside and budget is not None and self._count >= budget:
            return end[self._matched()]
        return None

    def advance(self, token: int) -> list[int]:
        """A token was made. Returns those that belong to the answer after all: there were no thoughts."""
        self._said.append(token)
        if self.opening:
            begin = self._thoughts.begin
            if tuple(self._said) == tuple(begin[: len(self._said)]):
                if len(self._said) == len(begin):
                    self.opening, self.inside, self._said = False, True, []
                return []
            self.opening = False
            return self._said
        self._count += 1
        self._said = self._said[-len(self._thoughts.end) :]
        if tuple(self._said) == tuple(self._thoughts.end):
            self.inside = False
        return []

    def _matched(self) -> int:
        """How much of the end mark the last tokens are."""
        end = tuple(self._thoughts.end)
        for size in range(min(len(end) - 1, len(self._said)), 0, -1):
            if tuple(self._said[-size:]) == end[:size]:
                return size
        return 0
