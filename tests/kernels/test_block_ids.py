"""Content ids by compiled code are those that the engine computes with hashlib."""

from __future__ import annotations

import random
from array import array

import pytest

from kvasir.engine import block_ids
from kvasir.engine.blocks import content_ids, salted, token_bytes
from kvasir.kernels import compiled
from kvasir.kernels.block_ids import BlockIds, load

FOUND = load()


@pytest.fixture
def found() -> BlockIds:
    if FOUND is None:
        pytest.skip("there is no C++ compiler")
    return FOUND


@pytest.mark.parametrize("block_size", [1, 2, 16, 28, 29, 60, 61, 128, 500])
def test_the_same_ids(found: BlockIds, block_size: int) -> None:
    """Around the lengths at which the hash takes one input more: 28 and 60 tokens."""
    draw = random.Random(block_size)
    for blocks in (0, 1, 5):
        tokens = token_bytes([draw.randrange(2**32) for _ in range(block_size * blocks + draw.randrange(block_size))])
        before = draw.randbytes(16)
        assert found.hash(before, tokens, block_size) == b"".join(content_ids(before, tokens, block_size))


def test_the_same_words(found: BlockIds) -> None:
    for ids in ([], [0], [7, 2**31, 2**32 - 1], [*range(1000)]):
        assert found.words(ids) == token_bytes(ids)


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**64, "x", 1.0, None])
def test_what_is_no_token_is_refused_by_both(found: BlockIds, wrong: object) -> None:
    for words in (found.words, token_bytes):
        with pytest.raises((OverflowError, TypeError)):
            words([1, wrong, 2])  # type: ignore[list-item]


def test_without_a_compiler_python_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    assert load() is None
    monkeypatch.setattr(block_ids, "_compiled", lambda: None)
    ids, start = [*range(40)], salted("x")
    assert block_ids.words(ids) == token_bytes(ids)
    assert block_ids.hashed(start, token_bytes(ids), 16) == b"".join(content_ids(start, token_bytes(ids), 16))


def test_any_sequence_has_words() -> None:
    assert block_ids.words((1, 2)) == block_ids.words(array("I", [1, 2])) == token_bytes([1, 2])
