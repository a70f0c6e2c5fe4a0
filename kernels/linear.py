"""Matrix products with weights that stay: torch's linear, our own or oneDNN's on weights reordered once for this CPU, or
Triton's where a row's product mustn't depend on how many rows there are."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels import huge_pages, native
from kvasir.kernels.huge_pages import Room
from kvasir.kernels.op import has_triton

WIDE = 32
"""Outputs that lie side by side in our own order."""
TILED = ("cuda",)
"""Types of device whose products that don't depend on the number of rows are Triton's."""


@dataclass(frozen=True, eq=False)
class Packed:
    """weight[O, I] in our own order (linear_cpu.cpp): no row's product depends on how many rows there are."""

    blocks: Tensor
    """[ceil(O / 32), I, 32], or [ceil(O / 32), I / 2, 32, 2] where pairs of bfloat16 are multiplied; filled up with zeros."""
    outputs: int
    inputs: int


@dataclass(frozen=True, eq=False)
class PackedHeads:
    """weight[H, O, I], each head's as `Packed` has it: blocks[H, ...]."""

    blocks: Tensor
    outputs: int
    inputs: int


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix in our own order, and its bias."""

    weight: Packed
    bias: Tensor | None


class ProductC(ctypes.Structure):
    """The same as compiled code takes it (linear_parts.h)."""

    _fields_ = (("weights", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("outputs", ctypes.c_int64))


@dataclass(frozen=True, eq=False)
class Tiled:
    """weight[O, I], or each head's weight[H, O, I], where it lies: multiplied by Triton (linear_triton.py), and no row's product
    depends on how many rows there are."""

    matrix: Tensor
    wide: bool
    """Whether many rows may go in larger tiles."""


HeadsWeight = Union[Tensor, PackedHeads, Tiled]
Weight = Union[Tensor, Packed, Tiled]
"""A matrix as `linear` takes it."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x[T, I] times weight[O, I] transposed, plus bias[O] -> [T, O]. The weight may be one that `packed` returned."""
    if isinstance(weight, Packed):
        return _own(x, weight, bias)
    if isinstance(weight, Tiled):
        from kvasir.kernels import linear_triton

        return linear_triton.linear(x, weight.matrix, bias, wide=weight.wide)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def packed(weight: Tensor, *, invariant: bool = False, room: Room | None = None) -> Weight:
    """The same weight[O, I] in the order that is read fastest, for `linear` alone: our own, or oneDNN's as an opaque tensor.
    `invariant`: our own or Triton's wherever it can be had, so that no row's result depends on how many rows there are. `room`:
    where our own lies, so that the matrices of a model share its huge pages.

    torch's own linear reorders at every call. Measured on one Zen 5 core, 2048 -> 8192 in bfloat16: 0.86 ms instead of
    1.92 for 1 row (39 GB/s, all the memory gives), 1.22 / 2.15 for 8, 2.8 / 4.0 for 32, 17.2 / 19.9 for 256; in float32
    1.65 / 3.1 and 34 / 92. Where oneDNN has nothing to offer the weight comes back as it is.
    Products of bfloat16 pairs without tiles (AMX) are our own (linear_cpu.cpp): two Zen 5 cores took for 1 / 8 / 32 / 512 rows
    of 576 -> 576 22 / 26 / 43 / 451 us, oneDNN 36 / 37 / 55 / 611; of 8192 -> 2048 0.85 ms (all the memory gives), 1.34 (32),
    19.5 (512), oneDNN 0.93, 1.74, 19.1. So are those of half numbers that oneDNN doesn't multiply on this CPU, where torch
    takes ten times as long (AVX2), and of float32: two Zen 3 cores took for 32 / 256 rows of 576 -> 576 152 / 1084 us, oneDNN
    198 / 1325.
    """
    if invariant and tiles(weight.device):
        return _tiled(weight)
    if _owns(weight.dtype, weight.device, invariant, weight.shape[1]):
        return _pack(weight, room)
    if not _mkldnn(weight.dtype, weight.device):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return out


