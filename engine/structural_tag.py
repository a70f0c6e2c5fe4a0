"""Structural tags (vLLM's and xgrammar's JSON) as a Lark grammar: free text, in which tags hold a schema each."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from kvasir.engine.argument_schema import Steps
from kvasir.engine.argument_style import ArgumentStyle, style_of
from kvasir.engine.deep_grammar import argument_rules
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.loose_schema import loosened
from kvasir.engine.schema import COMPILE_LIMIT_S, JSON_RULES, narrowed
from kvasir.engine.tag_terminals import (
    PARAM,
    REPEATS,
    TRIGGERED,
    Terminals,
    first_of,
    is_closed,
    is_open,
    is_several,
    list_of,
    text_of,
    texts_of,
    times_of,
)

_OPTION = re.compile(r"^[ \t]*[!?]*_?[a-z][\w-]*\[[^\]]*?\b(temperature|stop)\s*=", re.MULTILINE)
"""Of a Lark rule, which only the library's own sampling loop would honour."""


def tag_grammar(spec: Any, special: Mapping[str, int], rules: Mapping[str, Any] = JSON_RULES) -> str:
    """`{"structures": [...], "triggers": [...]}` or `{"format": {...}}`. Tags may begin and end with special tokens. rules: for
    the JSON in them."""
    return _Writer(special, rules).write(_format(spec))


