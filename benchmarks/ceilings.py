"""What the machine gives, measured beside everything else: bytes and operations per second; and how long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kvasir.kernels import huge_pages

Clock = Callable[[], float]
WAIT = 2_000_000
"""Cycles of a GPU, about a millisecond: Python launches what is measured meanwhile."""


def ceilings(clock: Clock = time.perf_counter) -> tuple[float, float]:
    """By a float32 sum in huge pages, and by a large product of torch's, in bfloat16 or float32: CPUs without AVX-512 have
    none worth the name in bfloat16."""
    many = huge_pages.empty(1 << 26, dtype=torch.float32).fill_(1)
    read = median(many.sum, clock)
    return many.nbytes / read, max(rate(torch.bfloat16, clock), rate(torch.float32, clock))


def gpu_ceilings() -> tuple[float, float]:
    """By a copy, and by a large product in bfloat16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    runs: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: F.linear(a, b))
    copied, multiplied = (statistics.median(timed_on_gpu(run) for _ in range(11)) for run in runs)
    return 2 * source.nbytes / copied, 2.0 * len(a) ** 3 / multiplied


def timed_on_gpu(run: Callable[[], object]) -> float:
    """By the GPU's own clock, which is kept waiting until all is launched: as in a CUDA graph, Python's time isn't in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rate(dtype: torch.dtype, clock: Clock) -> float:
    """Operations per second."""
    x, weight = torch.randn(256, 2048).to(dtype), torch.randn(8192, 2048).to(dtype)
    first = timed(lambda: F.linear(x, weight), clock)
    return 2.0 * 256 * weight.numel() / (first if first > 0.5 else median(lambda: F.linear(x, weight), clock))


def median(run: Callable[[], object], clock: Clock) -> float:
    return statistics.median(timed(run, clock) for _ in range(5))


def timed(run: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    run()
    return clock() - begin
