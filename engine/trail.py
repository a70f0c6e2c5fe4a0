"""Trail: the tokens of one sequence, for the rules that look back at some of them. Tokens alone drive it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from kvasir.engine.words import Spellings

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Trail:
    """Which token would complete a barred sequence, and what the penalties' window holds.

    `window` is how many of the newest tokens count, None: all; tokens in `spared` never do.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        prompt_len: int,
        *,
        barred: Spellings = (),
        window: int | None = None,
        spared: Collection[int] = (),
    ) -> None:
        self.tokens = list(token_ids)
        self._prompt_len, self._window, self._spared = prompt_len, window, spared
        self._always = sorted({spelling[0] for spelling in barred if len(spelling) == 1})
        self._behind: dict[int, list[Sequence[int]]] = {}
        """token -> barred sequences in which it is the last but one"""
        for spelling in barred:
            if len(spelling) > 1:
                self._behind.setdefault(spelling[-2], []).append(spelling)

    def barred(self) -> list[int]:
        """Tokens that would complete a barred sequence."""
        tokens = self.tokens
        found = self._always
        for spelling in self._behind.get(tokens[-1], ()) if tokens else ():
            before = len(spelling) - 1
            if tuple(tokens[-before:]) == tuple(spelling[:-1]):
                found = [*found, spelling[-1]]
        return found

    def counted(self) -> tuple[Ints, Ints, Bools]:
        """(distinct tokens of the window, how often each is in the output, whether each is in the prompt)."""
        start = 0 if self._window is None else max(0, len(self.tokens) - self._window)
        border = max(start, self._prompt_len)
        prompt, output = (np.array(part, np.int64) for part in (self.tokens[start:border], self.tokens[border:]))
        ids = np.union1d(prompt, output).astype(np.int64)
        if self._spared:
            ids = ids[~np.isin(ids, list(self._spared))]
        found, times = np.unique(output, return_counts=True)
        counts = np.zeros(len(ids), np.int64)
        counts[np.isin(ids, found)] = times[np.isin(found, ids)]
        return ids, counts, np.isin(ids, prompt)
