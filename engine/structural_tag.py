"""Structural tags (vLLM's and xgrammar's JSON) as a Lark grammar: free text, in which tags hold a schema each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from kvasir.engine.argument_schema import Steps
from kvasir.engine.argument_style import ArgumentStyle, style_of
from kvasir.engine.deep_grammar import argument_rules
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.loose_schema import loosened
from kvasir.engine.schema import COMPILE_LIMIT_S, JSON_RULES, narrowed

PARAM = "structured_outputs"
_OPTION = re.compile(r"^[ \t]*[!?]*_?[a-z][\w-]*\[[^\]]*?\b(temperature|stop)\s*=", re.MULTILINE)
"""Of a Lark rule, which only the library's own sampling loop would honour."""


def tag_grammar(spec: Any, special: Mapping[str, int], rules: Mapping[str, Any] = JSON_RULES) -> str:
    """`{"structures": [...], "triggers": [...]}` or `{"format": {...}}`. Tags may begin and end with special tokens. rules: for
    the JSON in them."""
    return _Writer(special, rules).write(_format(spec))


_FIELDS = {
    "json_schema": ("json_schema", "lenient"),
    "const_string": ("value",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
    "arguments": ("json_schema", "lenient", *ArgumentStyle.__dataclass_fields__),
}
"""What a format says beside its type."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {"excludes": (None, []), "style": (None, "json")}
"""Fields of xgrammar's that say nothing by these values."""


def _only(form: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Of a constraint nothing is overlooked."""
    if other := [name for name in form if name not in known and form[name] not in _NEUTRAL.get(name, (None,))]:
        raise UnsupportedError(f"structural tag: {other[0]:.60} of {what} isn't supported", param=PARAM)


def _format(spec: Any) -> Any:
    if not isinstance(spec, dict):
        raise ClientError("a structural tag is an object", param=PARAM)
    if "format" in spec:
        _only(spec, ("type", "format"), "a structural tag")
        return spec["format"]
    _only(spec, ("type", "structures", "triggers"), "a structural tag")
    for one in _list(spec, "structures"):
        if isinstance(one, dict):
            _only(one, ("begin", "end", "schema", "json_schema"), "structures")
    tags = [
        {
            "begin": one.get("begin"),
            "end": one.get("end"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", one.get("json_schema", {}))},
        }
        for one in _list(spec, "structures")
        if isinstance(one, dict)
    ]
    return {"type": "triggered_tags", "triggers": spec.get("triggers"), "tags": tags}


class _Writer:
    """Collects rules; a format becomes the name of one."""

    def __init__(self, special: Mapping[str, int], rules: Mapping[str, Any]) -> None:
        self._special, self._json_rules = special, rules
        self._rules: list[str] = []
        self._count = 0
        self.steps = Steps(COMPILE_LIMIT_S)

    def write(self, form: Any) -> str:
        start = self._of(form)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _of(self, form: Any) -> str:
        kinds = {
            "json_schema": self._schema,
            "const_string": lambda f: self.rule(self.literal(_text(f, "value"))),
            "regex": lambda f: self.token(f"/{_text(f, 'pattern').replace('/', chr(92) + '/')}/"),
            "grammar": lambda f: self.rule(f"%lark {{\n{context_free(_text(f, 'grammar'))}\n}}"),
            "json_gap": lambda f: self._gap(),
            "any_text": lambda f: self.token(r"/(.|\n)*/"),
            "sequence": lambda f: self.rule(" ".join(self._of(one) for one in _list(f, "elements"))),
            "or": lambda f: self.rule(" | ".join(self._of(one) for one in _list(f, "elements"))),
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
            "arguments": self._arguments,
        }
        kind = form.get("type") if isinstance(form, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise UnsupportedError(f"structural tag: type {kind!r:.60}; known: {', '.join(kinds)}", param=PARAM)
        _only(form, ("type", *_FIELDS.get(kind, ())), kind)
        return kinds[kind](form)

    def _schema(self, form: Any) -> str:
        schema = form.get("json_schema", {})
        if not isinstance(schema, (dict, bool)) or (isinstance(schema, dict) and "x-guidance" in schema):
            raise ClientError(f"structural tag: json_schema must be a JSON Schema, got {schema!r:.60}", param=PARAM)
        lenient = form.get("lenient") is True
        if lenient and isinstance(schema, dict):
            schema, _ = loosened(schema, self.steps)
        return self.json(schema, lenient=lenient)

    def _arguments(self, form: Any) -> str:
        schema = form.get("json_schema", {})
        if not isinstance(schema, dict):
            raise ClientError("structural tag: json_schema of arguments must be an object", param=PARAM)
        return argument_rules(style_of(form), schema, self, exact=form.get("lenient") is not True).write()

    def _gap(self) -> str:
        """What may stand between JSON's marks."""
        pattern = self._json_rules.get("whitespace_pattern")
        return self.token(f"/({pattern})?/") if pattern else self.rule('""')

    def _tag(self, tag: Any) -> str:
        return self.rule(f"{self.literal(_text(tag, 'begin'))} {self._rest(tag)}")

    def _rest(self, tag: Any) -> str:
        """What stands between the begin and the end, and the end."""
        _only(tag, ("type", *_FIELDS["tag"]), "tag")
        return f"{self._of(tag.get('content', {'type': 'json_schema'}))} {self.literal(_text(tag, 'end'))}"

    def _triggered(self, form: Any) -> str:
        triggers = [one for one in _list(form, "triggers") if isinstance(one, str) and one]
        text = self.token(r"/(.|\n)*/")
        tags = [self._behind(tag, triggers, text) for tag in _list(form, "tags")]
        if not tags:
            raise ClientError("structural tag: tags must not be empty", param=PARAM)
        some = self.rule(" | ".join(tags))
        if form.get("stop_after_first"):
            return self.rule(some if form.get("at_least_one") else f"{some} | {text}")
        return self.rule(f"{some}{'+' if form.get('at_least_one') else '*'} {text}")

    def _behind(self, tag: Any, triggers: Sequence[str], text: str) -> str:
        """Free text up to a tag's trigger, then the tag."""
        begin = _text(tag, "begin")
        trigger = next((one for one in triggers if begin.startswith(one)), None)
        if trigger is None:
            raise ClientError(f"structural tag: no trigger begins {begin!r:.60}", param=PARAM)
        token = next((name for name in self._special if begin.startswith(name)), None)
        if token is not None:
            head = self.literal(begin)
            return self.rule(f"{text} {head} {self._rest(tag)}")
        self._count += 1
        head = f"lead_{self._count}"
        self._rules.append(f"{head}[lazy]: /(.|\\n)*/ {json.dumps(trigger)}")
        return self.rule(f"{head} {self.literal(begin[len(trigger) :])} {self._rest(tag)}")

    def _separated(self, form: Any) -> str:
        one = self.rule(" | ".join(self._tag(tag) for tag in _list(form, "tags")))
        if form.get("stop_after_first"):
            return one
        many = self.rule(f"{one} ({self.literal(_text(form, 'separator'))} {one})*")
        return many if form.get("at_least_one") else self.rule(f"{many}?")

    # -- for `argument_rules` too

    def json(self, schema: Any, *, lenient: bool) -> str:
        """A value of a JSON Schema."""
        body = narrowed(schema) if isinstance(schema, dict) else {}
        return self.rule(f"%json {json.dumps({**body, 'x-guidance': {**self._json_rules, 'lenient': lenient}})}")

    def lazy(self, body: str) -> str:
        """Text that ends as soon as it can."""
        self.steps.add(1 + len(body) // 1000)
        self._count += 1
        self._rules.append(f"lazy_{self._count}[lazy]: {body}")
        return f"lazy_{self._count}"

    def split(self, text: str) -> tuple[str, str]:
        """(what stands before the first special token, the rest)."""
        at = min((text.find(name) for name in self._special if name and name in text), default=len(text))
        return text[:at], self.literal(text[at:]) if at < len(text) else ""

    def literal(self, text: str) -> str:
        """Special tokens by their number, what is between them as text."""
        parts, left = [], text
        while left:
            at, name = min(
                ((left.find(name), name) for name in self._special if name and name in left),
                key=lambda found: (found[0], -len(found[1])),
                default=(len(left), ""),
            )
            parts += [json.dumps(left[:at])] if at else []
            parts += [f"<[{self._special[name]}]>"] if name else []
            left = left[at + len(name) :]
        return " ".join(parts)

    def rule(self, body: str) -> str:
        """The name of a new rule. Long ones count for several."""
        self.steps.add(1 + len(body) // 1000)
        self._count += 1
        self._rules.append(f"rule_{self._count}: {body}")
        return f"rule_{self._count}"

    def token(self, body: str) -> str:
        """The name of a new kind of text."""
        self.steps.add(1 + len(body) // 1000)
        self._count += 1
        self._rules.append(f"TOKEN_{self._count}: {body}")
        return f"TOKEN_{self._count}"


def context_free(text: str) -> str:
    """GBNF and EBNF are turned into Lark. UnsupportedError names what Lark's rules may ask of a sampler."""
    if (asked := _OPTION.search(text)) is not None:
        line = text.count("\n", 0, asked.end()) + 1
        raise UnsupportedError(f"the grammar's line {line}: {asked[1]} of a rule isn't supported", param=PARAM)
    try:
        return str(any_to_lark(text))
    except Exception as error:  # the library raises Exception itself when a rule is missing
        raise ClientError(f"structured output: the grammar can't be read: {error}", param=PARAM) from error


def _text(form: Any, key: str) -> str:
    value = form.get(key, "") if isinstance(form, dict) else None
    if not isinstance(value, str):
        raise ClientError(f"structural tag: {key} must be a text, got {value!r:.60}", param=PARAM)
    return value


def _list(form: Any, key: str) -> list[Any]:
    value = form.get(key)
    if not isinstance(value, list) or not value:
        raise ClientError(f"structural tag: {key} must be a list that isn't empty, got {value!r:.60}", param=PARAM)
    return value
