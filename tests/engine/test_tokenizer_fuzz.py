"""Any bytes, any ids and every Unicode block, through every kind of tokenizer: no text is lost, doubled or torn."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.engine.gguf import read_gguf
from kvasir.engine.tokenizer import Tokenizer

LOSSLESS = ["byte_level", "sentencepiece", "no_prefix", "unigram"]
KINDS = [*LOSSLESS, "wordpiece"]
PEOPLED = 0x33000
"""Characters up to here mean something; of the four fifths behind them, which are alike, one in sixteen is tried."""
STEP = 7
"""Of so many characters one is tried; the smallest of Unicode's blocks hold 16. (None is U+2581, SentencePiece's space.)"""


@pytest.fixture(scope="module")
def kinds(data: Callable[[str], Path]) -> dict[str, Tokenizer]:
    def vocabulary(name: str, **more: Any) -> Tokenizer:
        return Tokenizer.from_gguf(
            {**read_gguf(data(f"tokenizers-gguf-vocab/ggml-vocab-{name}.gguf")).metadata, **more}
        )

    return {
        "byte_level": vocabulary("gpt-2"),
        "sentencepiece": vocabulary("phi-3", **{"general.name": ""}),
        "no_prefix": vocabulary("phi-3", **{"general.name": "", "tokenizer.ggml.add_space_prefix": False}),
        "unigram": Tokenizer.from_gguf(_unigram()),
        "wordpiece": vocabulary("bert-bge"),
    }


def _unigram() -> dict[str, Any]:
    """A small unigram vocabulary with byte tokens."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "ing", "日本", "é", "▁▁", "🙂"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    scores = [0.0] * 3 + [-20.0] * 256 + [-float(i + 2) for i in range(len(words))]
    fields = {
        "model": "t5",
        "tokens": tokens,
        "token_type": types,
        "scores": np.array(scores, np.float32),
        "unknown_token_id": 0,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _streamed(tokenizer: Tokenizer, ids: list[int], chunk: int, prompt: list[int], **options: bool) -> str:
    stream = tokenizer.stream(prompt, **options)
    return "".join(stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)) + stream.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]

    @settings(max_examples=examples(60))
    @given(raw=st.binary(max_size=60), chunk=st.integers(1, 4))
    def check(raw: bytes, chunk: int) -> None:
        text = raw.decode(errors="replace")
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert _streamed(tokenizer, ids, chunk, [], skip_special_tokens=False) == whole
        if kind in LOSSLESS:
            assert whole == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    ids_lists = st.lists(st.integers(-2, tokenizer.vocab_size + 3) | st.integers(0, 300), max_size=30)

    @settings(max_examples=examples(60))
    @given(ids=ids_lists, chunk=st.integers(1, 5), cut=st.integers(0, 10), skip=st.booleans(), spaces=st.booleans())
    def check(ids: list[int], chunk: int, cut: int, skip: bool, spaces: bool) -> None:
        options = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
        whole = _streamed(tokenizer, ids, len(ids) or 1, [], **options)
        assert _streamed(tokenizer, ids, chunk, [], **options) == whole
        if skip or spaces:
            assert tokenizer.decode(ids, skip) == whole
        before = tokenizer.stream(**options).push(ids[:cut])  # half a character at its end belongs to what follows
        assert before + _streamed(tokenizer, ids[cut:], chunk, ids[:cut], **options) == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_unicode_block(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    draw = random.Random(0)
    for start in (*range(0, PEOPLED, 256), *range(PEOPLED, 0x110000, 16 * 256)):
        if 0xD800 <= start < 0xE000:
            continue  # surrogates are no characters
        text = "".join(draw.choice(["", " ", "the ", "\n"]) + chr(code) for code in range(start, start + 256, STEP))
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert _streamed(tokenizer, ids, 3, [], skip_special_tokens=False) == whole
        if kind in LOSSLESS:
            assert whole == text, hex(start)
