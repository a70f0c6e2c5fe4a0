"""A GGUF file as a checkpoint: its tensors under canonical names, one by one, each able to fill its place.

What llama.cpp's converter did is undone on the way: fused and stacked tensors are taken apart, q and k of the Llama
family get their rows back in order, Gemma's norms their offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.engine import gguf_config, gguf_names
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import expect, qkv_rows, shape_of
from kvasir.engine.gguf import StoredTensor, read_gguf
from kvasir.engine.gguf_blocks import fill
from kvasir.engine.share import Cut
from kvasir.engine.spec import Latent, Spec

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """data[..., bytes of a row]: a part of a stored tensor."""

    stored: StoredTensor
    data: npt.NDArray[np.uint8]
    single: bool = False
    """A vector: one row."""

    def part(self, start: int, stop: int) -> Rows:
        """Some rows, or some numbers of a vector."""
        width = self.stored.type.nbytes if self.single else 1
        return replace(self, data=self.data[start * width : stop * width])

    def across(self, start: int, stop: int) -> tuple[Rows, int]:
        """The blocks with these columns of each row, and where in them the first is."""
        size, nbytes = self.stored.type.size, self.stored.type.nbytes
        first, last = start // size, -(-stop // size)
        return replace(self, data=self.data[..., first * nbytes : last * nbytes]), start - first * size

    def reshaped(self, *shape: int) -> Rows:
        """With these dimensions before the bytes."""
        return Rows(self.stored, self.data.reshape(*shape, -1))

    def unbound(self) -> Iterator[Rows]:
        """One for each of the first dimension."""
        if self.single:
            raise ConfigError(
                f"{self.stored.name} has shape {list(self.stored.shape)}, a row for each expert is needed"
            )
        for data in self.data:
            yield Rows(self.stored, data, data.ndim == 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.data.shape[-1] // self.stored.type.nbytes * self.stored.type.size)

    def fill(self, place: Tensor) -> None:
        """Dequantises in small pieces straight into `place`, of any dtype, strides and device."""
        fill(place, torch.from_numpy(self.data), self.stored.type)
        self.stored.file.release(self.data)


@dataclass(frozen=True)
class Filler:
    """One tensor of the model. Nothing is read before `copy_to`."""

    name: str
    """Canonical."""
    original: str
    """As the file says, for messages."""
    shape: tuple[int, ...]
    pieces: tuple[tuple[Rows, View], ...]
    """Where each part of the file goes: a view of the place that has the part's shape."""
    shift: float = 0.0
    group: int = 1
    """Rows that make one of the parts' first dimension."""

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(rows.data.nbytes for rows, _ in self.pieces)

    def copy_to(self, place: Tensor, cut: Cut | None = None) -> None:
        """Reads the file's part and fills `place`, of any dtype, strides and device. Of a cut, no more is made than the
        groups of rows, or the blocks of columns, that it is in."""
        if cut is not None:
            near, start = self._near(cut)
            if near.shape == tuple(place.shape):
                near.copy_to(place)
            else:
                made = torch.empty(near.shape, dtype=place.dtype)
                near.copy_to(made)
                place.copy_(made.narrow(cut.dim, start, len(cut.part)))
            return
        if tuple(place.shape) != self.shape:
            raise ConfigError(f"{self.original} has shape {list(self.shape)}, the model needs {list(place.shape)}")
        exact = torch.empty(self.shape, dtype=torch.float32, device=place.device) if self.shift else place
        for rows, view in self.pieces:
            rows.fill(view(exact))
        if self.shift:  # before it is rounded
            place.copy_(exact.add_(self.shift))

    def fetch(self, cut: Cut | None = None) -> None:
        """Nothing: the threads that dequantise ask for several parts at once."""

    def _near(self, cut: Cut) -> tuple[Filler, int]:
        """A filler of what is around the cut, and where in it that begins."""
        rows, view = self.pieces[0]
        start, stop = cut.part.start, cut.part.stop
        if rows.single or (cut.dim and view is _as_it_is):
            part, start = rows.across(start, stop)
            return replace(self, shape=part.shape, pieces=((part, view),)), start
        if cut.dim:
            return self, start
        first, last = start // self.group, -(-stop // self.group)
        pieces = tuple((replace(rows, data=rows.data[first:last]), view) for rows, view in self.pieces)
        shape = ((last - first) * self.group, *self.shape[1:])
        return replace(self, shape=shape, pieces=pieces), start - first * self.group


