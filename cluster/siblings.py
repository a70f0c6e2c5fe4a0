"""What the gateways of an application say about themselves, each under its name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvasir.engine.errors import UnavailableError

PAUSE_S = 1.0
"""How often at most they are asked because somebody isn't known."""
Ask = Callable[[], Awaitable[Sequence[Any]]]
"""What every gateway answers: (its name, something), or the exception that came instead. Raises TimeoutError."""


class Siblings:
    """The answers to one question. Who doesn't answer is taken to be as it was, until all others answer without it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._told: dict[str, Any] = {}
        self._silent = False
        """Not all answered when they were last asked."""
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = 0.0

    async def told(self) -> dict[str, Any]:
        """Ask; name -> what it said, or said last."""
        try:
            answers = await self._ask()
        except TimeoutError:
            self._silent = True
            return dict(self._told)
        said = dict(answer for answer in answers if not isinstance(answer, BaseException))
        self._silent = len(said) < len(answers)
        self._told = self._told | said if self._silent else said
        return dict(self._told)

    async def find(self, name: str) -> Any:
        """What the one of that name said last; None: it isn't there. All are asked where it isn't known, and who wants to know
        meanwhile shares the answer. Raises UnavailableError where it may be one that doesn't answer."""
        if name not in self._told:
            self._asking = self._asking or asyncio.ensure_future(self._ask_again())
            await asyncio.shield(self._asking)
            if name not in self._told and self._silent:
                raise UnavailableError("not every gateway answers just now", retry_after_s=PAUSE_S)
        return self._told.get(name)

    async def _ask_again(self) -> None:
        try:
            await asyncio.sleep(self._asked_at + PAUSE_S - time.monotonic())
            self._asked_at = time.monotonic()
            await self.told()
        finally:
            self._asking = None
