"""Words: texts that a request names, as the token sequences that write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvasir.engine.errors import UnsupportedError
from kvasir.engine.request import SamplingParams
from kvasir.engine.tokenizer import Tokenizer

Spellings = tuple[tuple[int, ...], ...]
_BEFORE = ("", " ", "\n", "a", ".")
"""What may stand before a word: tokenizers write it differently at the start of a text, behind a space and inside."""


class Words:
    """`tokenizer` is called when the first text is asked for."""

    def __init__(self, tokenizer: Callable[[], Tokenizer | None]) -> None:
        self._load = tokenizer
        self._tokenizer: Tokenizer | None = None

    def check(self, sampling: SamplingParams) -> None:
        """UnsupportedError when `sampling` names texts and there is no tokenizer."""
        for name, given in (("bad_words", sampling.bad_words), ("penalize_newline", not sampling.penalize_newline)):
            if given:
                self._needed(name)

    def barred(self, sampling: SamplingParams) -> Spellings:
        """Token sequences that write the bad words."""
        found = (spelling for word in sampling.bad_words for spelling in self._spellings("bad_words", word))
        return tuple(dict.fromkeys(found))

    def newlines(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that write a line break, when those aren't to be penalised."""
        if sampling.penalize_newline:
            return frozenset()
        return frozenset(spelling[0] for spelling in self._spellings("penalize_newline", "\n") if len(spelling) == 1)

    def _spellings(self, name: str, word: str) -> list[tuple[int, ...]]:
        tokenizer = self._needed(name)
        found = [(*tokenizer.encode(word, add_special_tokens=False),)]
        for before in _BEFORE:
            found += _behind(tokenizer, before, before + word)
            if not word.startswith(" "):
                found += _behind(tokenizer, before, f"{before} {word}")
        return [spelling for spelling in found if spelling]

    def _needed(self, name: str) -> Tokenizer:
        self._tokenizer = self._tokenizer or self._load()
        if self._tokenizer is None:
            text = f"{name} needs the model's tokenizer, but skip_tokenizer_init is set; name tokens instead"
            raise UnsupportedError(text, param=name)
        return self._tokenizer


def _behind(tokenizer: Tokenizer, before: str, text: str) -> list[tuple[int, ...]]:
    """The tokens of `text` behind those of `before`, unless a token holds some of both."""
    head, ids = (tokenizer.encode(part, add_special_tokens=False) for part in (before, text))
    return [_tail(head, ids)] if ids[: len(head)] == head else []


def _tail(head: Sequence[int], ids: Sequence[int]) -> tuple[int, ...]:
    return (*ids[len(head) :],)