class GGUFCheckpoint:
    """A model in GGUF. Opening reads metadata alone."""

    dequantises = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = read_gguf(path)
        self.metadata: Mapping[str, Any] = self.file.metadata
        self.total_bytes = sum(tensor.nbytes for tensor in self.file.tensors.values())

    def config(self) -> dict[str, Any]:
        """What config.json would say, in Hugging Face's naming."""
        return gguf_config.config(self.file)

    def head(self) -> dict[str, Tensor]:
        """What stands behind a classifier's body, by Hugging Face's names, in float32."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.file.tensors.items():
            if ours := gguf_names.classifier(name, self.file.tensors):
                found[ours] = torch.empty(tensor.shape)
                Rows(tensor, tensor.rows).fill(found[ours])
        return found

    def tensors(self, spec: Spec) -> Iterator[Filler]:
        """Every tensor that a text model may use; one that llama.cpp doesn't name goes by its own name."""
        arch, stored = gguf_config.architecture(self.file), self.file.tensors
        for name, tensor in stored.items():
            block = gguf_names.block_of(name)
            if gguf_names.FACTS.fullmatch(name) or (block is not None and block >= len(spec.layers)):
                continue
            if name.startswith("cls.") or (name.startswith("output.") and not spec.lm_head):
                continue
            two_norms = f"blk.{block}.attn_norm_2.weight" in stored and arch == "falcon"
            ours = gguf_names.canonical(name, arch, two_norms=two_norms)
            rows = Rows(tensor, tensor.rows, len(tensor.shape) == 1)
            if ours is not None and ours.endswith(".attn.k_b.weight") and spec.latent:
                yield _latent(ours, tensor, stored, spec, spec.latent)
            elif ours is None or not ours.endswith(".attn.v_b.weight"):
                yield from _fillers(ours or name, name, rows, spec, arch)


def _fillers(ours: str, original: str, rows: Rows, spec: Spec, arch: str) -> Iterator[Filler]:
    stem, _, part = ours.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    suffix = ours[len(f"{stem}.{part}") :]
    shift = -spec.norm_offset if ours.endswith("norm.weight") else 0.0
    match part:
        case "qkv":
            for each, piece in _stacked(original, rows, spec, qkv_rows(spec, "q", "k", "v")):
                yield from _fillers(f"{stem}.{each}{suffix}", original, piece, spec, arch)
        case "q" | "k" if arch in gguf_names.PERMUTED:
            yield _permuted(ours, original, rows, spec.heads if part == "q" else spec.kv_heads, spec.head_dim)
        case "gate" | "up" | "down" | "gate_up" if stem.endswith(".experts"):
            for number, expert in enumerate(rows.unbound()):
                yield from _fillers(f"{stem}.{number}.{part}{suffix}", original, expert, spec, arch)
        case "gate_up" | "up" if part == "gate_up" or _holds_gate(stem, rows, spec):
            ffn = spec.experts.ffn if part == "gate_up" and spec.experts else spec.ffn
            for each, piece in _stacked(original, rows, spec, {"gate": ffn, "up": ffn}):
                yield _plain(f"{stem}.{each}{suffix}", original, piece)
        case "shared_gate":
            yield _plain(ours, original, rows.reshaped(1))
        case _:
            yield _plain(ours, original, rows, shift)


def _plain(name: str, original: str, rows: Rows, shift: float = 0.0) -> Filler:
    return Filler(name, original, rows.shape, ((rows, _as_it_is),), shift)


def _as_it_is(place: Tensor) -> Tensor:
    return place


def _holds_gate(stem: str, rows: Rows, spec: Spec) -> bool:
    """Phi-3 and some of Jina's encoders have the gate's rows before those of up."""
    return stem.endswith(".mlp") and spec.gated and rows.shape[0] == 2 * spec.ffn


def _stacked(original: str, rows: Rows, spec: Spec, parts: Mapping[str, int]) -> Iterator[tuple[str, Rows]]:
    expect(original, rows, *shape_of(original, sum(parts.values()), spec))
    start = 0
    for name, count in parts.items():
        yield name, rows.part(start, start + count)
        start += count


def _permuted(name: str, original: str, rows: Rows, heads: int, head_dim: int) -> Filler:
    """Row 2 i + j of a head in the file is row i + j * head_dim / 2 of ours."""
    half = head_dim // 2
    if rows.shape[0] != heads * head_dim:
        return _plain(name, original, rows)

    def in_pairs(place: Tensor) -> Tensor:
        return place.view(-1, 2, half, *place.shape[1:]).transpose(1, 2)

    pairs = rows.reshaped(heads, half) if rows.single else rows.reshaped(heads, half, 2)
    return Filler(name, original, rows.shape, ((pairs, in_pairs),), group=head_dim)


def _latent(name: str, keys: StoredTensor, stored: Mapping[str, StoredTensor], spec: Spec, facts: Latent) -> Filler:
    """kv_b from its halves k_b[H, rank, nope], which is transposed, and v_b[H, v, rank]."""
    other = keys.name.replace("attn_k_b", "attn_v_b")
    if other not in stored:
        raise ConfigError(f"the file has {keys.name}, but lacks {other}")
    values, width = stored[other], facts.nope_dim + facts.v_dim
    expected = (spec.heads, facts.kv_rank, facts.nope_dim), (spec.heads, facts.v_dim, facts.kv_rank)
    for tensor, needed in zip((keys, values), expected, strict=True):
        if tensor.shape != needed:
            raise ConfigError(f"{tensor.name} has shape {list(tensor.shape)}, the model needs {list(needed)}")

    def for_keys(place: Tensor) -> Tensor:
        return place.view(-1, width, facts.kv_rank)[:, : facts.nope_dim].transpose(1, 2)

    def for_values(place: Tensor) -> Tensor:
        return place.view(-1, width, facts.kv_rank)[:, facts.nope_dim :]

    pieces = (Rows(keys, keys.rows), for_keys), (Rows(values, values.rows), for_values)
    name, shape = name.replace(".k_b.", ".kv_b."), (spec.heads * width, facts.kv_rank)
    return Filler(name, f"{keys.name} with {other}", shape, pieces, group=width)
