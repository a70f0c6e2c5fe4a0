"""What is said inside of messages and read by nobody here: names for the warning that tells of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

_EMPTY: tuple[Any, ...] = (None, "", [], {})


def overlooked(place: str, things: Iterable[Any], known: Collection[str]) -> tuple[str, ...]:
    """`place.name`, each once, of the fields of `things` that aren't `known` and say something."""
    found: dict[str, None] = {}
    for thing in things:
        if isinstance(thing, dict):
            found |= {name: None for name in thing if name not in known and thing[name] not in _EMPTY}
    return tuple(f"{place}.{name}" for name in found)


def parts_of(things: Iterable[Any], *names: str) -> list[Any]:
    """The parts of which the fields `names` of `things` consist, where they consist of any."""
    fields = [thing.get(name) for thing in things if isinstance(thing, dict) for name in names]
    return [part for field in fields if isinstance(field, list) for part in field]
