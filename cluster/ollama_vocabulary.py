"""A tokenizer's vocabulary by the names of GGUF files, which /api/show tells with `verbose`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from kvasir.engine.tokenizer import Tokenizer

Json = dict[str, Any]
PREFIX = "tokenizer.ggml."
UNTOLD: Json = {f"{PREFIX}{name}": None for name in ("merges", "token_type", "tokens")}
"""What stands there without `verbose`: megabytes of it are seldom wanted."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6


def vocabulary(tokenizer: Tokenizer) -> Json:
    """All of it: tokens, what each is, scores or merges."""
    whole = tokenizer.definition()
    model = whole["model"]
    given = model.get("vocab", {})
    scored = isinstance(given, list)  # a unigram model's: pairs of a token and its score, in order
    words = dict(enumerate(token for token, _ in given)) if scored else {id_: token for token, id_ in given.items()}
    added = {entry["id"]: entry for entry in whole.get("added_tokens", ())}
    words |= {id_: entry["content"] for id_, entry in added.items()}
    falls_back = bool(model.get("byte_fallback"))
    tokens = [words.get(id_) for id_ in range(max(words, default=-1) + 1)]
    types = [_type(token, added.get(id_), falls_back) for id_, token in enumerate(tokens)]
    found: Json = {
        "model": _name(str(model.get("type", "")), falls_back),
        "tokens": [f"[PAD{id_}]" if token is None else token for id_, token in enumerate(tokens)],
        "token_type": types,
        "merges": [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", ())],
    }
    if scored:
        found["scores"] = [score for _, score in given] + [0.0] * (len(tokens) - len(given))
    return {PREFIX + name: value for name, value in found.items()}


def written_vocabulary(tokenizer: Tokenizer) -> Mapping[str, orjson.Fragment]:
    """The same as JSON, megabytes of it, kept: it takes a fifth of a second, in which other threads get little done. Who asks
    meanwhile waits for it."""
    with _writing:
        return _written(tokenizer)


_writing = threading.Lock()


@lru_cache(4)
def _written(tokenizer: Tokenizer) -> Mapping[str, orjson.Fragment]:
    return {name: orjson.Fragment(orjson.dumps(value)) for name, value in vocabulary(tokenizer).items()}


def _name(kind: str, falls_back: bool) -> str:
    """What llama.cpp calls it."""
    if kind == "BPE":
        return "llama" if falls_back else "gpt2"
    return {"Unigram": "t5", "WordPiece": "bert"}.get(kind, kind.lower())


def _type(token: str | None, added: Json | None, falls_back: bool) -> int:
    if token is None:
        return _UNUSED
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    return _BYTE if falls_back and len(token) == 6 and token.startswith("<0x") else _NORMAL
