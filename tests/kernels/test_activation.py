from __future__ import annotations

import pytest
import torch

from kvasir.kernels.activation import gated


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ],
)
def test_gate_first_up_second(name: str, formula: object) -> None:
    x = torch.randn(5, 12)
    torch.testing.assert_close(gated(x, name), formula(x[:, :6]) * x[:, 6:])  # type: ignore[operator]
