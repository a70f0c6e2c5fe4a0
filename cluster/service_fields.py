"""Fields of OpenAI's bodies that say how a request is served, not what it answers: tier, storage, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.cluster.described import described
from kvasir.engine.errors import ClientError
from kvasir.engine.schema import check_depth

TIERS = {"auto": 0, "default": 0, "scale": 0, "flex": 100, "priority": -100, "fast": -100, "ultrafast": -100}
"""service_tier -> what is added to the request's priority (lower is served first)."""
BATCH_PRIORITY = 1_000_000
"""Behind everything that somebody waits for."""
MAX_LABELS, MAX_LABEL, MAX_VALUE = 16, 64, 512
"""Of metadata: how many, and the length of each name and value."""
MAX_NESTING = 200
"""Levels of a field that is kept."""


@described(type="string", enum=[*TIERS])
def check_tier(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in TIERS:
        raise ClientError(f"{name} must be one of {', '.join(TIERS)}; got {value!r:.60}", param=name)


def of_batch(priority: int) -> bool:
    """Whether nobody waits for a request of that priority."""
    return priority >= BATCH_PRIORITY + min(TIERS.values())


def tier_served(given: str | None) -> str:
    """What an answer says about the tier that was asked for."""
    return {"auto": "default", "fast": "priority", "ultrafast": "priority"}.get(given or "auto", given or "default")


def priority(fields: Mapping[str, Any]) -> int:
    """Of a body's priority and service_tier."""
    given: int = fields.get("priority", 0)
    return max(-(2**31), min(2**31 - 1, given + TIERS[fields.get("service_tier", "auto")]))


def in_session(headers: Mapping[str, str], session: str) -> Mapping[str, str]:
    """`headers` with what a body says belongs together, unless they say it themselves."""
    return {"x-session-id": session, **headers} if session else headers


@described(
    type="object", maxProperties=MAX_LABELS, propertyNames={"maxLength": MAX_LABEL},
    additionalProperties={"type": "string", "maxLength": MAX_VALUE},
)  # fmt: skip
def check_metadata(name: str, value: Any) -> None:
    """Up to 16 pairs of strings, as OpenAI has them."""
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise ClientError(f"{name} must be an object of up to {MAX_LABELS} pairs, got {value!r:.60}", param=name)
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > MAX_LABEL or len(text) > MAX_VALUE:
            limits = f"names of up to {MAX_LABEL} and texts of up to {MAX_VALUE} characters"
            raise ClientError(f"{name} must hold {limits}; got {key!r:.80}: {text!r:.60}", param=name)


def check_nesting(fields: Mapping[str, Any]) -> None:
    """ClientError names the field that is nested too deep to be kept: what writes JSON goes 254 levels down."""
    for name, value in fields.items():
        check_depth(value, MAX_NESTING, name, param=name)
