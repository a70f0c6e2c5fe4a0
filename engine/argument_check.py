"""Whether a tool's schema can be held to where arguments aren't one JSON object, without compiling a grammar."""

from __future__ import annotations

import json
from typing import Any

from kvasir.engine.argument_schema import Json, Steps
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.deep_grammar import argument_rules


def check_arguments(schema: Json, style: ArgumentStyle, *, exact: bool, steps: Steps | None = None) -> tuple[str, ...]:
    """What of a schema isn't enforced in this style; exact: UnsupportedError when there is such a thing, as far as that is
    known without compiling it. Another ClientError when it is none, or stands for too much. steps: shared by all tools of a
    call."""
    rules = argument_rules(style, schema, _Names(steps or Steps()), exact=exact)
    rules.write()
    return tuple(dict.fromkeys(rules.skipped))


class _Names:
    """Where rules go that nobody wants."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def rule(self, body: str) -> str:
        self.steps.add()
        return "r"

    def token(self, body: str) -> str:
        self.steps.add()
        return "T"

    def lazy(self, body: str) -> str:
        self.steps.add()
        return "l"

    def literal(self, text: str) -> str:
        return json.dumps(text)

    def split(self, text: str) -> tuple[str, str]:
        return text, ""

    def json(self, schema: Any, *, lenient: bool) -> str:
        return "j"
