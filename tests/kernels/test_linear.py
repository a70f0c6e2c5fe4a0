from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvasir.kernels.linear import linear, packed
from kvasir.kernels.native import library


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


@pytest.mark.skipif(library() is None, reason="there is no C++ compiler")
def test_what_does_not_fit_is_refused() -> None:
    """Before the kernel reads what isn't there."""
    weight = packed(torch.ones(48, 32), invariant=True)
    assert linear(torch.ones(2, 32), weight, torch.ones(48)).shape == (2, 48)
    with pytest.raises(ValueError, match=r"x\[2, 31\] in torch.float32 by a matrix in torch.float32 with 32 inputs"):
        linear(torch.ones(2, 31), weight)
    with pytest.raises(ValueError, match=r"x\[2, 32\] in torch.bfloat16 by a matrix in torch.float32"):
        linear(torch.ones(2, 32, dtype=torch.bfloat16), weight)
    for bias in (torch.ones(47), torch.ones(48, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"behind a matrix in torch.float32 with 48 outputs"):
            linear(torch.ones(2, 32), weight, bias)
