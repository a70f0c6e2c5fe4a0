"""GGUF's block types turned into float32, bit for bit what llama.cpp's reference gives (ggml-quants.c).

Each function takes blocks[n, bytes of a block] and gives float32[n, numbers of a block], on the blocks' device. The order of
the multiplications is part of the definition: float32 rounds after each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kvasir.engine.gguf import BlockType
from kvasir.engine.gguf_grids import codebook

CHUNK = 2**19
"""Numbers that are dequantised at once: enough to forget what a call costs, few enough to stay in a core's cache."""
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what an E2M1 number means (OCP Microscaling Formats 1.0)."""
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What IQ4's nibbles mean."""


def fill(place: Tensor, rows: Tensor, kind: BlockType) -> None:
    """place[..., columns] = what rows[..., bytes] say. `place` may have any dtype, strides and device."""
    if kind.name not in PLAIN:
        for part, raw in _chunks(place, rows):
            blocks = raw.to(place.device).reshape(-1, kind.nbytes)
            part.copy_(DEQUANTISE[kind.name](blocks).view(part.shape))
        return
    plain = rows.view(PLAIN[kind.name])
    if (
        kind.name == "F16" and place.dtype is torch.bfloat16
    ):  # torch has no direct way: by float32 it is four times as fast
        for part, half in _chunks(place, plain):
            part.copy_(half.float())
    else:
        place.copy_(plain)


