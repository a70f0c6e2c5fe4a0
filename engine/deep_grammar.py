"""Arguments whose lists and objects aren't written as JSON either: in a spelling with quotes of its own, or as tags in tags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvasir.engine.argument_grammar import ArgumentRules
from kvasir.engine.argument_schema import ARRAY, NUMBER, OBJECT, TEXT, Json, apart, bounds_of, branches_of, values_of
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.argument_text import ANY, plain, slashed
from kvasir.engine.raw_values import kinds_of, opened

MAX_DEPTH = 32
"""Of schemas in schemas."""
LEVELS = 3
"""Of lists and objects in a value that may be anything."""
ITEM = "item"
"""The name of a list's items, as tags."""


def argument_rules(style: ArgumentStyle, schema: Json, out: Any, *, exact: bool) -> ArgumentRules:
    """The rules of a style."""
    kinds: dict[str, type[ArgumentRules]] = {"quoted": QuotedRules, "nested": NestedRules}
    return kinds.get(style.texts, ArgumentRules)(style, schema, out, exact=exact)


class QuotedRules(ArgumentRules):
    """Texts stand between quotes that JSON doesn't have, wherever they are."""

    def __init__(self, style: ArgumentStyle, schema: Json, out: Any, *, exact: bool) -> None:
        super().__init__(style, schema, out, exact=exact)
        self._values: dict[int, str | None] = {}
        """Rules of values by their schemas' identity; None: it is being made."""
        self._depth = 0

    def _value(self, schema: Any) -> str:
        return self._held_value(self._schema(schema))

    def _held_value(self, schema: Json) -> str:
        """A value whose texts stand between quotes that JSON doesn't have, or between tags, wherever they are. One rule for each
        schema, however often it is referred to."""
        key = id(schema)  # `_schemas` keeps it
        if key not in self._values:
            if self._depth == MAX_DEPTH:
                self._skip(f"a schema of more than {MAX_DEPTH} levels")
                return self._anything()
            self._depth += 1
            self._values[key] = None
            self._values[key] = self._made(schema)
            self._depth -= 1
        if (rule := self._values[key]) is None:
            self._skip("a schema that holds itself")
            return self._anything()
        return rule

    def _made(self, schema: Json) -> str:
        if not schema:
            return self._anything()
        if (values := values_of(schema)) is not None:
            spelled = [self._spelled(value) for value in values]
            return self._anything() if None in spelled else str(self._out.rule(" | ".join(map(str, spelled))))
        if (several := branches_of(schema)) is not None:
            name, given = several
            self._only(schema, frozenset({name, "type"}), name)
            branches = [self._schema(one) for one in given]
            if name == "oneOf" and not apart(branches):
                self._skip("oneOf whose branches aren't told apart by their types")
            return str(self._out.rule(" | ".join(self._held_value(one) for one in branches)))
        kinds = sorted(kinds_of(schema))
        if not kinds:
            self._only(schema, frozenset(), "a parameter without a type")
            return self._anything()
        return str(self._out.rule(" | ".join(self._of_kind(kind, schema) for kind in kinds)))

    def _of_kind(self, kind: str, schema: Json) -> str:
        if kind == "string":
            return self._between_quotes(self._held(schema))
        if kind == "array":
            self._only(schema, ARRAY | TEXT | NUMBER | OBJECT, "an array")
            return self._array(schema)
        if kind == "object":
            self._only(schema, OBJECT | TEXT | NUMBER | ARRAY, "an object")
            return str(self._out.rule(f'"{{" {self._members(schema, self._argument)} "}}"'))
        return self._plain_json({name: schema[name] for name in schema if name in NUMBER} | {"type": kind})

    def _array(self, schema: Json) -> str:
        least, most = bounds_of(schema, "minItems", "maxItems")
        if most == 0:
            return str(self._out.rule('"[]"'))
        item = self._held_value(self._schema(schema.get("items", {})))
        many = f'{item} ("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        return str(self._out.rule(f'"[" {many} "]"' + (' | "[]"' if not least else "")))

    def _between_quotes(self, fits: Sequence[str]) -> str:
        quote = self._style.quote
        head, rest = self._out.split(quote)
        bar = f"~/{ANY}*({'|'.join(slashed(plain(mark)) for mark in (quote, *self._style.marks))}){ANY}*/"
        body = " & ".join([*(f"/{slashed(one)}/" for one in fits or [f"{ANY}*"]), bar])
        text = self._out.token(body)
        if rest:
            begun = self._out.token(f"{text} {json.dumps(head)}") if head else text
            return str(self._out.rule(f"{self._out.literal(quote)} {begun} {rest}"))
        return str(self._out.rule(f"{self._out.literal(quote)} {self._out.lazy(f'{text} {json.dumps(quote)}')}"))

    def _spelled(self, value: Any) -> str | None:
        """One value; None: it can't be."""
        self._out.steps.add()
        literal, quote = self._out.literal, self._style.quote
        if isinstance(value, str):
            return " ".join([literal(quote), *([literal(value)] if value else []), literal(quote)])
        if isinstance(value, list):
            items = [self._spelled(one) for one in value]
            joined = ' "," '.join(map(str, items))
            return None if None in items else f'"[" {joined} "]"'
        if isinstance(value, dict):
            self._skip("an enum of objects")
            return None
        return str(literal(json.dumps(value)))

    def _anything(self) -> str:
        """Any value, with a few levels of lists and objects."""
        return self._named("any", self._any)

    def _any(self) -> str:
        rule, style = self._out.rule, self._style
        scalar = self._plain_json({"type": ["number", "boolean", "null"]})
        found = str(rule(f"{self._between_quotes([])} | {scalar}"))
        name = self._out.token(r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}/")
        before, behind = (self._loose(one) for one in style.key)
        for _ in range(LEVELS):
            member = rule(f"{before} {name} {behind} {found}")
            listed, held_ = (f'({one} ("," {one})*)?' for one in (found, member))
            found = str(rule(f'{found} | "[" {listed} "]" | "{{" {held_} "}}"'))
        return found


