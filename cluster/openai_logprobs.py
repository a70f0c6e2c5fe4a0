"""Log probabilities in the three shapes that OpenAI and vLLM have for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import orjson

from kvasir.engine.event import TokenLogprob
from kvasir.engine.tokenizer import Tokenizer

LOWEST = -9999.0
"""In place of minus infinity, which JSON doesn't have."""
KEPT = 4096
"""Tokens whose JSON text is kept."""

Json = dict[str, Any]
Scores: TypeAlias = "Sequence[TokenLogprob | None] | None"


class ChatLogprobs:
    """choice.logprobs of chats: one object per token, `top` alternatives each."""

    def __init__(self, tokenizer: Tokenizer | None, top: int) -> None:
        self._tokenizer = tokenizer
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
                best = [_entry(self._tokenizer, other, value) + b"}" for other, value in score.top[: self._top]]
                entry = _entry(self._tokenizer, token, score.logprob)
                content.append(entry + b',"top_logprobs":[' + b",".join(best) + b"]}")
        return b'{"content":[' + b",".join(content) + b'],"refusal":null}'


def _entry(tokenizer: Tokenizer | None, token: int, logprob: float) -> bytes:
    """An object that has no end yet."""
    before, behind = _around(tokenizer, token)
    return before + orjson.dumps(max(logprob, LOWEST)) + behind


@lru_cache(KEPT)
def _around(tokenizer: Tokenizer | None, token: int) -> tuple[bytes, bytes]:
    """What an entry says before and behind its figure."""
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
