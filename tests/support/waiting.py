"""Waiting for what other threads and processes do. Limits are generous: the machine may be busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], limit_s: float = 150.0) -> T:
    """What the condition gives once that is true. What takes long is asked for less often: that takes time from others."""
    begin = time.monotonic()
    while not (found := condition()):
        waited = time.monotonic() - begin
        assert waited < limit_s, f"it didn't happen in {limit_s:.0f} s"
        time.sleep(min(0.25, max(0.01, 0.05 * waited)))
    return found


async def until_async(condition: Callable[[], T], limit_s: float = 60.0) -> T:
    """The same beside an event loop's other tasks."""
    limit = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < limit, f"it didn't happen in {limit_s:.0f} s"
        await asyncio.sleep(0.005)
    return found
