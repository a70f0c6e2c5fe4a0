"""Rows: which rows of the residual a rank of a stage has. All of them, or its part: then a sum over ranks gives each only its
own rows, norms work on those, and the rows come together where a branch begins (sequence parallelism, Korthikanti et al. 2022,
arXiv:2205.05198). The same bytes are sent, in twice the messages, for norms and additions on 1/TP of the rows.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kvasir.engine.mesh import Mesh

GPU_ELEMENTS = 4_000_000
"""Elements of the residual that a GPU must be spared. Two norms with their additions move 16 bytes per element and layer, at
3.35 TB/s; two further messages take 20 us. Computed, not measured."""


class Rows(Protocol):
    """How hidden states get from the residual into a branch and back."""

    def own(self, x: Tensor) -> Tensor:
        """x[T, M] -> what this rank keeps of it."""
        ...

    def count(self) -> int:
        """Rows of that."""
        ...

    def spread(self, h: Tensor) -> Tensor:
        """What the ranks keep -> [T, M] on all of them."""
        ...

    def summed(self, y: Tensor) -> Tensor:
        """y[T, M] of every rank -> what this rank keeps of the sum."""
        ...


class WholeRows:
    """Every rank has all rows."""

    def __init__(self, mesh: Mesh, rows: int) -> None:
        self._mesh, self._rows = mesh, rows

    def own(self, x: Tensor) -> Tensor:
        return x

    def count(self) -> int:
        return self._rows

    def spread(self, h: Tensor) -> Tensor:
        return h

    def summed(self, y: Tensor) -> Tensor:
        return self._mesh.reduce(y)


class DealtRows:
    """Each rank has as many, in their order; the last ones are filled up with zeros."""

    def __init__(self, mesh: Mesh, rows: int) -> None:
        self._mesh, self._rows, self._size = mesh, rows, -(-rows // mesh.place.tp)

    def own(self, x: Tensor) -> Tensor:
        first = self._size * self._mesh.place.tp_rank
        part = x[first : first + self._size]
        return F.pad(part, (0, 0, 0, self._size - len(part)))

    def count(self) -> int:
        return self._size

    def spread(self, h: Tensor) -> Tensor:
        return self._mesh.gather_rows(h)[: self._rows]

    def summed(self, y: Tensor) -> Tensor:
        return self._mesh.scatter_sum(F.pad(y, (0, 0, 0, self._size * self._mesh.place.tp - self._rows)))


def rows_of(mesh: Mesh, rows: int, width: int) -> Rows:
    """What is faster for a step of so many rows; the same on all ranks."""
    return DealtRows(mesh, rows) if dealing_wins(mesh, rows, width) else WholeRows(mesh, rows)


def dealing_wins(mesh: Mesh, rows: int, width: int) -> bool:
    size = mesh.place.tp
    if size == 1 or mesh.device.type == "cpu" or mesh.invariant:  # what deals out adds up in an order of its own
        return False
    return rows * width * (size - 1) // size >= GPU_ELEMENTS
