from __future__ import annotations

import torch

from kvasir.kernels.norm import rms_norm


def test_is_torch_s_own_in_float32() -> None:
    x, weight = torch.randn(5, 3, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (64,), weight, 1e-5))


def test_rounds_before_the_weight() -> None:
    """bfloat16: float32 statistics, one rounding, then the product in bfloat16, as Llama was trained."""
    x, weight = torch.randn(7, 96).bfloat16(), torch.randn(96).bfloat16()
    wide = x.float()
    unit = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, unit.bfloat16() * weight, atol=2e-2, rtol=1e-2)
