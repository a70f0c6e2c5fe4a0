"""Passages: texts, pairs and token ids as a request for a vector has them. What `LLM` and the gateway share; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.engine.sentence_transformers import TextRules
from kvasir.engine.tokenizer import Tokenizer

TRUNCATE_TO_MODEL = -1
"""truncate_prompt_tokens: as many as the model takes."""
Role = Literal["query", "document"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """What one vector is made of."""

    text: str
    pair: str | None = None
    """Read together with `text` by a cross-encoder: (query, document)."""
    prompt_name: str | None = None
    """Which of the model's prompts stands before it; None: its default."""
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Encoded:
    """A passage in the model's vocabulary."""

    ids: Sequence[int]
    segments: Sequence[int] = ()
    """Of each token, empty when they are all 0."""
    cut: int = 0
    """Tokens that were left out."""


def encode_passage(
    passage: Passage | Sequence[int],
    tokenizer: Tokenizer | None,
    rules: TextRules,
    *,
    limit: int,
    truncate: int | None = None,
    param: str = "input",
) -> Encoded:
    """`truncate`: keep only so many tokens from the beginning, -1: as many as the model takes. ContextLengthError when
    there are more than `limit` and nobody asked for that."""
    kept = _kept(truncate, limit)
    if not isinstance(passage, Passage):
        ids = passage if kept is None else passage[:kept]
        return _checked(Encoded(ids, cut=len(passage) - len(ids)), limit, param)
    if tokenizer is None:
        raise ClientError("texts need a tokenizer, but the model is served without one; send token ids", param=param)
    text = passage.text if passage.pair is not None else rules.apply(passage.text, passage.prompt_name)
    ids, segments, cut = tokenizer.encode_within(
        text, passage.pair, limit=kept, add_special_tokens=passage.add_special_tokens
    )
    return _checked(Encoded(ids, segments if any(segments) else (), cut), limit, param)


def role_passage(text: str, role: Role, rules: TextRules) -> Passage:
    """A text that is to be compared with others, behind the model's prompt for its role if there is one; as
    sentence-transformers' encode_query and encode_document choose it."""
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    return Passage(text=text, prompt_name=next((name for name in names if name in rules.prompts), None))


def similarity(a: Sequence[float], b: Sequence[float], kind: Literal["cosine", "dot"]) -> float:
    """How alike two texts are by their vectors."""
    left, right = np.asarray(a), np.asarray(b)
    product = float(left @ right)
    return product if kind == "dot" else product / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-12)


def as_float32(values: Sequence[float]) -> npt.NDArray[np.float32]:
    """A vector of float32's own precision, little-endian: as text it takes half the digits of the same numbers in double."""
    return np.asarray(values, "<f4")


def _kept(truncate: int | None, limit: int) -> int | None:
    if truncate is None:
        return None
    if truncate == TRUNCATE_TO_MODEL:
        return limit
    if not 1 <= truncate <= limit:
        text = f"truncate_prompt_tokens must be -1 or 1 to {limit} (the model's limit), got {truncate}"
        raise ClientError(text, param="truncate_prompt_tokens")
    return truncate


def _checked(encoded: Encoded, limit: int, param: str) -> Encoded:
    count = len(encoded.ids)
    if not count:
        raise ClientError(f"{param} must hold at least one token", param=param)
    if count > limit:
        what = f"{param} has {count} tokens and the model takes {limit} (--max-model-len)"
        raise ContextLengthError(
            f"{what}; shorten it or send truncate_prompt_tokens: -1 (Ollama: truncate: true)", param=param
        )
    return encoded
