from __future__ import annotations

import torch

from kvasir.kernels.rope import rope_angles, rotate


def test_rotates_pairs_like_complex_numbers() -> None:
    """(x[i], x[i + D / 2]) as one complex number, times e^(i position frequency)."""
    x, positions, frequencies = torch.randn(6, 3, 8), torch.tensor([0, 1, 2, 100, 7, 3]), torch.rand(4)
    turned = (
        torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(6, 4), positions[:, None] * frequencies)[:, None]
    )
    got = rotate(x, *rope_angles(positions, frequencies, torch.float32))
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1))


def test_angles_are_float32_until_the_end() -> None:
    """bfloat16 positions would be wrong from 257 on."""
    cos, sin = rope_angles(torch.tensor([4097]), torch.tensor([1.0]), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    angle = torch.tensor(4097.0)
    torch.testing.assert_close(cos.flatten()[0], angle.cos().bfloat16())
    torch.testing.assert_close(sin.flatten(), torch.stack((-angle.sin(), angle.sin())).bfloat16())
