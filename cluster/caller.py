"""What both doors, HTTP and gRPC, tell of a request, and what they are given to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvasir.cluster.timing import CallTiming


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks for something to be computed."""

    principal: str
    request_id: str
    headers: Mapping[str, str]
    """Lower-case names; gRPC's metadata."""
    deadline_s: float | None = None
    """Seconds from now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What is asked of something stored."""

    principal: str
    id: str = ""
    item: str = ""
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """In one piece."""

    body: dict[str, Any]
    warnings: tuple[str, ...] = ()
    """Fields that were ignored."""
    timing: CallTiming | None = None
