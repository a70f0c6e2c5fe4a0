"""Products by Triton: equal to torch's, and for each row bit for bit the same however many others there are."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from interpreted import row_by_row

from kvasir.kernels import linear as products
from kvasir.kernels import linear_triton
from kvasir.kernels.linear import Tiled, is_packed, linear, linear_heads, packed, packed_heads
from kvasir.kernels.linear_triton import MANY_ROWS, TOLERANCE, agrees

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _tiled(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "TILED", (device.type,))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    size = TOLERANCE[want.dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=size, rtol=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 33, 150])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 40), (200, 129), (70, 64)])
def test_products(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sizes that no tile divides; a part of wider rows."""
    wide = torch.randn(rows, inputs + 7, device=device).to(dtype)
    x = wide[:, :inputs]
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype)
    close(linear(x, packed(weight, invariant=True)), linear(x, weight))
    close(linear(x, Tiled(weight, wide=True), bias), linear(x, weight, bias))
    turned = torch.randn(inputs, rows, device=device).to(dtype).T
    close(linear(turned, Tiled(weight, wide=False)), linear(turned, weight))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_products_of_heads(dtype: torch.dtype, device: torch.device) -> None:
    """Matrices in either order, as those that expand a latent lie."""
    for rows in (0, 2, 70):
        x = torch.randn(rows, 3, 50, device=device).to(dtype)[:, :, :40]
        weight = (torch.randn(3, 24, 40, device=device) / 6).to(dtype)
        turned = (torch.randn(3, 40, 24, device=device) / 6).to(dtype).transpose(1, 2)
        for each in (weight, turned):
            order = packed_heads(each, invariant=True)
            assert isinstance(order, Tiled)
            close(linear_heads(x, order), linear_heads(x, each))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_is_the_same_among_any_others(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than the larger tiles hold, where both kinds give the same bits."""
    row_by_row(monkeypatch)
    count = 2 * MANY_ROWS.rows + 9
    x, weight = torch.randn(count, 69, device=device).to(dtype), torch.randn(40, 69, device=device).to(dtype)
    heads = torch.randn(3, 20, 23, device=device).to(dtype)
    order, expanded = packed(weight, invariant=True), packed_heads(heads, invariant=True)
    assert expanded is not None
    together, by_heads = linear(x, order), linear_heads(x.view(count, 3, 23), expanded)
    for start, stop in ((0, 1), (100, 101), (3, 70), (60, count), (0, count)):
        assert torch.equal(linear(x[start:stop], order), together[start:stop])
        assert torch.equal(linear_heads(x[start:stop].view(-1, 3, 23), expanded), by_heads[start:stop])


def test_larger_tiles_where_the_bits_are_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which they differ multiplies all rows in small ones."""
    for differ, same in ((0, True), (1, False)):

        def other(x: torch.Tensor, _: torch.Tensor, *, wide: bool = False, differ: int = differ) -> torch.Tensor:
            return x + differ * wide

        monkeypatch.setattr(linear_triton, "linear", other)
        agrees.cache_clear()
        order = packed(torch.zeros(4, 8, device=device, dtype=torch.bfloat16), invariant=True)
        assert isinstance(order, Tiled)
        assert order.wide == same
        assert is_packed(order)
    agrees.cache_clear()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8, device=device), Tiled(torch.zeros(4, 8, device=device), wide=False)
    for wrong in (x.half(), x[:, :7]):
        with pytest.raises(ValueError, match=r"by weights\[1, 4, 8\] in torch.float32"):
            linear(wrong, weight)
    with pytest.raises(ValueError, match=r"a bias\[3\] in torch.float32 for 4 outputs"):
        linear(x, weight, torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"x\[2, 2, 8\] in torch.float32 by weights\[3, 4, 8\]"):
        linear_heads(torch.zeros(2, 2, 8, device=device), Tiled(torch.zeros(3, 4, 8, device=device), wide=False))


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, 8)
    assert isinstance(packed(weight, invariant=True), Tiled)
    assert not isinstance(packed(weight), Tiled)
    monkeypatch.setattr(products, "has_triton", lambda: False)
    assert not isinstance(packed(weight, invariant=True), Tiled)