def _chunks(place: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both in equal pieces of about CHUNK numbers: along the first dimension, or the next ones where that is coarse."""
    if place.dim() == 1 or place.numel() <= CHUNK:
        return [(place, rows)]
    each = place[0].numel()
    if each > CHUNK and place.dim() > 2:
        return [pair for outer, raw in zip(place, rows, strict=True) for pair in _chunks(outer, raw)]
    step = max(1, CHUNK // each)
    return [(place[i : i + step], rows[i : i + step]) for i in range(0, len(place), step)]


@cache
def _table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _bytes(values: tuple[int, ...], like: Tensor) -> Tensor:
    """A column of bytes to shift or multiply by, one row for each."""
    return _table(values, torch.uint8, like.device)[:, None]


def _half(blocks: Tensor, at: int) -> Tensor:
    """[n, 1]: the float16 at this byte."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """packed[..., w] -> [..., 2, w]: the low halves, then the high ones."""
    out = packed.new_empty(*packed.shape[:-1], 2, packed.shape[-1])
    torch.bitwise_and(packed, 15, out=out.select(-2, 0))
    torch.bitwise_right_shift(packed, 4, out=out.select(-2, 1))
    return out


def _crumbs(packed: Tensor) -> Tensor:
    """packed[..., w] -> [..., 4, w]: two bits each, the lowest first."""
    return (packed.unsqueeze(-2) >> _bytes((0, 2, 4, 6), packed)) & 3


def _bits(packed: Tensor) -> Tensor:
    """packed[..., w] -> [..., 8, w]: single bits, the lowest first."""
    return (packed.unsqueeze(-2) >> _bytes(tuple(range(8)), packed)) & 1


def _each_bit(packed: Tensor) -> Tensor:
    """packed[..., w] -> [..., w, 8]."""
    return (packed.unsqueeze(-1) >> _table(tuple(range(8)), torch.uint8, packed.device)) & 1


def _q4_0(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 2:]).view(-1, 32).view(torch.int8).sub_(8)
    return quants.float().mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return (_half(blocks, 0) * _nibbles(blocks[:, 4:]).view(-1, 32)).add_(_half(blocks, 2))


def _fifth_bit(blocks: Tensor, at: int) -> Tensor:
    """Nibbles after four bytes that hold a further bit for each."""
    high = _each_bit(blocks[:, at : at + 4]).view(-1, 32)
    return _nibbles(blocks[:, at + 4 :]).view(-1, 32) | (high << 4)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_fifth_bit(blocks, 2).to(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return (_half(blocks, 0) * _fifth_bit(blocks, 4)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = _half(blocks, 80) * (scales & 15)
    low = _half(blocks, 82) * (scales >> 4)
    quants = _crumbs(blocks[:, 16:80].reshape(-1, 2, 32)).view(-1, 16, 16)
    return (scale[..., None] * quants).sub_(low[..., None]).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 96:104]).view(-1, 16)
    high = _crumbs(blocks[:, 104:108]).view(-1, 16)
    scales = (low | (high << 4)).to(torch.int8) - 32
    quants = _crumbs(blocks[:, 32:96].reshape(-1, 2, 32)).view(-1, 16, 16)
    lacks = (_bits(blocks[:, :32]) ^ 1).view(-1, 16, 16)
    scale = _half(blocks, 108) * scales
    return (scale[..., None] * (quants.to(torch.int8) - (lacks << 2).to(torch.int8))).view(-1, 256)


def _scale_and_low(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 8, 1] both: Q4_K's and Q5_K's scales and what is taken off, six bits each in twelve bytes."""
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scale = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), -1)
    low = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), -1)
    return (_half(blocks, 0) * scale)[..., None], (_half(blocks, 2) * low)[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, low = _scale_and_low(blocks)
    packed = blocks[:, 16:].view(-1, 4, 32)
    out = blocks.new_empty(len(blocks), 4, 2, 32, dtype=torch.float32)
    out[:, :, 0].copy_(packed & 15)
    out[:, :, 1].copy_(packed >> 4)
    return out.view(-1, 8, 32).mul_(scale).sub_(low).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, low = _scale_and_low(blocks)
    quants = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    quants |= _bits(blocks[:, 16:48]) << 4
    return (scale * quants).sub_(low).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """Row i of four has its upper two bits from bit 2 i on, and its lower four in nibbles i // 2 of 32 of 64 bytes."""
    low, high = blocks[:, :128].view(-1, 2, 2, 32), blocks[:, 128:192].view(-1, 2, 32)
    halves = low & 15, low >> 4
    out = blocks.new_empty(len(blocks), 2, 4, 32, dtype=torch.float32)
    for i in range(4):
        upper = (high << (4 - 2 * i) if i < 3 else high >> 2) & 48
        out[:, :, i].copy_((halves[i // 2][:, :, i % 2] | upper).view(torch.int8).sub_(32))
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return out.view(-1, 16, 16).mul_(scale[..., None]).view(-1, 256)


def _tq1_0(blocks: Tensor) -> Tensor:
    """Five ternary digits a byte, as the fraction of 256 that begins with them: times 3 ** i, the next is in front."""
    powers = _bytes((1, 3, 9, 27, 81), blocks)
    parts = [blocks[:, :32], blocks[:, 32:48], blocks[:, 48:52]]
    shifted = [part[:, None] * powers[: 4 if part.shape[1] == 4 else 5] for part in parts]
    digits = torch.cat([part.flatten(1) for part in shifted], 1)
    return _half(blocks, 52) * (((digits.to(torch.int16) * 3) >> 8) - 1)


def _tq2_0(blocks: Tensor) -> Tensor:
    quants = _crumbs(blocks[:, :64].view(-1, 2, 32)).view(-1, 256)
    return _half(blocks, 64) * (quants.to(torch.int8) - 1)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is three times as fast."""
    return table.index_select(0, index.flatten().int()).view(*index.shape, *table.shape[1:])


def _fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """packed[..., w] nibbles -> [..., 2, w] numbers times scale[..., 1]."""
    return _looked_up(_table(FP4, torch.float32, packed.device), _nibbles(packed)).mul_(scale[..., None])


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _fp4(blocks[:, 1:], bits.view(torch.float32)).view(-1, 32)


def _nvfp4(blocks: Tensor) -> Tensor:
    """Four groups of 16, each with a scale of 4 exponent and 3 mantissa bits."""
    code = blocks[:, :4]
    exponent, mantissa = (code >> 3).int() & 15, (code & 7).float()
    normal = (1 + mantissa / 8) * torch.exp2(exponent.float() - 7)
    scale = torch.where(exponent == 0, mantissa * 2**-9, normal) * 0.5
    scale = torch.where((code == 0) | (code == 127), torch.zeros_like(scale), scale)
    return _fp4(blocks[:, 4:].reshape(-1, 4, 8), scale[..., None]).view(-1, 64)


def _word(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return blocks.contiguous().view(dtype)


def _vectors(book: str, index: Tensor) -> Tensor:
    """index[...] -> [..., width]."""
    return _looked_up(codebook(book, index.device), index)


@cache
def _sign_table(device: torch.device) -> Tensor:
    """[256, 8]: -1 where the byte has a bit."""
    return 1 - 2 * _each_bit(torch.arange(256, dtype=torch.uint8)).float().to(device)


@cache
def _even_sign_table(device: torch.device) -> Tensor:
    """[128, 8]: seven bits, and an eighth that makes the number of minuses even."""
    seven = _sign_table(device)[:128]
    return torch.cat((seven[:, :7], seven[:, :7].prod(1, keepdim=True)), 1)


def _signs(index: Tensor) -> Tensor:
    """Bytes [...] -> [..., 8]."""
    return _looked_up(_sign_table(index.device), index)


def _even_signs(index: Tensor) -> Tensor:
    """Seven bits [...] -> [..., 8]."""
    return _looked_up(_even_sign_table(index.device), index)


def _sevens(words: Tensor) -> Tensor:
    """words[...] int32 -> [..., 4]: seven bits each; the uppermost four are a scale."""
    return (words[..., None] >> _table((0, 7, 14, 21), torch.int32, words.device)) & 127


def _iq_scale(half: Tensor, code: Tensor, factor: float) -> Tensor:
    """Two steps, because each rounds: half * (0.5 + code), then times a power of two."""
    return (half * (0.5 + code.float())) * factor


def _iq2_xxs(blocks: Tensor) -> Tensor:
    words = _word(blocks[:, 2:], torch.int32).view(-1, 8, 2)
    scale = _iq_scale(_half(blocks, 0), (words[..., 1] >> 28) & 15, 0.25)
    index = blocks[:, 2:].reshape(-1, 8, 8)[..., :4]
    values = _vectors("iq2_xxs", index).mul_(_even_signs(_sevens(words[..., 1])))
    return values.mul_(scale[..., None, None]).view(-1, 256)


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _word(blocks[:, 2:66], torch.int16).int() & 0xFFFF
    scale = _iq_scale(_half(blocks, 0), _interleaved(blocks[:, 66:74]), 0.25)
    values = _vectors("iq2_xs", words & 511).mul_(_even_signs(words >> 9))
    return values.view(-1, 16, 16).mul_(scale[..., None]).view(-1, 256)


def _interleaved(packed: Tensor) -> Tensor:
    """packed[n, w] -> [n, 2 * w]: each byte's low half, then its high one."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _iq2_s(blocks: Tensor) -> Tensor:
    scale = _iq_scale(_half(blocks, 0), _interleaved(blocks[:, 74:82]), 0.25)
    high = (blocks[:, 66:74, None] >> _table((0, 2, 4, 6), torch.uint8, blocks.device)) & 3
    index = blocks[:, 2:34].int() | (high.flatten(1).int() << 8)
    values = _vectors("iq2_s", index).mul_(_signs(blocks[:, 34:66]))
    return values.view(-1, 16, 16).mul_(scale[..., None]).view(-1, 256)


def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _word(blocks[:, 66:98], torch.int32)
    scale = _iq_scale(_half(blocks, 0), (words >> 28) & 15, 0.5)
    signs = _even_signs(_sevens(words)).view(-1, 8, 32)
    values = _vectors("iq3_xxs", blocks[:, 2:66]).view(-1, 8, 32).mul_(signs)
    return values.mul_(scale[..., None]).view(-1, 256)


def _iq3_s(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 0) * (1 + 2 * _interleaved(blocks[:, 106:110]))
    index = blocks[:, 2:66].int() | (_each_bit(blocks[:, 66:74]).flatten(1).int() << 8)
    values = _vectors("iq3_s", index).view(-1, 8, 32).mul_(_signs(blocks[:, 74:106]).view(-1, 8, 32))
    return values.mul_(scale[..., None]).view(-1, 256)


def _threes(words: Tensor) -> Tensor:
    """words[...] -> [..., 4]: three bits each, the lowest first."""
    return (words[..., None] >> _table((0, 3, 6, 9), torch.int32, words.device)) & 7


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _word(blocks[:, 34:50], torch.int16).int() & 0xFFFF
    scale = _half(blocks, 0) * (2 * ((words >> 12) & 7) + 1)
    shift = torch.where(words < 0x8000, 0.125, -0.125)
    index = blocks[:, 2:34].int() | (_threes(words).flatten(1) << 8)
    values = _vectors("iq1_s", index).view(-1, 8, 32) + shift[..., None]
    return values.mul_(scale[..., None]).view(-1, 256)


def _iq1_m(blocks: Tensor) -> Tensor:
    """The only type whose float16 scale is spread: its four nibbles are the uppermost of four words."""
    words = _word(blocks[:, 48:56], torch.int16).int() & 0xFFFF
    spread = (words >> 12) << _table((0, 4, 8, 12), torch.int32, blocks.device)
    half = spread.sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scale = (half * (2 * _threes(words) + 1).flatten(1))[..., None, None]
    high = _interleaved(blocks[:, 32:48])
    index = blocks[:, :32].int() | ((high & 7).int() << 8)
    shift = torch.where(high & 8 == 0, 0.125, -0.125)
    values = _vectors("iq1_s", index) + shift[..., None]
    return (scale * values.view(-1, 16, 2, 8)).view(-1, 256)


def _nonlinear(packed: Tensor) -> Tensor:
    return _looked_up(_table(NONLINEAR, torch.float32, packed.device), _nibbles(packed))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _nonlinear(blocks[:, 2:]).view(-1, 32).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = (_word(blocks[:, 2:4], torch.int16).int() >> _table(tuple(range(0, 16, 2)), torch.int32, blocks.device)) & 3
    scales = (_interleaved(blocks[:, 4:8]).int() | (high << 4)) - 32
    scale = _half(blocks, 0) * scales
    return _nonlinear(blocks[:, 8:].reshape(-1, 8, 16)).view(-1, 8, 32).mul_(scale[..., None]).view(-1, 256)


DEQUANTISE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
