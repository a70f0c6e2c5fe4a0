"""Exchanges of CPU tensors between processes of one machine through memory that all of them map (node_sums_cpu.cpp).

A sum of 8 x 2048 bfloat16 over two ranks takes a connection 50 to 60 us of system calls, and a turn of shared memory a few.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kvasir.kernels.native import TYPES, library

LINE = 64
"""Bytes; what is written by one process lies on lines of its own."""
N = ctypes.c_int64
WHY = {
    1: "timed out: another rank of the stage says nothing",
    2: "another rank of the stage is gone, or gave up",
}


class MeetingC(ctypes.Structure):
    """node_sums.h"""

    _fields_ = (
        ("shared", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        *((name, N) for name in ("own", "size", "capacity", "turn", "spin_ns", "timeout_ns")),
    )


def meeting_bytes(size: int, capacity: int) -> int:
    """Memory that `size` ranks need for parts of `capacity` bytes; it begins as zeros."""
    return (2 + size) * LINE + 2 * size * capacity


class Meeting:
    """Rank `own` of `size`, each of which makes one over the same `memory`, whose first 64 bytes are left alone. Exchanges
    are called in the same order on all of them, one at a time. OSError without compiled kernels; RuntimeError when another
    rank is late by `timeout_s`, or any rank aborted."""

    def __init__(self, memory: Any, own: int, size: int, capacity: int, *, spin_s: float, timeout_s: float) -> None:
        compiled = library()
        if compiled is None:
            raise OSError("this needs compiled kernels")
        self._compiled, self.size = compiled, size
        self._memory = (ctypes.c_char * meeting_bytes(size, capacity)).from_buffer(memory)
        begin = ctypes.addressof(self._memory)
        times = int(spin_s * 1e9), int(timeout_s * 1e9)
        self._state = MeetingC(begin, begin + (2 + size) * LINE, own, size, capacity, 0, *times)
        self.address = ctypes.addressof(self._state)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, added in float32 in the order of the ranks: the same bits on all of them."""
        x = x.contiguous()
        out = torch.empty_like(x)
        kind = TYPES[x.dtype]
        check(self._compiled.sum_between(self.address, kind, x.data_ptr(), out.data_ptr(), x.numel()))
        return out

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x[size * R, M] -> [R, M]: this rank's rows of the sum."""
        x = x.contiguous()
        own = x.new_empty(len(x) // self.size, *x.shape[1:])
        kind = TYPES[x.dtype]
        check(self._compiled.scatter_between(self.address, kind, x.data_ptr(), own.data_ptr(), own.numel()))
        return own

    def gather(self, x: Tensor, *, wanted: bool = True) -> Tensor:
        """x[...] of every rank -> [size, ...], by rank; unless that is `wanted` here, this rank goes on at once."""
        x = x.contiguous()
        whole = x.new_empty(self.size, *x.shape) if wanted else x
        address = whole.data_ptr() if wanted else None
        check(self._compiled.gather_between(self.address, x.data_ptr(), address, x.nbytes))
        return whole

    def abort(self) -> None:
        """Any thread: whoever waits, in any of the processes, gets an error."""
        self._compiled.abort_between(self.address)


def check(status: int) -> None:
    """RuntimeError unless an exchange went well."""
    if status:
        raise RuntimeError(WHY[status])
