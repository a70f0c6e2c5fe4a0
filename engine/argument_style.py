"""How families of models write arguments that aren't one JSON object, as structural tags have it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvasir.engine.errors import ClientError

PARAM = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class ArgumentStyle:
    """How a family of models writes arguments."""

    key: tuple[str, str]
    """What stands before an argument's name, and behind it."""
    key_json: str | None = None
    """Behind the name of an argument that is JSON, with KIND for its type; None: the same."""
    end: str = ""
    """What stands behind a value."""
    again: tuple[str, str] | None = None
    """And behind that the argument's name once more: what stands before and behind it."""
    between: str = ""
    """And between two arguments."""
    texts: Literal["raw", "json", "quoted", "nested"] = "raw"
    """How texts are written: as they are, up to `end`; as JSON; between `quote`s, and what holds them likewise; as they are, and
    each member and item of what holds them as an argument."""
    quote: str = ""
    marks: tuple[str, ...] = ()
    """What a raw text can't hold, as it would end it."""
    edge: str = ""
    """What may stand around a value, and isn't a part of it."""
    gap: str = ""
    """What may stand around an argument."""
    escapes: bool = False
    """Entities of XML in texts are read."""


def style_json(style: ArgumentStyle) -> dict[str, Any]:
    """As a structural tag has it."""
    fields = {name: getattr(style, name) for name in style.__dataclass_fields__}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def style_of(form: Mapping[str, Any]) -> ArgumentStyle:
    """The same from a structural tag. ClientError when it isn't one."""
    given: dict[str, Any] = {name: form[name] for name in ArgumentStyle.__dataclass_fields__ if name in form}
    lists = [given.get("key"), given.get("marks", []), given.get("again") or ["", ""]]
    texts = [given.get(name) or "" for name in ("key_json", "end", "between", "quote", "edge", "gap")]
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists) or not (
        all(isinstance(one, str) for one in texts)
        and len(lists[0]) == len(lists[2]) == 2
        and isinstance(given.get("escapes", True), bool)
    ):
        raise ClientError("structural tag: arguments has key (two texts), end, between, marks, ...", param=PARAM)
    if given.get("texts", "raw") not in ("raw", "json", "quoted", "nested"):
        raise ClientError('structural tag: texts must be "raw", "json", "quoted" or "nested"', param=PARAM)
    fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}
    return ArgumentStyle(**fields)
