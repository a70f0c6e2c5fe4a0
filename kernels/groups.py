"""Rows sorted by what each of them is multiplied by: experts of a mixture, adapters of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which of R rows belong to which group: order[R] lists them group by group, ends[G] where each group ends in it."""

    order: Tensor
    ends: Tensor

    @staticmethod
    def of(group: Tensor, count: int) -> Groups:
        """Of group[R]; rows of none have a number outside 0..count - 1, and come last."""
        own = torch.where((group < 0) | (group >= count), count, group)
        found, order = own.sort(stable=True)
        ends = torch.searchsorted(found, torch.arange(count, device=group.device, dtype=found.dtype), right=True)
        return Groups(order, ends)


def few_rows(count: int, experts: int) -> bool:
    """Whether so many rows, each of one expert, are few for each: reading the matrices takes longer than multiplying."""
    return count <= 32 * experts
