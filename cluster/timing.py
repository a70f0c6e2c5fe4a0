"""Where a call's time went, as its caller is told: in a header, a field or a comment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.engine.event import Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTiming:
    """Milliseconds; of several continuations the longest."""

    queue_ms: float
    """Waiting in the group."""
    prefill_ms: float
    """From there to the first token."""
    decode_ms: float
    """From there to the last one."""
    total_ms: float
    """From the arrival at the gateway."""
    cached_tokens: int
    """Prompt tokens that weren't computed again."""
    group: str
    """Which group answered, or was the last to: the name of one life of it."""
    acceptance: float | None = None
    """The share of tokens proposed by speculation that were taken, of all continuations; None: none was proposed."""

    @classmethod
    def of(
        cls,
        timings: Iterable[Timing],
        *,
        total_s: float,
        cached_tokens: int,
        group: str,
        drafted: int = 0,
        accepted: int = 0,
    ) -> CallTiming:
        """From the groups' clocks (the first three) and the gateway's."""
        begun = [timing for timing in timings if timing.scheduled]
        made = [timing for timing in begun if timing.first_token]
        return cls(
            queue_ms=_longest(timing.scheduled - timing.queued for timing in begun),
            prefill_ms=_longest(timing.first_token - timing.scheduled for timing in made),
            decode_ms=_longest(timing.finished - timing.first_token for timing in made),
            total_ms=round(1000 * total_s, 3),
            cached_tokens=cached_tokens,
            group=group,
            acceptance=round(accepted / drafted, 3) if drafted else None,
        )

    @classmethod
    def together(cls, calls: Sequence[CallTiming], *, total_s: float) -> CallTiming:
        """Of what one request asked of groups, at least once: the longest of each; the group is the last one's."""
        spans = {name: max(getattr(call, name) for call in calls) for name in ("queue_ms", "prefill_ms", "decode_ms")}
        cached = max(call.cached_tokens for call in calls)
        return cls(**spans, total_ms=round(1000 * total_s, 3), cached_tokens=cached, group=calls[-1].group)

    def json(self) -> dict[str, Any]:
        """The `timing` field of answers."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}

    def text(self) -> str:
        """The value of a Server-Timing header (W3C)."""
        spans = ("queue", self.queue_ms), ("prefill", self.prefill_ms), ("decode", self.decode_ms)
        parts = [f"{name};dur={ms:g}" for name, ms in (*spans, ("total", self.total_ms))]
        facts = {"cached": self.cached_tokens, "group": self.group, "acceptance": self.acceptance}
        return ", ".join(parts + [f'{name};desc="{fact}"' for name, fact in facts.items() if fact is not None])

    def header(self) -> tuple[bytes, bytes]:
        return b"server-timing", self.text().encode()


def _longest(seconds: Iterable[float]) -> float:
    return round(1000 * max(0.0, *seconds, 0.0), 3)
