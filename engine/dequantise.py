"""Quantised checkpoints as plain numbers: FP8 with scales, and MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.engine.errors import ConfigError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1 (OCP Microscaling Formats v1.0, 5.3.3); the fourth bit is the sign."""
GROUP = 32
"""Numbers of MXFP4 that share a scale."""
ROWS = 64
"""At once: their temporaries stay in the cache."""


def fp8_block(name: str, weight: Tensor, scale: Tensor) -> tuple[int, int]:
    """Rows and columns of weight[O, I] that share a number of scale[., .]; ConfigError where they don't fit each other."""
    if weight.dim() != 2 or scale.dim() != 2:
        raise ConfigError(f"{name} has shape {list(weight.shape)}, its scales have {list(scale.shape)}")
    high, wide = (_block(name, n, blocks) for n, blocks in zip(weight.shape, scale.shape, strict=True))
    return high, wide


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], rows: range, columns: range) -> Tensor:
    """weight[O, I] in these rows and columns, times scale[O / A, I / B], which blocks of A x B share: squares (DeepSeek-V3,
    arXiv:2412.19437, 3.3.2), rows, or all -> bfloat16, which holds every FP8 number."""
    high, wide = block
    out = torch.empty(len(rows), len(columns), dtype=torch.bfloat16)
    step = high if 1 < high < ROWS else ROWS
    for start in range(rows.start // step * step, rows.stop, step):
        first, last = max(start, rows.start), min(start + step, rows.stop)
        factors = scale[first // high : -(-last // high)].float()
        if factors.shape[1] > 1:
            factors = factors.repeat_interleave(wide, 1)[:, columns.start : columns.stop]
        numbers = weight[first:last, columns.start : columns.stop].float()
        out[first - rows.start : last - rows.start] = numbers.mul_(factors)
    return out


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks[..., G, 16] of pairs of FP4 numbers, the lower half first, times 2^(scales[..., G] - 127) ->
    bfloat16 [..., 32 G] (OCP Microscaling Formats v1.0)."""
    table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.bfloat16)
    pairs = torch.cartesian_prod(table, table).flip(-1).contiguous().view(torch.int32).flatten()  # what each byte says
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - 127).bfloat16()
    out = torch.empty((*blocks.shape[:-1], 2 * blocks.shape[-1]), dtype=torch.bfloat16)
    wholes = out.view(-1, *out.shape[-2:]), blocks.flatten(0, -3), scales.flatten(0, -2)
    for first in range(0, len(wholes[0]), ROWS):
        rows, packed, exponent = (whole[first : first + ROWS] for whole in wholes)
        numbers = pairs.index_select(0, packed.flatten().int()).view(torch.bfloat16).view_as(rows)
        scale = powers.index_select(0, exponent.flatten().int()).view(*exponent.shape, 1)
        torch.mul(numbers, scale, out=rows)
    return out.flatten(-2)


def _block(name: str, size: int, blocks: int) -> int:
    """Numbers that share a scale along one side: a power of two, of which the last block may be short."""
    block = 1
    while blocks * block < size:
        block *= 2
    if blocks == size:
        return 1
    if blocks == 1:
        return size
    if -(-size // block) != blocks:
        raise ConfigError(f"{name}: {size} numbers don't divide into {blocks} blocks")
    return block