def packed_heads(
    weight: HeadsWeight, *, invariant: bool = False, room: Room | None = None
) -> PackedHeads | Tiled | None:
    """The same weight[H, O, I] for `linear_heads`; None where torch's product is the faster one, or the only one."""
    if not isinstance(weight, Tensor):
        return weight
    if invariant and tiles(weight.device):
        return _tiled(weight)
    heads, outputs, inputs = weight.shape
    if not _owns(weight.dtype, weight.device, invariant, inputs):
        return None
    flat = _room(heads * -(-outputs // WIDE), inputs, weight.dtype, room)
    blocks = flat.view(heads, -1, *flat.shape[1:])
    for head, into in zip(weight, blocks, strict=True):
        _lay(head.detach().contiguous(), into)
    return PackedHeads(blocks, outputs, inputs)


def linear_heads(x: Tensor, weight: HeadsWeight) -> Tensor:
    """x[T, H, I], each head's rows times its weight[H, O, I] transposed -> [T, H, O]."""
    if isinstance(weight, Tensor):
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    if isinstance(weight, Tiled):
        from kvasir.kernels import linear_triton

        return linear_triton.linear_heads(x, weight.matrix, wide=weight.wide)
    kind, heads = weight.blocks.dtype, len(weight.blocks)
    if x.dtype != kind or x.dim() != 3 or x.shape[1:] != (heads, weight.inputs):
        raise ValueError(f"x{list(x.shape)} in {x.dtype} by {heads} heads in {kind} with {weight.inputs} inputs")
    if x.stride(2) != 1 or x.stride(0) % 2 or x.stride(1) % 2:
        x = x.contiguous()
    out = x.new_empty(len(x), heads, weight.outputs)
    _library().linear_heads(
        native.TYPES[kind],
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        weight.blocks.data_ptr(),
        weight.blocks.stride(0),
        out.data_ptr(),
        len(x),
        heads,
        weight.inputs,
        weight.outputs,
        torch.get_num_threads(),
    )
    return out


def product_of(product: Product | None) -> ProductC:
    """As compiled code takes it; None: there is none. ValueError for a bias that doesn't fit: it reads what it is told is
    there."""
    if product is None:
        return ProductC()
    weight, bias = product.weight, product.bias
    alike = bias is None or (bias.shape == (weight.outputs,) and bias.dtype == weight.blocks.dtype)
    if bias is not None and not (alike and bias.is_contiguous()):
        raise ValueError(f"a bias{list(bias.shape)} in {bias.dtype} for {weight.outputs} in {weight.blocks.dtype}")
    return ProductC(weight.blocks.data_ptr(), None if bias is None else bias.data_ptr(), weight.outputs)


def tiles(device: torch.device) -> bool:
    """Whether products on this device can be Triton's."""
    return device.type in TILED and has_triton()


def reorders(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `packed` makes a copy in another order."""
    return _mkldnn(dtype, device) or _owns(dtype, device)


def multiplied_by(dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """(whose products weights of this type have on this device, why)"""
    if device.type != "cpu":
        return "torch", "cuBLAS, or what torch has in its place; Triton's are for --deterministic"
    if _owns(dtype, device):
        return "native", "measured faster than what torch has on CPUs like this one"
    if _mkldnn(dtype, device):
        return "oneDNN", "weights reordered once; our own are for --deterministic"
    return "torch", "oneDNN has no order of its own for this type on this CPU"


def is_packed(weight: Weight) -> bool:
    """Whether `packed` made this."""
    return not isinstance(weight, Tensor) or weight.is_mkldnn


def _mkldnn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has an order of its own for weights of this type on this CPU."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _owns(dtype: torch.dtype, device: torch.device, invariant: bool = False, inputs: int = WIDE) -> bool:
    """Whether our own product is the fastest for such weights here, or wanted and possible."""
    if device.type != "cpu" or dtype not in native.TYPES or native.library() is None:
        return False
    pairs = dtype == torch.bfloat16 and native.multiplies_pairs()
    if pairs and inputs % 2:
        return False
    if dtype == torch.float32:
        return invariant or native.vector_bytes() >= 32  # with shorter ones nobody has measured
    if pairs:
        return invariant or not torch.cpu._is_amx_tile_supported()
    known = _mkldnn(dtype, device)
    if dtype == torch.float16 and torch._C._has_mkldnn:
        known = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return invariant or not known


def _tiled(weight: Tensor) -> Tiled:
    from kvasir.kernels.linear_triton import agrees

    return Tiled(weight.detach(), agrees(weight.dtype, weight.device))


def _pack(weight: Tensor, room: Room | None) -> Packed:
    outputs, inputs = weight.shape
    out = _room(-(-outputs // WIDE), inputs, weight.dtype, room)
    _lay(weight.detach().contiguous(), out)
    return Packed(out, outputs, inputs)


def _room(blocks: int, inputs: int, dtype: torch.dtype, room: Room | None) -> Tensor:
    pairs = dtype == torch.bfloat16 and native.multiplies_pairs()
    shape = (inputs // 2, WIDE, 2) if pairs else (inputs, WIDE)
    return (huge_pages.empty if room is None else room.empty)(blocks, *shape, dtype=dtype)


def _lay(weight: Tensor, into: Tensor) -> None:
    outputs, inputs = weight.shape
    kind, threads = native.TYPES[weight.dtype], torch.get_num_threads()
    _library().pack_linear(kind, weight.data_ptr(), into.data_ptr(), outputs, inputs, threads)


def _library() -> ctypes.CDLL:
    compiled = native.library()
    assert compiled is not None
    return compiled


def _own(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    kind = weight.blocks.dtype
    if x.dtype != kind or x.dim() != 2 or x.shape[1] != weight.inputs:  # the kernel reads what it is told is there
        raise ValueError(f"x{list(x.shape)} in {x.dtype} by a matrix in {kind} with {weight.inputs} inputs")
    if bias is not None and (bias.dtype != kind or bias.numel() != weight.outputs):
        raise ValueError(
            f"bias{list(bias.shape)} in {bias.dtype} behind a matrix in {kind} with {weight.outputs} outputs"
        )
    if x.stride(1) != 1 or x.stride(0) % 2:
        x = x.contiguous()
    out = x.new_empty(len(x), weight.outputs)
    _library().linear(
        native.TYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        weight.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        len(x),
        weight.inputs,
        weight.outputs,
        torch.get_num_threads(),
    )
    return out