_FIELDS = {
    "json_schema": ("json_schema", "lenient"),
    "qwen_xml_parameter": ("json_schema", "lenient"),
    "arguments": ("json_schema", "lenient", *ArgumentStyle.__dataclass_fields__),
    "const_string": ("value",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "json_gap": (),
    "any_text": ("excludes",),
    "token": ("token",),
    "sequence": ("elements",),
    "or": ("elements",),
    "optional": ("content",),
    "star": ("content",),
    "plus": ("content",),
    "repeat": ("content", "min", "max"),
    "tag": ("begin", "content", "end"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first", "excludes"),
    "token_triggered_tags": ("trigger_tokens", "tags", "at_least_one", "stop_after_first", "exclude_tokens"),
    "dispatch": ("rules", "loop", "excludes"),
    "token_dispatch": ("rules", "loop", "exclude_tokens"),
}
"""Formats, and what each says beside its type."""
_ENDLESS = re.compile(r"(?s:[^|()]*)(?<!\\)\.[*+]|\(\?s:\.[*+]\)|\(\?s:\.\)[*+]")
"""Patterns that go on over whatever stands behind them: those of which that is plain."""
_FLAGS = {"at_least_one", "stop_after_first", "loop"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "excludes": (None, []),
    "style": (None, "json"),
    "any_order": (None, False),
    "any_whitespace": (None, True),
    "strict_mode": (None, False),
}
"""Fields of xgrammar's that say nothing by these values."""
_QWEN_XML = ArgumentStyle(
    key=("<parameter=", ">"), end="</parameter>", marks=("</parameter>", "</function>"), edge="\n", gap="\n"
)
_NOTHING = {"type": "const_string", "value": ""}


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
    for one in list_of(spec, "structures"):
        if isinstance(one, dict):
            _only(one, ("begin", "end", "schema", "json_schema"), "structures")
    tags = [
        {
            "begin": one.get("begin"),
            "end": one.get("end"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", one.get("json_schema", {}))},
        }
        if isinstance(one, dict)
        else one
        for one in list_of(spec, "structures")
    ]
    return {"type": "triggered_tags", "triggers": spec.get("triggers"), "tags": tags}


class _Writer:
    """Collects rules; a format becomes the name of one."""

    def __init__(self, special: Mapping[str, int], rules: Mapping[str, Any]) -> None:
        self._special, self._json_rules = special, rules
        self._names = {number: name for name, number in special.items()}
        self._rules: list[str] = []
        self._count = 0
        self._held: dict[str, bool] = {}
        """Whether texts hold special tokens: of these there are thousands."""
        self.steps = Steps(COMPILE_LIMIT_S)
        self._terminals = Terminals(self._ends_of, self._holds_special, self._kind, self.token)

    def write(self, form: Any) -> str:
        start = self._of(form)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _of(self, form: Any, ends: Sequence[str] = (), *, beside_text: bool = False) -> str:
        """What a format is, and the first of `ends` behind it: free text goes on up to there. beside_text: free text that
        nothing ends may stand here instead, and goes on behind what this one ends with."""
        kind = self._kind(form)
        known = self._terminals.either(ends)
        if known is not None and (body := self._terminals.of(form, known)) is not None:
            if known or is_closed(form, self._ends_of):
                return self.token(body) if beside_text else self.lazy(body)
            if not is_several(form, self._ends_of):
                return self.token(body)
        if known is None and not is_open(form, self._ends_of) and (body := self._terminals.of(form)) is not None:
            return self.rule(f"{self.token(body)} {self._either(ends)}")
        found = self._open(kind, form, ends)
        if found is None:
            return self.rule(f"{self._closed(kind, form)} {self._either(ends)}")
        return found

    def _open(self, kind: str, form: Any, ends: Sequence[str]) -> str | None:
        """Formats that may end in free text; None: it is another one."""
        if kind == "any_text":
            return self._up_to(ends, texts_of(form, "excludes"))
        if kind == "sequence":
            return self._sequence(list_of(form, "elements"), ends)
        if kind == "or":
            elements = list_of(form, "elements")
            free = not ends and is_open(form, self._ends_of)
            return self.rule(" | ".join(self._of(one, ends, beside_text=free) for one in elements))
        if kind in REPEATS:
            return self._repeated(form, ends)
        if kind == "tag":
            return self.rule(f"{self._begin(form)} {self._rest(form, ends)}")
        return self._triggered(self._tagged(kind, form), ends) if kind in TRIGGERED else None

    def _closed(self, kind: str, form: Any) -> str:
        kinds: dict[str, Callable[[Any], str]] = {
            "json_schema": self._schema,
            "qwen_xml_parameter": lambda f: self._arguments(_QWEN_XML, f),
            "arguments": lambda f: self._arguments(style_of(f), f),
            "const_string": lambda f: self.rule(self.literal(text_of(f, "value"))),
            "token": lambda f: self.rule(self.literal(self._token(f.get("token")))),
            "grammar": lambda f: self.rule(f"%lark {{\n{context_free(text_of(f, 'grammar'))}\n}}"),
            "json_gap": lambda f: self._gap(),
            "tags_with_separator": self._separated,
        }
        return kinds[kind](form)

    def _kind(self, form: Any) -> str:
        kind = form.get("type") if isinstance(form, dict) else None
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise UnsupportedError(f"structural tag: type {kind!r:.60}; known: {', '.join(_FIELDS)}", param=PARAM)
        _only(form, ("type", *_FIELDS[kind]), kind)
        for key in _FLAGS.intersection(form, _FIELDS[kind]):
            if type(form[key]) is not bool:
                raise ClientError(f"structural tag: {key} must be true or false, got {form[key]!r:.60}", param=PARAM)
        return kind

    def _schema(self, form: Any) -> str:
        schema = form.get("json_schema", {})
        if not isinstance(schema, (dict, bool)) or (isinstance(schema, dict) and "x-guidance" in schema):
            raise ClientError(f"structural tag: json_schema must be a JSON Schema, got {schema!r:.60}", param=PARAM)
        lenient = form.get("lenient") is True
        if lenient and isinstance(schema, dict):
            schema, _ = loosened(schema, self.steps)
        return self.json(schema, lenient=lenient)

    def _arguments(self, style: ArgumentStyle, form: Any) -> str:
        schema = form.get("json_schema", {})
        if not isinstance(schema, dict):
            raise ClientError("structural tag: json_schema of arguments must be an object", param=PARAM)
        return argument_rules(style, schema, self, exact=form.get("lenient") is not True).write()

    def _gap(self) -> str:
        """What may stand between JSON's marks."""
        pattern = self._json_rules.get("whitespace_pattern")
        return self.token(f"/({pattern})?/") if pattern else self.rule('""')

    # -- formats of formats

    def _sequence(self, elements: Sequence[Any], ends: Sequence[str]) -> str:
        """Neighbours that are regular are one terminal; free text before another format goes on up to the text with which that
        begins, unless nothing but such terminals follows."""
        regular = [self._terminals.of(one) is not None for one in elements]
        special = self._terminals.either(ends) is None
        behind = len(elements) if special else max((i for i, plain in enumerate(regular) if not plain), default=-1)

        def joins(i: int) -> bool:
            if i <= behind and (is_open(elements[i], self._ends_of) or is_several(elements[i], self._ends_of)):
                return False
            return regular[i]

        left: deque[Any] = deque()
        for joined, run in groupby(range(len(elements)), joins):
            forms = [elements[i] for i in run]
            left += [_joined(forms)] if joined else forms
        parts = []
        while len(left) > 1:
            form = left.popleft()
            greedy = self._greedy(form)
            begin, rest = self._head(left[0]) if greedy else ("", None)
            if begin:
                left[0] = rest
                parts.append(self._of(form, (begin,)))
            elif is_open(form, self._ends_of):
                text = f"nothing tells where {form.get('type')} ends before {left[0].get('type')}; put it into a tag"
                raise UnsupportedError(f"structural tag: {text}", param=PARAM)
            else:
                parts.append(self._before_other(form, left[0]) if greedy else self._of(form))
        return self.rule(" ".join([*parts, self._of(left[0], ends)]))

    def _greedy(self, form: Any) -> bool:
        """It might go on over what stands behind it: free text, and terminals that aren't told where they end."""
        if is_open(form, self._ends_of):
            return True
        if form.get("type") == "const_string" or self._terminals.of(form) is None:
            return False
        return not is_closed(form, self._ends_of) and not is_several(form, self._ends_of)

    def _before_other(self, form: Any, behind: Any) -> str:
        """A greedy format before one that begins with no text of its own: a text with which it ends tells where, the last one
        before JSON, the first one before others if any fits the pattern in front of it."""
        *held, last = form["elements"] if form["type"] == "sequence" else (form,)
        if behind["type"] == "json_schema" and _endless(last):
            text = f"nothing tells where regex {last['pattern']!r:.60} ends before json_schema; put it into a tag"
            raise UnsupportedError(f"structural tag: {text} with an end", param=PARAM)
        end = text_of(last, "value") if held and last["type"] == "const_string" else ""
        first = self._first(behind)
        if not end or not (first or _endless(held[-1])):
            return self._of(form)
        until = self._terminals.until(form, end, first)
        return self._of(_joined(held), (end,)) if until is None else until

    def _head(self, form: Any) -> tuple[str, Any]:
        """(the text with which a format begins, what is left of it); "": it begins with none."""
        kind = self._kind(form)
        if kind == "sequence":
            begin, rest = self._head(list_of(form, "elements")[0])
            return begin, {**form, "elements": [rest, *form["elements"][1:]]}
        names = {"const_string": "value", "token": "token", "tag": "begin"}
        begin = self._mark(form.get(names[kind], ""), names[kind]) if kind in names else ""
        return begin, {**form, "begin": ""} if kind == "tag" else _NOTHING

    def _first(self, form: Any) -> str:
        """The characters with which a format of JSON begins, as in a regex's [...]; "": it is another one."""
        kind = self._kind(form)
        if kind in ("sequence", "or"):
            elements = list_of(form, "elements")
            return "".join(map(self._first, elements[:1] if kind == "sequence" else elements))
        if kind in REPEATS:
            return self._first(form.get("content"))
        return first_of(form.get("json_schema", {})) if kind == "json_schema" else ""

    def _repeated(self, form: Any, ends: Sequence[str]) -> str:
        if form["type"] == "optional" and ends:
            return self.rule(f"{self._of(form.get('content'), ends)} | {self._either(ends)}")
        if is_open(form, self._ends_of):
            text = f"free text that nothing ends can't be the content of {form['type']}; put it into a tag"
            raise UnsupportedError(f"structural tag: {text}", param=PARAM)
        return self.rule(f"{self._of(form.get('content'))}{times_of(form)} {self._either(ends)}")

    def _begin(self, tag: Any) -> str:
        return self.literal(self._mark(tag.get("begin", ""), "begin"))

    def _rest(self, tag: Any, ends: Sequence[str] = ()) -> str:
        """What stands behind a tag's begin, up to its end and to the first of `ends` behind that."""
        _only(tag, ("type", *_FIELDS["tag"]), "tag")
        content, own = tag.get("content", {"type": "json_schema"}), [end for end in self._ends_of(tag) if end]
        return f"{self._of(content, own)} {self._either(ends)}" if own else self._of(content, ends)

    def _ends_of(self, tag: Any) -> tuple[str, ...]:
        """The texts that end a tag; an empty one alone: there is none."""
        end = tag.get("end", "")
        ends = tuple(self._mark(one, "end") for one in (end if isinstance(end, list) and end else [end]))
        if len(ends) > 1 and not all(ends):
            raise ClientError("structural tag: one of several ends can't be empty", param=PARAM)
        return ends

    def _mark(self, given: Any, key: str) -> str:
        """A text, or the text of a token."""
        if isinstance(given, dict) and given.get("type") == "token":
            self._kind(given)
            return self._token(given.get("token"))
        return self._token(given) if key == "token" else text_of({key: given}, key)

    def _token(self, given: Any) -> str:
        """The name of a special token."""
        name = self._names.get(given) if type(given) is int else given
        if not isinstance(name, str) or name not in self._special:
            raise UnsupportedError(f"structural tag: {given!r:.60} is no special token; write its text", param=PARAM)
        return name

    def _tokens(self, given: Any, key: str) -> list[str]:
        if not isinstance(given, list):
            raise ClientError(f"structural tag: {key} must be a list of tokens, got {given!r:.60}", param=PARAM)
        return [self._token(one) for one in given]

    def _tagged(self, kind: str, form: Any) -> dict[str, Any]:
        """Tags in free text as triggered_tags have them."""
        self._tokens(form.get("exclude_tokens") or [], "exclude_tokens")  # no free text holds one
        if kind in ("dispatch", "token_dispatch"):
            rules = list_of(form, "rules")
            if not all(isinstance(one, (list, tuple)) and len(one) == 2 for one in rules):
                raise ClientError("structural tag: rules are pairs of a pattern and a format", param=PARAM)
            begins = [one for one, _ in rules]
            if kind == "token_dispatch":
                begins = self._tokens(begins, "rules")
            tags = [{"begin": one, "content": rule[1], "end": ""} for one, rule in zip(begins, rules, strict=True)]
            found = {"triggers": begins, "tags": tags, "stop_after_first": not form.get("loop", True)}
        elif kind == "token_triggered_tags":
            found = {**form, "triggers": self._tokens(form.get("trigger_tokens"), "trigger_tokens")}
        else:
            found = form
        return {**found, "excludes": texts_of(form, "excludes")}

    def _triggered(self, form: Mapping[str, Any], ends: Sequence[str]) -> str:
        triggers = texts_of(form, "triggers")
        text, once = self._terminals.text(form["excludes"]), form.get("stop_after_first")
        behind, first = [], []
        for tag in _tags(form):
            rest = self._rest(tag, ends if once else ())
            behind.append(self._behind(tag, rest, triggers, text))
            first.append(self.rule(f"{self._begin(tag)} {rest}"))
        then = self.rule(" | ".join(behind))
        begun = self.rule(" | ".join(first)) if form.get("at_least_one") else ""
        if once:
            return begun or self.rule(f"{then} | {self._up_to(ends, form['excludes'], lazy=True)}")
        return self.rule(f"{begun} {then}* {self._up_to(ends, form['excludes'], lazy=True)}")

    def _behind(self, tag: Any, rest: str, triggers: Sequence[str], text: str) -> str:
        """Free text up to a tag's trigger, then the tag."""
        begin = self._mark(tag.get("begin", ""), "begin")
        trigger = next((one for one in triggers if begin.startswith(one)), None)
        if trigger is None:
            raise ClientError(f"structural tag: no trigger begins {begin!r:.60}", param=PARAM)
        if self._holds_special(begin):
            return self.rule(f"{self._before(begin, text)} {rest}")
        lead = self.lazy(f"{text} {json.dumps(trigger)}")
        return self.rule(f"{lead} {self.literal(begin[len(trigger) :])} {rest}")

    def _before(self, mark: str, text: str) -> str:
        """A terminal of text, up to a mark that holds special tokens, and that."""
        head, tail = self.split(mark)
        return f"{self.token(f'{text} {json.dumps(head)}') if head else text} {tail}"

    def _up_to(self, ends: Sequence[str], excludes: Sequence[str], *, lazy: bool = False) -> str:
        """Free text up to the first of `ends`, and that. lazy: beside other terminals of free text, of which the first to end is
        meant."""
        plain = [end for end in ends if not self._holds_special(end)]
        text = self._terminals.text((*excludes, *plain) if len(plain) < len(ends) else excludes)
        if not ends:
            return text
        ways = [self._before(end, text) for end in ends if end not in plain]
        if plain and lazy:
            either = " | ".join(map(json.dumps, plain))
            ways.append(self.lazy(f"{self._terminals.text(excludes)} ({either})"))
        elif plain:
            ways.append(self._terminals.up_to(self._terminals.either(plain) or "", excludes))
        return self.rule(" | ".join(ways))

    def _separated(self, form: Any) -> str:
        tags = [self.rule(f"{self._begin(tag)} {self._rest(tag)}") for tag in _tags(form)]
        one = self.rule(" | ".join(tags))
        if form.get("stop_after_first"):
            return one if form.get("at_least_one") else self.rule(f"{one}?")
        many = self.rule(f"{one} ({self.literal(text_of(form, 'separator'))} {one})*")
        return many if form.get("at_least_one") else self.rule(f"{many}?")

    def _either(self, ends: Sequence[str]) -> str:
        return f"({' | '.join(map(self.literal, ends))})" if ends else ""

    def _holds_special(self, text: str) -> bool:
        if text not in self._held:
            self._held[text] = any(name in text for name in self._special if name)
        return self._held[text]

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
        if not self._holds_special(text):
            return json.dumps(text) if text else ""
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


def _tags(form: Mapping[str, Any]) -> list[Any]:
    tags = list_of(form, "tags")
    if wrong := [one for one in tags if not isinstance(one, dict)]:
        raise ClientError(f"structural tag: tags must be objects, got {wrong[0]!r:.60}", param=PARAM)
    return tags


def _endless(form: Any) -> bool:
    return form["type"] == "regex" and _ENDLESS.fullmatch(text_of(form, "pattern")) is not None


def _joined(run: list[Any]) -> Any:
    return run[0] if len(run) == 1 else {"type": "sequence", "elements": run}


def context_free(text: str) -> str:
    """GBNF and EBNF are turned into Lark. UnsupportedError names what Lark's rules may ask of a sampler."""
    if (asked := _OPTION.search(text)) is not None:
        line = text.count("\n", 0, asked.end()) + 1
        raise UnsupportedError(f"the grammar's line {line}: {asked[1]} of a rule isn't supported", param=PARAM)
    try:
        return str(any_to_lark(text))
    except Exception as error:  # the library raises Exception itself when a rule is missing
        raise ClientError(f"structured output: the grammar can't be read: {error}", param=PARAM) from error
