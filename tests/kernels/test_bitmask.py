from __future__ import annotations

import numpy as np
import pytest
import torch

from kvasir.kernels.bitmask import allow


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100, 3072, 5001])
@pytest.mark.parametrize("rows", [[], [1], [0, 2, 3], [3, 0, 1, 2]])
def test_tokens_whose_bit_is_missing_are_barred(vocab: int, rows: list[int]) -> None:
    draw = np.random.default_rng(vocab)
    logits = torch.randn(4, vocab)
    allowed = draw.random((len(rows), vocab)) < draw.random((len(rows), 1))
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little")
    masks = torch.from_numpy(packed.view(np.int32)) if rows else torch.zeros(0, 0, dtype=torch.int32)
    expected = logits.clone()
    for row, line in zip(rows, torch.from_numpy(allowed), strict=True):
        expected[row, ~line] = -torch.inf
    for implementation in (allow, allow.reference):
        if rows or implementation is allow:
            assert implementation(logits, torch.tensor(rows, dtype=torch.int64), masks).equal(expected)
        assert not logits.isinf().any()


def test_rows_that_lie_apart_and_other_types() -> None:
    wide = torch.randn(6, 200)
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 4), dtype=torch.int32)
    for logits in (wide[::2, :100], wide[:3, :100].T.contiguous().T, wide[:3, :100].double()):
        rows = torch.tensor([2, 0])
        assert allow(logits, rows, mask).equal(allow.reference(logits, rows, mask))
