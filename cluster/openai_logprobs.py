"""Log probabilities in the three shapes that OpenAI and vLLM have for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, proxy

import orjson

from kvasir.engine.event import TokenLogprob
from kvasir.engine.tokenizer import Tokenizer

LOWEST = -9999.0
"""In place of minus infinity, which JSON doesn't have."""
KEPT = 4096
"""Tokens whose JSON text is kept, of each tokenizer."""

Json = dict[str, Any]
Scores: TypeAlias = "Sequence[TokenLogprob | None] | None"
Around = Callable[[int], tuple[bytes, bytes]]
"""Token -> what its entry says before and behind the figure."""

_known: WeakKeyDictionary[Tokenizer, Around] = WeakKeyDictionary()
"""Remembers what it has said; goes with the tokenizer."""


class ChatLogprobs:
    """choice.logprobs of chats: one object per token, `top` alternatives each."""

    def __init__(self, tokenizer: Tokenizer | None, top: int) -> None:
        self._tokenizer = tokenizer  # lives as long as what is known of it is needed
        self._around = _around_of(tokenizer)
        self._top = top

    def json(self, ids: Sequence[int], scores: Scores) -> Json | None:
        found: Json | None = orjson.loads(self.encoded(ids, scores))
        return found

    def encoded(self, ids: Sequence[int], scores: Scores) -> bytes:
        """As JSON text. All but the figures is the same wherever a token is met."""
        if scores is None:
            return b"null"
        content = []
        for token, score in zip(ids, scores, strict=False):
            if score is not None:
                best = [self._entry(other, value) + b"}" for other, value in score.top[: self._top]]
                entry = self._entry(token, score.logprob)
                content.append(entry + b',"top_logprobs":[' + b",".join(best) + b"]}")
        return b'{"content":[' + b",".join(content) + b'],"refusal":null}'

    def _entry(self, token: int, logprob: float) -> bytes:
        """An object that has no end yet."""
        before, behind = self._around(token)
        return before + orjson.dumps(max(logprob, LOWEST)) + behind


def _around_of(tokenizer: Tokenizer | None) -> Around:
    if tokenizer is None:
        return partial(_around, None)
    if (found := _known.get(tokenizer)) is None:
        found = _known[tokenizer] = lru_cache(KEPT)(partial(_around, proxy(tokenizer)))
    return found


def _around(tokenizer: Tokenizer | None, token: int) -> tuple[bytes, bytes]:
    data = list(tokenizer.token_bytes(token)) if tokenizer else []
    text = orjson.dumps(token_text(tokenizer, token))
    return b'{"token":' + text + b',"logprob":', b',"bytes":' + orjson.dumps(data)


class CompletionLogprobs:
    """choice.logprobs of completions: parallel lists. Counts the offsets into the choice's text."""

    def __init__(self, tokenizer: Tokenizer | None, top: int | None) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def json(self, ids: Sequence[int], scores: Scores) -> Json | None:
        if scores is None or self._top is None:
            return None
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, score in zip(ids, scores, strict=False):
            text = token_text(self._tokenizer, token)
            out["tokens"].append(text)
            out["token_logprobs"].append(None if score is None else max(score.logprob, LOWEST))
            out["top_logprobs"].append(None if score is None else self._best(token, score))
            out["text_offset"].append(self._offset)
            self._offset += len(text)
        return out

    def _best(self, token: int, score: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the sampled one; of tokens with the same text the more likely one."""
        best: dict[str, float] = {}
        for other, value in (*score.top[: self._top], (token, score.logprob)):
            best.setdefault(token_text(self._tokenizer, other), max(value, LOWEST))
        return best


def prompt_logprobs_json(tokenizer: Tokenizer | None, ids: Sequence[int], scores: Scores) -> list[Json | None]:
    """vLLM's shape: for each prompt token {id: {logprob, rank, decoded_token}} of it and of the most likely ones."""
    out: list[Json | None] = []
    for token, score in zip(ids, scores or (), strict=False):
        if score is None:
            out.append(None)
            continue
        ranked = [(token, score.logprob, score.rank)]
        ranked += [(other, value, rank) for rank, (other, value) in enumerate(score.top, 1) if other != token]
        out.append({str(one): _scored(tokenizer, one, value, rank) for one, value, rank in ranked})
    return out


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """The token as text; its id where there is no tokenizer."""
    return tokenizer.token_text(token) if tokenizer else f"token_id:{token}"


def _scored(tokenizer: Tokenizer | None, token: int, logprob: float, rank: int) -> Json:
    return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": token_text(tokenizer, token)}
