"""Heirs: streams that are ready to go on with a request when its group has said its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvasir.cluster.group_client import Placement


class Heir(Protocol):
    """A stream that goes on."""

    @property
    def placement(self) -> Placement: ...

    def close(self) -> None: ...


H = TypeVar("H", bound=Heir)


@dataclass(frozen=True, slots=True)
class Heirs(Generic[H]):
    """Streams that are ready to go on with a request."""

    streams: dict[int, H]
    """Continuation -> its stream; or WHOLE -> one for all."""
    told: dict[int, int]
    """Continuation -> tokens of it that they know of."""

    @property
    def placement(self) -> Placement:
        return next(iter(self.streams.values())).placement

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
