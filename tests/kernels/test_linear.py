from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvasir.kernels.linear import linear, packed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_equals_plain(dtype: torch.dtype, tolerance: float, rows: int, biased: bool) -> None:
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(33, 64).to(dtype)
    bias = torch.randn(33).to(dtype) if biased else None
    want = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    for w in (weight, packed(weight)):
        got = linear(x, w, bias)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=1e-2)
