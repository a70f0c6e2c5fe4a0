"""Memory of a CPU in huge pages, for what every step reads from end to end.

One core that reads 768 MiB gets 16 GB/s from pages of 4 KiB and 29 from pages of 2 MiB, two cores together 18 and 29 (AMD EPYC
in a virtual machine, where each missing translation is looked up twice).
"""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20
CHUNK = 16 * HUGE
"""Tensors up to this share pages."""
ALIGNED = 64
"""Bytes of a cache line."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An unfilled tensor; in huge pages, as far as it fills them, where the system lets programs ask for those (Linux)."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # none left: torch has the words for that
        return torch.empty(shape, dtype=dtype)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)


class Room:
    """Huge pages that tensors which don't fill them share, one behind the other. What nobody has asked for costs no memory.

    All matrices of a layer of a 125M model but one are smaller than a huge page, and 1.5 of the other's 3.5 MB lie beyond the
    last whole one.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An unfilled tensor, as the function above. It keeps its chunk alive."""
        size = math.prod(shape) * dtype.itemsize
        if size > CHUNK:
            return empty(*shape, dtype=dtype)
        if size > len(self._free):
            self._free = empty(CHUNK, dtype=torch.uint8)
        found, self._free = self._free[:size], self._free[-(-size // ALIGNED) * ALIGNED :]
        return found.view(dtype).view(shape)
