"""Waiting for what other threads and processes do. Limits are generous: the machine may be busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], limit_s: float = 60.0) -> T:
    """What the condition gives once that is true."""
    limit = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < limit, f"it didn't happen in {limit_s:.0f} s"
        time.sleep(0.01)
    return found


async def until_async(condition: Callable[[], T], limit_s: float = 60.0) -> T:
    """The same beside an event loop's other tasks."""
    limit = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < limit, f"it didn't happen in {limit_s:.0f} s"
        await asyncio.sleep(0.005)
    return found
