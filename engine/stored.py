"""Stored tensors: what a checkpoint's files hold, read no sooner, and no more of it, than is wanted.

What a rank wants of one is told by a view of `like`, which has the tensor's shape, strides and type, and no memory: taking fused
tensors apart and cutting out a rank's slice are views, whose first and last number say where in the file they lie.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from kvasir.engine.dequantise import GROUP, fp8, fp8_block, mxfp4
from kvasir.engine.errors import ConfigError

META = torch.device("meta")
WILL_NEED = 3
"""MADV_WILLNEED of Linux and macOS."""


class Stored(Protocol):
    """One tensor of the files."""

    like: Tensor
    """On no device."""
    nbytes: int
    """In the file."""

    def read(self, view: Tensor) -> Tensor:
        """The numbers of this view of `like`."""

    def fetch(self, view: Tensor) -> None:
        """Ask the system to read what `read` will, while something else is done."""


class Mapped:
    """One that lies in a mapped file as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.nbytes = tensor, tensor.nbytes
        self.like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)

    def read(self, view: Tensor) -> Tensor:
        return self._tensor.as_strided(
            view.size(), view.stride(), self._tensor.storage_offset() + view.storage_offset()
        )

    def fetch(self, view: Tensor) -> None:
        will_need(self.read(view))


class Made:
    """One that isn't stored as it is wanted: `make(rows, columns)` gives these of `stored`, a matrix [-1, columns of `like`]."""

    def __init__(self, stored: Stored, like: Tensor, make: Callable[[range, range], Tensor]) -> None:
        self._stored, self._make, self.like, self.nbytes = stored, make, like, stored.nbytes
        self._width = like.shape[-1] if like.dim() else 1

    def read(self, view: Tensor) -> Tensor:
        rows, columns = self._span(view)
        steps = [len(columns) * (step // self._width) + step % self._width for step in view.stride()]
        return self._make(rows, columns).contiguous().as_strided(view.size(), steps)

    def fetch(self, view: Tensor) -> None:
        rows, columns = self._span(view)
        self._stored.fetch(self._stored.like[rows.start : rows.stop, columns.start : columns.stop])

    def _span(self, view: Tensor) -> tuple[range, range]:
        """The rows and columns between which it lies."""
        if not view.numel():
            return range(0), range(0)
        row, column = divmod(int(view.storage_offset()), self._width)
        sides = [(count - 1, step) for count, step in zip(view.size(), view.stride(), strict=True)]
        height = 1 + sum(count * (step // self._width) for count, step in sides)
        width = 1 + sum(count * (step % self._width) for count, step in sides)
        return range(row, row + height), range(column, column + width)


class Mxfp4:
    """Experts' matrices in MXFP4, each transposed: see `dequantise.mxfp4`. No more is made than the wanted rows, which may be
    every other one, of the groups of columns that share a scale."""

    def __init__(self, name: str, blocks: Tensor, scales: Tensor) -> None:
        if blocks.dtype != torch.uint8 or blocks.dim() < 3 or blocks.shape[-1] != GROUP // 2:
            kind = str(blocks.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} is {kind} of shape {list(blocks.shape)}; MXFP4 is uint8 of shape [..., rows, groups, {GROUP // 2}]"
            )
        if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1]:
            kind, scaled = str(scales.dtype).removeprefix("torch."), name.removesuffix("_blocks") + "_scales"
            raise ConfigError(
                f"{scaled} is {kind} of shape {list(scales.shape)}; for {name} of shape {list(blocks.shape)} it must be"
                f" uint8 of shape {list(blocks.shape[:-1])}"
            )
        self._blocks, self._scales = Mapped(blocks.contiguous()), Mapped(scales.contiguous())
        self._groups, self._width = blocks.shape[-2], 2 * blocks.shape[-2:].numel()
        whole = torch.empty((*blocks.shape[:-2], self._width), dtype=torch.bfloat16, device=META)
        self.like = whole.transpose(-1, -2)
        self.nbytes = blocks.nbytes + scales.nbytes

    def read(self, view: Tensor) -> Tensor:
        blocks, scales = self._packed(view)
        made = mxfp4(self._blocks.read(blocks), self._scales.read(scales))
        columns = view.stride().index(1)
        return made.narrow(-1, view.storage_offset() % GROUP, view.size(columns)).movedim(-1, columns)

    def fetch(self, view: Tensor) -> None:
        blocks, scales = self._packed(view)
        self._blocks.fetch(blocks)
        self._scales.fetch(scales)

    def _packed(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Its rows of blocks and of scales, in whole groups."""
        row, column = divmod(int(view.storage_offset()), self._width)
        rows = view.movedim(view.stride().index(1), -1)
        steps = [step // self._width * self._groups for step in rows.stride()[:-1]]
        begin, count = column // GROUP, -(-(column % GROUP + rows.shape[-1]) // GROUP)
        size, start = (*rows.shape[:-1], count), row * self._groups + begin
        scales = self._scales.like.as_strided(size, (*steps, 1), start)
        width = GROUP // 2
        strides = (*(step * width for step in steps), width, 1)
        return self._blocks.like.as_strided((*size, width), strides, start * width), scales


def fp8_tensor(name: str, weight: Tensor, scale: Tensor) -> Stored:
    """Numbers of FP8 with their scales: see `dequantise.fp8`. Reading them raises ConfigError where these don't fit each other:
    what no model wants may be as it likes."""
    like = torch.empty(weight.shape, dtype=torch.bfloat16, device=META)
    if scale.numel() == 1:
        weight, scale = weight.flatten(0, -2) if weight.dim() > 1 else weight.reshape(1, -1), scale.reshape(1, 1)

    def make(rows: range, columns: range) -> Tensor:
        return fp8(weight, scale, fp8_block(name, weight, scale), rows, columns)

    return Made(Mapped(weight), like, make)


def halved_tensor(paired: Stored, head_dim: int) -> Stored:
    """Rows of heads of which neighbours turn together, in the order in which a head's halves do."""

    def make(rows: range, columns: range) -> Tensor:
        begin, end = rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim
        near = paired.read(paired.like[begin:end, columns.start : columns.stop])
        halved = near.reshape(-1, head_dim // 2, 2, len(columns)).transpose(1, 2).reshape(near.shape)
        return halved[rows.start - begin : rows.stop - begin]

    return Made(paired, paired.like, make)


def is_view(tensor: Tensor, of: Tensor) -> bool:
    """Whether it has no memory of its own."""
    return bool(tensor.untyped_storage()._cdata == of.untyped_storage()._cdata)


def will_need(tensor: Tensor) -> None:
    """Ask the system to read what is mapped here from its file: several requests at once keep a disk busy, where a mapped file by
    itself waits for one page after the other."""
    advise = _madvise()
    if advise is None or not tensor.numel():
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + _reach(tensor) * tensor.itemsize - begin
    advise(ctypes.c_void_p(begin), ctypes.c_size_t(size), WILL_NEED)  # it is advice: nothing depends on its success


@cache
def _madvise() -> Any:
    """The system's; None where it has none."""
    return getattr(ctypes.CDLL(None), "madvise", None)


def _reach(tensor: Tensor) -> int:
    """Numbers from its first to behind its last one in memory."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return 1 + sum((count - 1) * step for count, step in steps) if tensor.numel() else 0
