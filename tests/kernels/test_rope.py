"""Rotation of pairs, as complex numbers would turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Dial, Turning, rope_angles, rotate


def rows(positions: list[int]) -> Ragged:
    """A step over rows at these positions; nothing else of it matters here."""
    none: Any = torch.empty(0)
    return Ragged(torch.tensor(positions), none, none, none, none, np.empty(0, np.int32), np.empty(0, np.int32))


POSITIONS = [0, 1, 2, 100, 7, 3]
PLAIN = Turning(torch.tensor([1.0, 0.3, 0.1, 0.01]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_pairs_like_complex_numbers(interleaved: bool) -> None:
    x = torch.randn(6, 3, 8)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    turns = torch.polar(torch.ones(6, 4), torch.tensor(POSITIONS)[:, None] * PLAIN.frequencies)
    want = torch.complex(first, second) * turns[:, None]
    got = rotate(
        x, rope_angles(rows(POSITIONS), PLAIN, PLAIN, x.dtype, interleaved=interleaved), interleaved=interleaved
    )
    first, second = (got[..., ::2], got[..., 1::2]) if interleaved else (got[..., :4], got[..., 4:])
    torch.testing.assert_close(torch.complex(first, second), want, atol=1e-5, rtol=0)


def test_only_the_first_dimensions_turn() -> None:
    x = torch.randn(6, 3, 12)
    angles = rope_angles(rows(POSITIONS), PLAIN, PLAIN, x.dtype)
    got = rotate(x, angles)
    assert torch.equal(got[..., 8:], x[..., 8:])
    assert torch.equal(got[..., :8], rotate(x[..., :8], angles))


def test_rows_of_stretched_sequences_turn_otherwise() -> None:
    x = torch.randn(6, 3, 8)
    slow = Turning(PLAIN.frequencies / 4, magnitude=1.5)
    stretched = torch.tensor([True, False] * 3)
    ragged = replace(rows(POSITIONS), stretched=stretched)
    got = rotate(x, rope_angles(ragged, PLAIN, slow, x.dtype))
    want = [rotate(x, rope_angles(rows(POSITIONS), turning, turning, x.dtype)) for turning in (PLAIN, slow)]
    torch.testing.assert_close(got, torch.where(stretched[:, None, None], want[1], want[0]))
    torch.testing.assert_close(got[0], 1.5 * x[0])


def test_angles_are_float32_until_the_end() -> None:
    """bfloat16 positions would be wrong from 257 on."""
    one = Turning(torch.tensor([1.0]))
    cos, sin = rope_angles(rows([4097]), one, one, torch.bfloat16)
    angle = torch.tensor(4097.0)
    assert cos[0, 0, 0] == angle.cos().bfloat16()
    assert sin[0, 0].tolist() == [-angle.sin().bfloat16(), angle.sin().bfloat16()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_that_are_looked_up_are_the_same(dtype: torch.dtype, interleaved: bool) -> None:
    turning = Turning(1e4 ** -(torch.arange(0, 64, 2) / 64), magnitude=1.3)
    dial = Dial(turning, dtype, interleaved=interleaved)
    for longest in (5, 1500, Dial.KEPT, 1):
        positions = torch.randint(0, longest, (67,))
        found = dial.angles(positions, longest)
        want = rope_angles(rows(positions.tolist()), turning, turning, dtype, interleaved=interleaved)
        assert found is not None
        assert all(map(torch.equal, found, want))
    assert dial.angles(torch.tensor([Dial.KEPT]), Dial.KEPT + 1) is None