class NestedRules(QuotedRules):
    """Texts as they are; each member of an object, and each item of a list, has tags around it. What has no such tags is read by
    its schema's types, as raw texts are."""

    def _made(self, schema: Json) -> str:
        if not schema:
            return self._anything()
        branches = [schema]
        if values_of(schema) is None and (several := branches_of(schema)) is not None:
            name, given = several
            self._only(schema, frozenset({name, "type"}), name)
            branches = [self._schema(one) for one in given]
            if not (apart(branches) if name == "oneOf" else _readable(branches)):
                self._skip(f"{name} whose branches aren't told apart by their types")
        if not all(kinds_of(one) or {"enum", "const"} & set(one) for one in branches):
            self._only(schema, frozenset({"anyOf", "oneOf"}), "a parameter without a type")
            return self._anything()
        read_by = opened(schema, self._root)
        ways = [way for branch in branches for way in self._ways(branch, read_by)]
        return str(self._out.rule(" | ".join(ways))) if ways else self._anything()

    def _ways(self, branch: Json, schema: Json) -> list[str]:
        """To write values of a branch of what is read by `schema`."""
        if (values := values_of(branch)) is not None:
            return self._literals(values, branch, schema)[0]
        kinds = kinds_of(schema)
        found = []
        for kind in sorted(kinds_of(branch)):
            if kind == "string":
                found.append(self._text(self._held(branch), kinds))
            elif kind in ("array", "object"):
                found += self._container(kind, branch, kinds)
            elif "string" not in kinds or kind not in ("integer", "number"):  # they would be read as texts
                found.append(self._json({name: branch[name] for name in branch if name in NUMBER} | {"type": kind}))
        return found

    def _container(self, kind: str, schema: Json, kinds: set[str]) -> list[str]:
        """Those that are told from the other kinds."""
        if {"array", "object"} <= kinds:
            self._skip("a list or an object")
        end = self._out.literal(self._style.end)
        if kind == "object":
            self._only(schema, OBJECT | TEXT | NUMBER | ARRAY, "an object")
            if "string" in kinds and not schema.get("required"):
                self._skip("a text, or an object that may be empty")
            return [str(self._out.rule(f"{self._members(schema, self._argument)} {end}"))]
        self._only(schema, ARRAY | TEXT | NUMBER | OBJECT, "an array")
        least, most = bounds_of(schema, "minItems", "maxItems")
        least = max(least, 1) if "string" in kinds else least
        if most is not None and most < least:
            return []
        one = self._argument(ITEM, schema.get("items", {}))
        return [str(self._out.rule(f"({one}){{{least},{'' if most is None else most}}} {end}"))]

    def _any(self) -> str:
        rule, style = self._out.rule, self._style
        assert style.again is not None
        found, end = self._text([], set()), self._out.literal(style.end)
        name = self._out.token(r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}/")
        before, behind, shut, last = (self._out.literal(one) for one in (*style.key, *style.again))
        for _ in range(LEVELS):
            member = rule(f"{before} {name} {behind} {found} {shut} {name} {last}")
            item = rule(f"{before} {json.dumps(ITEM)} {behind} {found} {shut} {json.dumps(ITEM)} {last}")
            found = str(rule(f"{found} | {item}+ {end} | {member}+ {end}"))
        return found


def _readable(branches: Sequence[Json]) -> bool:
    """Tags say by themselves which branch they are of."""
    kinds = [kind for one in branches for kind in kinds_of(one)]
    return max(kinds.count("array"), kinds.count("object")) <= 1
