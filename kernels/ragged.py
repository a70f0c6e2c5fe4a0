"""Ragged: where the rows of a step belong. Built once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """T rows of S sequences, packed one sequence after the other; keys and values lie in blocks of P slots.

    Row t of sequence s is at position `positions[t]` and attends to positions 0..positions[t] of its own sequence, whose
    slot p is `table[s, p // P] * P + p % P`.
    """

    positions: Tensor
    """[T] int64"""
    slots: Tensor
    """[T] int64: where row t's key and value are written."""
    starts: Tensor
    """[S + 1] int32: rows starts[s]..starts[s + 1] belong to sequence s."""
    lengths: Tensor
    """[S] int32: tokens of sequence s in the cache once this step is written (its last row's position + 1)."""
    table: Tensor
    """[S, B] int32: block ids, padded with 0."""
    host_starts: npt.NDArray[np.int32]
    """starts on the host, so that no kernel has to wait for the device."""
    host_lengths: npt.NDArray[np.int32]
    stretched: Tensor | None = None
    """[T] bool: the row's sequence is longer than its ropes were trained for; None: no row's is."""
    others: tuple[Ragged, ...] = ()
    """The same rows in the blocks of the other layer groups."""
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What kernels work out from the rest once per step, by their own keys; every layer finds it here."""

    def group(self, number: int) -> Ragged:
        """The rows as the layers of this group find them."""
        return self if number == 0 else self.others[number - 1]
