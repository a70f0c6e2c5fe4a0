"""Every block type, bit for bit against the gguf package's numpy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import _type_traits, dequantize

from kvasir.engine.gguf import BLOCK_TYPES, BlockType
from kvasir.engine.gguf_blocks import CHUNK, DEQUANTISE, PLAIN, fill

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}


def judged(kind: BlockType, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(raw, GGMLQuantizationType[kind.name])


def test_nothing_is_missing_that_the_reference_has() -> None:
    assert {kind.name for kind in _type_traits} == {*DEQUANTISE, "BF16"}
    assert set(TYPES) == {*DEQUANTISE, *PLAIN}


@pytest.mark.parametrize("name", [*DEQUANTISE, "F32", "F16", "BF16"])
def test_random_bytes_mean_the_same(name: str) -> None:
    """Random bytes hold every scale, quant and sign, infinite and undefined scales included."""
    kind = TYPES[name]
    raw = np.random.default_rng(7).integers(0, 256, (300, 4 * kind.nbytes), dtype=np.uint8)
    ours = torch.empty(300, 4 * kind.size)
    fill(ours, torch.from_numpy(raw), kind)
    expected = judged(kind, raw)
    defined = ~np.isnan(expected)
    assert (np.isnan(ours.numpy()) == ~defined).all()
    assert (ours.numpy().view(np.uint32)[defined] == expected.view(np.uint32)[defined]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ2_XS", "MXFP4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_place_gets_the_rounded_numbers(name: str, dtype: torch.dtype) -> None:
    kind = TYPES[name]
    raw = sane(kind, 8, 512)
    ours = torch.empty(8, 512, dtype=dtype)
    fill(ours, torch.from_numpy(raw), kind)
    assert torch.equal(ours, torch.from_numpy(judged(kind, raw)).to(dtype))


def test_a_place_of_any_strides_in_pieces() -> None:
    kind = TYPES["Q8_0"]
    rows, columns = 6, CHUNK // 4
    raw = sane(kind, rows, columns)
    place = torch.empty(columns, rows).t()
    fill(place, torch.from_numpy(raw), kind)
    assert torch.equal(place, torch.from_numpy(judged(kind, raw)))
    deep = torch.empty(3, 2, columns).transpose(0, 1)
    fill(deep, torch.from_numpy(raw).view(2, 3, -1), kind)
    assert torch.equal(deep.reshape(rows, columns), torch.from_numpy(judged(kind, raw)))


def test_integers_and_doubles() -> None:
    for name in ("I8", "I16", "I32", "I64", "F64"):
        values = torch.tensor([[1, -2, 100, 0]]).to(PLAIN[name])
        place = torch.empty(1, 4)
        fill(place, values.view(torch.uint8), TYPES[name])
        assert place.tolist() == [[1, -2, 100, 0]]


def sane(kind: BlockType, rows: int, columns: int) -> np.ndarray:
    """Random blocks without infinite scales: every byte keeps its upper exponent bits low."""
    raw = np.random.default_rng(3).integers(0, 256, (rows, columns // kind.size * kind.nbytes), dtype=np.uint8)
    finite = np.isfinite(judged(kind, raw).reshape(rows, -1, kind.size)).all(-1)
    blocks = raw.reshape(rows, -1, kind.nbytes)
    blocks[~finite] = 0
    return raw
