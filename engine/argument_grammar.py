"""Arguments of a call that aren't one JSON object, as rules of a grammar: a tag for each, or a list as programs have it.

What these rules let through, read back as `raw_values` says, satisfies the schema. Arguments come in the schema's order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvasir.engine.argument_schema import (
    ARRAY,
    NOTES,
    NUMBER,
    OBJECT,
    TEXT,
    Json,
    branches_of,
    kinds_of_value,
    members_of,
    same,
    values_of,
)
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.argument_text import ANY, held, other_readings, plain, refused, slashed
from kvasir.engine.errors import ClientError
from kvasir.engine.loose_schema import loosened
from kvasir.engine.raw_values import kinds_of, resolved, typed

_ANYTHING: Json = {}
_KINDS = ("array", "boolean", "null", "number", "object")


class ArgumentRules:
    """Rules for the arguments of one tool. `out` (a `_Writer` of structural tags) names them. not exact: what can't be
    enforced is skipped over."""

    def __init__(self, style: ArgumentStyle, schema: Json, out: Any, *, exact: bool) -> None:
        self._style, self._root, self._out, self._exact = style, schema, out, exact
        self._known: dict[str, str] = {}
        self._schemas: dict[int, tuple[Any, Json]] = {}
        self.skipped: list[str] = []
        self._told = style.key_json is not None
        """Whether a value is a text is written beside it."""

    def write(self) -> str:
        """The name of the rule of all arguments."""
        schema = resolved(self._root, self._root)
        self._only(schema, OBJECT, "parameters")
        return self._members(schema, self._argument)

    # -- members of objects

    def _members(self, schema: Json, member: Callable[[str, Any], str]) -> str:
        """All arguments, each at most once, those that are required always."""
        properties, required = members_of(schema)
        more = schema.get("additionalProperties", True)
        if not properties and more is not False:
            return self._free(more)
        gap, between = self._gap(), self._style.between
        none = some = self._out.rule('""')  # what may follow when nothing, or something, was written
        for name in reversed(properties):
            if not self._writable(name):
                self._skip(f"a parameter of the name {name!r:.60}")
                continue
            one = self._out.rule(f"{member(name, properties[name])} {gap}")
            then = f"{one} {some}"
            follow = f"{self._out.literal(between)} {then}" if between else then
            if name in required:
                none, some = self._out.rule(then), self._out.rule(follow)
            else:
                none, some = self._out.rule(f"{then} | {none}"), self._out.rule(f"{follow} | {some}")
        return str(self._out.rule(f"{gap} {none}"))

    def _free(self, schema: Any) -> str:
        """Any arguments at all."""
        style, gap = self._style, self._gap()
        name = self._out.token(r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}/")
        before = self._loose(style.key[0])
        one = self._choices(lambda behind: f"{before} {name} {behind}", {} if schema is True else schema)
        if style.again is not None:
            one = self._out.rule(
                f"{one} {self._out.literal(style.again[0])} {name} {self._out.literal(style.again[1])}"
            )
        one = self._out.rule(f"{one} {gap}")
        between = self._out.literal(style.between) if style.between else ""
        return str(self._out.rule(f"{gap} ({one} ({between} {one})*)?"))

    def _argument(self, name: str, schema: Any) -> str:
        """One, with its name."""
        before, again = self._loose(self._style.key[0] + name), self._style.again
        one = self._choices(lambda behind: f"{before} {behind}", schema)
        return one if again is None else str(self._out.rule(f"{one} {self._out.literal(name.join(again))}"))

    def _choices(self, head: Callable[[str], str], schema: Any) -> str:
        """A value behind what stands before it, which may tell what it is. head: of what stands behind the name."""
        style, schema = self._style, self._schema(schema)
        plainly = head(self._loose(style.key[1]))
        if style.key_json is None or style.texts != "raw":
            return str(self._out.rule(f"{plainly} {self._value(schema)}"))
        texts, others = self._raw(schema)
        told = head(self._kind(style.key_json, kinds_of(schema) - {"string"}))
        return str(
            self._out.rule(" | ".join([f"{plainly} {one}" for one in texts] + [f"{told} {one}" for one in others]))
        )

    def _kind(self, text: str, kinds: set[str]) -> str:
        """Where KIND stands one of the types; all of JSON's, if none is said."""
        before, kind, behind = text.partition("KIND")
        if not kind:
            return self._loose(text)
        words = sorted({"number" if one == "integer" else one for one in kinds} or _KINDS)
        return f"{self._loose(before)} ({' | '.join(map(json.dumps, words))}) {self._loose(behind)}"

    def _writable(self, name: str) -> bool:
        """Whether an argument of that name is read as one."""
        style = self._style
        if name != name.strip() or not name or any(mark and mark in name for mark in (style.key[1], *style.marks, '"')):
            return False
        if style.texts in ("raw", "nested"):
            return style.texts == "raw" or not name.startswith("/")
        return re.fullmatch(r"[A-Za-z0-9_.$/-]+", name) is not None

    def _value(self, schema: Any) -> str:
        """A value and what ends it."""
        schema = self._schema(schema)
        if self._style.texts == "raw":
            texts, others = self._raw(schema)
            return str(self._out.rule(" | ".join([*texts, *others])))
        return self._programs(schema)

    def _edge(self) -> str:
        return self._maybe(self._style.edge)

    def _gap(self) -> str:
        return self._maybe(self._style.gap)

    def _maybe(self, text: str) -> str:
        """It, or nothing."""
        return self._named(text, lambda: str(self._out.rule(f'{json.dumps(text)} | ""'))) if text else ""

    def _loose(self, text: str) -> str:
        """In which gaps may be left out."""
        parts = text.split(self._style.gap) if self._style.gap else [text]
        return f" {self._gap()} ".join(self._out.literal(part) if part else "" for part in parts)

    # -- texts as they are

    def _raw(self, schema: Json) -> tuple[list[str], list[str]]:
        """(ways to write it as text, as JSON), each with what ends it."""
        if (values := values_of(schema)) is not None:
            texts, others = self._literals(values, schema, schema)
            return texts, [self._json({"enum": others})] if others else []
        kinds = kinds_of(schema)
        if (several := branches_of(schema)) is not None:
            return self._branches(schema, *several)
        if not kinds:
            self._only(schema, frozenset(), "a parameter without a type")
            return [self._text([], kinds)], []
        if "string" not in kinds:
            return [], [self._json(schema)]
        texts, rest = self._parted(schema, kinds)
        return texts, [self._json(one) for one in rest]

    def _parted(self, schema: Json, kinds: set[str]) -> tuple[list[str], list[Json]]:
        """(as text, what it may be besides). kinds: all that the text may be read as."""
        other = kinds_of(schema) - {"string"}
        rest = sorted(other if self._told else other - {"integer", "number"})  # numbers would be read as texts
        return [self._string(schema, kinds)], [{**schema, "type": rest}] if rest else []

    def _branches(self, schema: Json, name: str, several: Sequence[Any]) -> tuple[list[str], list[str]]:
        """Of anyOf and oneOf: texts, and everything else as one schema."""
        self._only(schema, frozenset({name, "type"}), name)
        branches = [self._schema(one) for one in several]
        kinds = set().union(*map(kinds_of, branches))
        texts: list[str] = []
        others: list[Any] = []
        for branch in branches:
            own = kinds_of(branch)
            if not own and not {"enum", "const"} & set(branch):
                self._skip(f"{name} with a branch without a type")
                return [self._text([], set())], []
            if "string" in own or not own:
                found, more = self._raw_of(branch, kinds)
                texts += found
                others += more
            elif self._told or "string" not in kinds or not own <= {"integer", "number"}:
                others.append(branch)
        if len(texts) > 1 and name == "oneOf":
            self._skip("oneOf with several branches of texts")
        return texts, [self._json({name: others})] if others else []

    def _raw_of(self, branch: Json, kinds: set[str]) -> tuple[list[str], list[Any]]:
        """(texts of a branch, what else it takes as a schema). kinds: of all branches."""
        if (values := values_of(branch)) is not None:
            texts, others = self._literals(values, branch, {"type": sorted(kinds | {"string"})})
            return texts, [{"enum": others}] if others else []
        return self._parted(branch, kinds)

    def _literals(self, values: Sequence[Any], schema: Json, read_as: Json) -> tuple[list[str], list[Any]]:
        """(each value that its text is read as, those that aren't texts where that is told)."""
        self._out.steps.add(len(values))
        others = [value for value in values if self._told and not isinstance(value, str)]
        values = [value for value in values if not self._told or isinstance(value, str)]
        kinds, found = kinds_of({"type": schema.get("type")}), []
        for value in values:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if kinds and not (kinds_of_value(value) & kinds):
                continue
            whole = text.strip(self._style.edge or "\0") == text and not any(mark in text for mark in self._style.marks)
            if whole and (self._told or same(typed(text, read_as), value)):
                found.append(self._ended(text.replace("&", "&amp;") if self._style.escapes else text))
        if not found and not others:
            self._skip("an enum or const of values that can't be told from others")
            found.append(self._text([], set()))
        return found, others

    def _ended(self, text: str) -> str:
        edge = self._edge()
        written = self._out.literal(text) if text else ""
        return str(self._out.rule(f"{edge} {written} {edge} {self._out.literal(self._style.end)}"))

    def _string(self, schema: Json, kinds: set[str]) -> str:
        return self._text(self._held(schema), kinds)

    def _held(self, schema: Json) -> list[str]:
        """Regular expressions that a text fits."""
        self._only(schema, TEXT | NUMBER | ARRAY | OBJECT, "a text")
        return held(schema, self._skip)

    def _text(self, fits: Sequence[str], kinds: set[str]) -> str:
        """A raw text and its end. What would be read as something else isn't one."""
        style = self._style
        barred = [f"{ANY}*({'|'.join(plain(mark) for mark in style.marks)}){ANY}*"] if style.marks else []
        if "string" in kinds and not self._told and (others := other_readings(kinds)):
            barred.append(rf"\s*({'|'.join(others)})\s*")
        if fits and style.edge:
            edge = plain(style.edge)
            barred += [f"{edge}{ANY}*", f"{ANY}*{edge}"]
        if fits and style.escapes:
            barred.append(f"{ANY}*&{ANY}*")
        body = " & ".join(
            [*(f"/{slashed(one)}/" for one in fits or [f"{ANY}*"]), *(f"~/{slashed(one)}/" for one in barred)]
        )
        head, rest = self._out.split(style.end)
        text = self._out.token(body)
        if not rest:
            return str(self._out.lazy(f"{text} {json.dumps(head)}"))
        begun = self._out.token(f"{text} {json.dumps(head)}") if head else text
        return str(self._out.rule(f"{begun} {rest}"))

    def _json(self, schema: Json) -> str:
        edge = self._edge()
        return str(self._out.rule(f"{edge} {self._plain_json(schema)} {edge} {self._out.literal(self._style.end)}"))

    def _plain_json(self, schema: Json) -> str:
        shared = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        whole = {**shared, **schema}
        whole, skipped = loosened(whole, self._out.steps)
        for what in skipped:
            self._skip(what)
        return str(self._out.json(whole, lenient=not self._exact))

    # -- as programs write them

    def _programs(self, schema: Json) -> str:
        """JSON, whose words are Python's where they stand alone; with a tag behind it, just JSON."""
        if self._style.end:
            return self._json(schema)
        if schema.get("type") == "boolean" and not {"enum", "const"} & set(schema):
            return str(self._out.rule('"True" | "False"'))
        return self._plain_json(schema)

    # --

    def _named(self, name: str, make: Callable[[], str]) -> str:
        """A rule that is made once."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def _schema(self, schema: Any) -> Json:
        """Resolved; true is {}. The same one each time for what is the same."""
        self._out.steps.add()
        found = resolved(schema, self._root)
        if found is True:
            return _ANYTHING
        if id(found) in self._schemas:
            return self._schemas[id(found)][1]
        if not isinstance(found, Mapping) or "x-guidance" in found:
            raise ClientError(f"a parameter's schema must be an object, got {found!r:.60}", param="tools")
        said = {name: value for name, value in found.items() if name not in NOTES}
        self._schemas[id(found)] = found, said  # both kept: what is gone leaves its identity to others
        self._schemas[id(said)] = said, said
        return said

    def _only(self, schema: Any, known: frozenset[str], what: str) -> None:
        """UnsupportedError names a keyword that isn't in `known`."""
        if not isinstance(schema, Mapping):
            raise ClientError(f"parameters must be a JSON Schema, got {schema!r:.60}", param="tools")
        for name in schema:
            if name not in known and name not in NOTES:
                self._skip(f"{name:.60} of {what}")

    def _skip(self, what: str) -> None:
        """It isn't enforced: UnsupportedError where it has to be."""
        if self._exact:
            raise refused(what)
        self.skipped.append(what)
