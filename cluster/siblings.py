"""What the gateways of an application say about themselves, each under its name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Ask = Callable[[], Awaitable[Sequence[Any]]]
"""What every gateway answers: (its name, something), or the exception that came instead. Raises TimeoutError."""


class Siblings:
    """The answers to one question. Who doesn't answer is taken to be as it was, until all others answer without it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._told: dict[str, Any] = {}

    async def told(self) -> dict[str, Any]:
        """Ask; name -> what it said, or said last."""
        try:
            answers = await self._ask()
        except TimeoutError:
            return dict(self._told)
        said = dict(answer for answer in answers if not isinstance(answer, BaseException))
        self._told = said if len(said) == len(answers) else self._told | said
        return dict(self._told)
