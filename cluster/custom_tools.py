"""Custom tools of OpenAI's, whose input is a text. Chat templates know functions alone, so each is shown as one with a single
argument; what the model writes there is the input."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]

INPUT = "input"
"""The argument."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {"defer_loading": (None, False), "allowed_callers": (None, ["direct"])}
"""Fields that say nothing here by these values."""
_HEAD = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
_HEX, _HIGH, _LOW = r"[0-9a-fA-F]", r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_WHOLE = re.compile(
    rf"""(?: [^"\\]+ | \\[^u] | {_HIGH}(?:{_LOW} | (?=[^\\] | \\[^u] | \\u{_HEX}{{0,3}}[^0-9a-fA-F] | (?!{_LOW})\\u{_HEX}{{4}}))
    | (?!{_HIGH})\\u{_HEX}{{4}} | \\u(?={_HEX}{{0,3}}[^0-9a-fA-F]) )*""",
    re.VERBOSE | re.DOTALL,
)
"""Inside of a JSON string as far as no escape in it goes on behind."""
_ESCAPES = re.compile(rf"(?:\\u{_HEX}{{4}})+|\\.", re.DOTALL)
_SURROGATES = re.compile("[\ud800-\udfff]")


def chat_tool(tool: Mapping[str, Any], at: str) -> Json:
    """A tool of a response as chats have it: its fields in an object of their own."""
    kind = tool.get("type")
    if kind == "custom":
        return {"type": kind, kind: {name: value for name, value in tool.items() if name != "type"}}
    if kind != "function":
        known = 'of type "function" or "custom", which you run'
        raise UnsupportedError(f"{at}: only tools {known}, are supported; got {kind!r:.60}", param="tools")
    names = ("name", "description", "parameters", "strict")
    _check_fields(tool, ("type", *names), at, kind)
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def shown_tools(tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Tools of a chat as its template knows them. ClientError or UnsupportedError names what a custom one can't be."""
    return [_function(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def custom_grammars(tools: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> Lark grammar, or "", of custom ones among those that `shown_tools` takes."""
    custom = [tool["custom"] for tool in tools if tool.get("type") == "custom"]
    grammars = {one["name"]: _grammar(one.get("format"), "") for one in custom}
    return {name: definition if syntax == "lark" else "" for name, (syntax, definition) in grammars.items()}


def shown_call(call: Any, at: str) -> Any:
    """A call in a message of a chat as its template knows it."""
    if not isinstance(call, Mapping) or call.get("type") != "custom":
        return call
    custom = call.get("custom")
    if not isinstance(custom, Mapping) or not all(isinstance(custom.get(name), str) for name in ("name", INPUT)):
        raise ClientError(f"{at}.custom must have a name and an input, got {custom!r:.60}", param="messages")
    return {"id": call.get("id"), "type": "function", "function": called_function(custom["name"], custom[INPUT])}


def called_function(name: str, text: str) -> Json:
    """The call of a custom tool with that input."""
    return {"name": name, "arguments": {INPUT: text}}


def _check_fields(given: Mapping[str, Any], known: Collection[str], at: str, kind: str) -> None:
    """UnsupportedError names a field of a tool that would change something."""
    if other := [name for name in given if name not in known and given[name] not in _NEUTRAL.get(name, (None,))]:
        raise UnsupportedError(f"{at}: {other[0]:.60} of a {kind} isn't supported", param="tools")


def _function(tool: Mapping[str, Any], at: str) -> Json:
    if tool.get("type") != "custom":
        return dict(tool)
    given = tool.get("custom")
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ClientError(f"{at}.custom must be an object with a name, got {given!r:.60}", param="tools")
    _check_fields(given, ("name", "description", "format"), at, "custom tool")
    schema, strict = _schema(given.get("format"), f"{at}.format")
    parameters = {"type": "object", "properties": {INPUT: schema}, "required": [INPUT], "additionalProperties": False}
    said = {name: given[name] for name in ("name", "description") if given.get(name) is not None}
    return {"type": "function", "function": {**said, "parameters": parameters, **strict}}


def _schema(form: Any, at: str) -> tuple[Json, Json]:
    """(what the input's text is, whether it must be)."""
    syntax, definition = _grammar(form, at)
    if not syntax:
        return {"type": "string"}, {}
    if syntax == "lark":
        return {"type": "string", "description": f"A text that fits the Lark grammar\n{definition}"}, {"strict": True}
    told = f"A text that matches the regular expression {definition}"
    return {"type": "string", "description": told, "pattern": f"^(?:{definition})$"}, {"strict": True}


def _grammar(form: Any, at: str) -> tuple[str, str]:
    """(syntax, definition) of a format; of any text both are empty."""
    if form is None or form == {"type": "text"}:
        return "", ""
    grammar = form.get("grammar", form) if isinstance(form, Mapping) and form.get("type") == "grammar" else None
    if not isinstance(grammar, Mapping) or not isinstance(grammar.get("definition"), str):
        text = 'must be {"type": "text"}, or of type "grammar" with a syntax and a definition'
        raise ClientError(f"{at} {text}; got {form!r:.80}", param="tools")
    if (syntax := grammar.get("syntax")) not in ("lark", "regex"):
        raise ClientError(f'{at}: a grammar\'s syntax must be "lark" or "regex", got {syntax!r:.60}', param="tools")
    known = {"type", "grammar"} if grammar is not form else {"type", "syntax", "definition"}
    if other := [*({*form} - known), *({*grammar} - {"type", "syntax", "definition"})]:
        raise UnsupportedError(f"{at}: {other[0]:.60} of a grammar isn't supported", param="tools")
    return syntax, grammar["definition"]


class CustomInput:
    """The input in a call's arguments, however they are cut."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = self._over = False

    def feed(self, arguments: str) -> str:
        """What more of the arguments brings."""
        self._held += arguments
        if not self._begun and (head := _HEAD.match(self._held)):
            self._held, self._begun = self._held[head.end() :], True
        if not self._begun or self._over:
            return ""
        whole = _WHOLE.match(self._held)
        assert whole is not None, "it matches nothing, too"
        self._held, self._over = self._held[whole.end() :], self._held.startswith('"', whole.end())
        return _SURROGATES.sub("\ufffd", _ESCAPES.sub(_unescaped, whole[0]))

    def finish(self) -> str:
        """What is said by other arguments than those that were asked for: their whole text, unless the input is in it."""
        if self._begun:
            return ""
        try:
            given = json.loads(self._held)
        except (ValueError, RecursionError):
            return ""  # cut short before the input
        found = given.get(INPUT) if isinstance(given, dict) else None
        return _SURROGATES.sub("\ufffd", found) if isinstance(found, str) else self._held


def _unescaped(found: re.Match[str]) -> str:
    try:
        text: str = json.loads(f'"{found[0]}"')
    except ValueError:
        return found[0]
    return text
