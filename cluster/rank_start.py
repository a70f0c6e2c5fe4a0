"""How Ray starts the processes of a group's ranks: it may take its time, and the log says whose process isn't there yet.

A rank's own limit (--collective-timeout) counts from when its process runs. Ray itself and Serve set none for an actor: the
node may be pulling an image, setting up an environment, or have no core to spare.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
NOTE_S = 30.0
"""How often the log says who is waited for; Serve's own notes on slow replicas are as frequent."""
LIMIT_S = 900.0
"""Beyond what Ray gives an environment (setup_timeout_seconds, 600 s), within which it says what went wrong itself."""


class UnstartedError(Exception):
    """Ray has started no process for a rank; the message is for a user."""


async def started(process: Awaitable[T], who: str, *, note_s: float = NOTE_S, limit_s: float = LIMIT_S) -> T:
    """What `process` gives as soon as it runs, which is `who`'s. UnstartedError when Ray hasn't started it in `limit_s`."""
    waiting, begin = asyncio.ensure_future(process), time.monotonic()
    try:
        while True:
            left = limit_s - (time.monotonic() - begin)
            if (await asyncio.wait([waiting], timeout=max(0.0, min(note_s, left))))[0]:
                return waiting.result()
            late = f"Ray hasn't started the process of {who} for {time.monotonic() - begin:.0f} s"
            if left <= note_s:
                raise UnstartedError(f"{late}, and is waited for no longer")
            log.warning(
                "%s: pending. It has its bundle of the placement group; its node may be pulling an image, setting up the"
                " environment, or be out of cores or memory. `ray list actors` and the node's raylet.out know more",
                late,
            )
    finally:
        waiting.cancel()
