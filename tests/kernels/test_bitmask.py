from __future__ import annotations

import numpy as np
import pytest
import torch

from kvasir.kernels.bitmask import allow, bar, best_allowed


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100, 3072, 5001])
@pytest.mark.parametrize("rows", [[], [1], [0, 2, 3], [3, 0, 1, 2]])
def test_tokens_whose_bit_is_missing_are_barred(vocab: int, rows: list[int]) -> None:
    draw = np.random.default_rng(vocab)
    logits = torch.randn(4, vocab)
    allowed = draw.random((len(rows), vocab)) < draw.random((len(rows), 1))
    allowed |= np.repeat(draw.random((len(rows), -(-vocab // 32))) < 0.3, 32, 1)[:, :vocab]
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little")
    masks = torch.from_numpy(packed.view(np.int32)) if rows else torch.zeros(0, 0, dtype=torch.int32)
    expected = logits.clone()
    for row, line in zip(rows, torch.from_numpy(allowed), strict=True):
        expected[row, ~line] = -torch.inf
    for implementation in (allow, allow.reference):
        if rows or implementation is allow:
            assert implementation(logits, torch.tensor(rows, dtype=torch.int64), masks).equal(expected)
        assert not logits.isinf().any()
    for implementation in (bar, bar.reference):
        if rows or implementation is bar:
            written = torch.full((4, vocab + 3), 7.0)
            written[:, :vocab] = logits
            assert implementation(written[:, :vocab], torch.tensor(rows, dtype=torch.int64), masks).equal(expected)
            assert written[:, :vocab].equal(expected)
            assert (written[:, vocab:] == 7).all()


def test_rows_that_lie_apart_and_other_types() -> None:
    wide = torch.randn(6, 200)
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 4), dtype=torch.int32)
    for logits in (wide[::2, :100], wide[:3, :100].T.contiguous().T, wide[:3, :100].double()):
        rows = torch.tensor([2, 0])
        assert allow(logits, rows, mask).equal(allow.reference(logits, rows, mask))


@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 100, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_what_is_allowed(vocab: int, dtype: torch.dtype) -> None:
    """The first of several, wherever they lie; rows of which all is -inf too."""
    draw = np.random.default_rng(vocab)
    logits = torch.from_numpy(draw.integers(-3, 4, (6, vocab)).astype(np.float32)).to(dtype)
    logits[1], logits[2, vocab // 2 :], logits[3] = -torch.inf, -torch.inf, -0.0
    allowed = draw.random((5, vocab)) < np.array([[0.9], [0.5], [0.5], [0.1], [0.02]])
    for row, whole in ((0, True), (3, False)):  # words of which all bits are set, or none
        allowed[row, np.repeat(draw.random(-(-vocab // 32)) < 0.5, 32)[:vocab]] = whole
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little")
    masks, rows = torch.from_numpy(packed.view(np.int32)), torch.tensor([5, 1, 2, 3, 0])
    expected = allow.reference(logits, rows, masks)[rows].argmax(-1)
    for implementation in (best_allowed, best_allowed.reference):
        assert implementation(logits, rows, masks).equal(expected)
        assert implementation(logits.T.contiguous().T, rows, masks).equal(expected)
