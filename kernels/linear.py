"""Matrix products with weights that stay: torch's linear, or oneDNN's on weights reordered once for this CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels import native

WIDE = 64
"""Outputs that lie side by side in our own order."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[T, I] times weight[O, I] transposed, plus bias[O] -> [T, O]. The weight may be one that `packed` returned."""
    if weight.dim() == 4:
        return _own(x, weight, bias)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def packed(weight: Tensor) -> Tensor:
    """The same weight[O, I] in the order oneDNN reads it in, an opaque tensor of equal size for `linear` alone.

    torch's own linear reorders at every call. Measured on one Zen 5 core, 2048 -> 8192 in bfloat16: 0.86 ms instead of
    1.92 for 1 row (39 GB/s, all the memory gives), 1.22 / 2.15 for 8, 2.8 / 4.0 for 32, 17.2 / 19.9 for 256; in float32
    1.65 / 3.1 and 34 / 92. Where oneDNN has nothing to offer the weight comes back as it is.
    Products of bfloat16 pairs without tiles (AMX) are our own (linear_cpu.cpp): no row's result depends on how many rows
    there are, and two Zen 5 cores took for 1 / 8 / 32 / 512 rows of 576 -> 576 22 / 26 / 43 / 451 us, oneDNN 36 / 37 / 55 / 611;
    of 8192 -> 2048 0.85 ms (all the memory gives), 1.34 (32), 19.5 (512), oneDNN 0.93, 1.74, 19.1.
    """
    if _owns(weight):
        return _pack(weight)
    if not reorders(weight.dtype, weight.device):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return out


def reorders(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `packed` makes a copy in another order."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) and torch._C._has_mkldnn


def is_packed(weight: Tensor) -> bool:
    """Whether `packed` made this."""
    return weight.is_mkldnn or weight.dim() == 4


def _owns(weight: Tensor) -> bool:
    """Whether our own product is the fastest for this weight here."""
    outputs, inputs = weight.shape
    suits = weight.dtype == torch.bfloat16 and outputs % WIDE == 0 and inputs % 2 == 0 and weight.device.type == "cpu"
    return suits and native.multiplies_pairs() and not torch.cpu._is_amx_tile_supported()


def _pack(weight: Tensor) -> Tensor:
    """weight[O, I] as [O / 64, I / 2, 64, 2]."""
    compiled, weight = native.library(), weight.detach().contiguous()
    assert compiled is not None
    outputs, inputs = weight.shape
    out = weight.new_empty(outputs // WIDE, inputs // 2, WIDE, 2)
    compiled.pack_linear(weight.data_ptr(), out.data_ptr(), outputs, inputs, torch.get_num_threads())
    return out


def _own(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    compiled = native.library()
    assert compiled is not None
    rows, inputs = x.shape
    if x.stride(1) != 1 or x.stride(0) % 2:
        x = x.contiguous()
    outputs = weight.shape[0] * WIDE
    out = x.new_empty(rows, outputs)
    compiled.linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        inputs,
        outputs,
        torch.get_num_threads(),
    )
    return out
