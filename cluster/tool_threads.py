"""Threads that look through tools' schemas, beside the event loop: a quick one, and one for those that take long.

Each request gets a short time of the quick thread. What takes longer goes on in the other one, behind others that do; what was
found out until then is remembered. So a pathological schema costs its sender, and nobody else more than that short time.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kvasir.cluster.answer_parts import ToolFormat
from kvasir.cluster.tool_use import HeldCalls, ToolUse
from kvasir.engine.argument_schema import SlowSchemaError
from kvasir.engine.errors import OverloadedError
from kvasir.engine.request import StructuredOutput

QUICK_S = 0.1
"""A hundred tools of an agent take about as long the first time, and a tenth of it later."""
LIMIT_S = 10.0
"""For the schemas of one request."""
MAX_QUICK, MAX_SLOW = 256, 8
"""Requests that a thread may have before it, with the one it is at."""


class ToolThreads:
    """For all models of a gateway."""

    def __init__(self) -> None:
        self._quick = _Queue(MAX_QUICK, "tools")
        self._slow = _Queue(MAX_SLOW, "tools-slow")

    async def held(self, use: ToolUse, taught: ToolFormat | None, instead: StructuredOutput | None) -> HeldCalls:
        """`ToolUse.held`. SlowSchemaError where it takes over LIMIT_S, OverloadedError where too many others come before."""
        try:
            return await self._quick.run(use, taught, instead, QUICK_S)
        except SlowSchemaError:
            return await self._slow.run(use, taught, instead, LIMIT_S)


class _Queue:
    """One thread, and a limited number of requests that have to do with it."""

    def __init__(self, limit: int, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._limit, self._count = limit, 0

    async def run(
        self, use: ToolUse, taught: ToolFormat | None, instead: StructuredOutput | None, limit_s: float
    ) -> HeldCalls:
        if self._count >= self._limit:
            text = f"the tools of {self._count} requests wait to be looked through, {self._limit} may; ask again later"
            raise OverloadedError(text, param="tools", retry_after_s=1.0)
        self._count += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, use.held, taught, instead, limit_s)
        finally:
            self._count -= 1
