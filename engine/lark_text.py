"""Lark grammars, in llguidance's dialect, of texts that stand in a JSON string: rewritten with each character as its escape.

The library reads the grammar as it came first, so that what is wrong is told with its place. Terminals that hold escapes become
rules (`escaped_regex` says why), and what they ignore is written out, as it isn't ignored within a terminal.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

from kvasir.engine.argument_schema import Steps
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.escaped_regex import BarredError, Cut, bounds, cut_range, cut_regex, cut_text

KEPT, MAX_CHARS = 256, 65536
"""Grammars that are remembered, and characters of the longest."""
_kept: OrderedDict[str, str] = OrderedDict()
_lock = threading.Lock()
_TEXT = r'"(?:\\.|[^"\\\n])*"'
_PART = re.compile(
    rf"""(?P<gap>\s+|(?:\#|//)[^\n]*|%llguidance\s*\{{\s*\}}|->\s*[\w-]+)
    |(?P<range>{_TEXT}\s*\.\.\s*{_TEXT})
    |(?P<text>{_TEXT})(?P<folded>i?)
    |/(?P<regex>(?:\\.|[^/\\])+)/(?P<flags>[a-z]*)
    |%import\s+common\s*(?:\.\s*(?P<one>\w+)(?:\s*->\s*(?P<alias>\w+))?|\((?P<several>[^)]*)\))
    |(?P<ignore>%ignore\b)
    |(?P<refused>%\w+|@[\w-]+|<[^<>\s]+>|::)
    |(?P<rule>[!?]*_?[a-z][a-z0-9_-]*)|(?P<terminal>_?[A-Z][A-Z0-9_-]*)
    |(?P<count>\{{\s*\d*\s*,?\s*\d*\s*\}}|~\s*\d+(?:\s*\.\.\s*\d+)?|[*+?]) | (?P<mark>.)""",
    re.VERBOSE,
)
_COMMON = {
    "ESCAPED_STRING": r'"([^"\\]|\\.)*"', "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+", "CR": r"\r", "LF": r"\n",
    "NEWLINE": r"(\r?\n)+", "SH_COMMENT": r"#[^\n]*", "CPP_COMMENT": r"\/\/[^\n]*", "SQL_COMMENT": r"--[^\n]*",
    "C_COMMENT": r"\/\*([^*]|\*+[^*\/])*\*+\/", "DIGIT": "[0-9]", "HEXDIGIT": "[a-fA-F0-9]", "INT": "[0-9]+",
    "SIGNED_INT": r"[+-]?[0-9]+", "DECIMAL": r"[0-9]+\.[0-9]*|\.[0-9]+", "_EXP": r"[eE][+-]?[0-9]+",
    "LCASE_LETTER": "[a-z]", "UCASE_LETTER": "[A-Z]", "LETTER": "[A-Za-z]", "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
}  # fmt: skip
"""Lark's own library of terminals (its common.lark), and those of numbers."""
_COMMON["FLOAT"] = rf"[0-9]+{_COMMON['_EXP']}|({_COMMON['DECIMAL']})({_COMMON['_EXP']})?"
_COMMON["NUMBER"] = f"{_COMMON['FLOAT']}|[0-9]+"
_COMMON["SIGNED_FLOAT"], _COMMON["SIGNED_NUMBER"] = (f"[+-]?({_COMMON[name]})" for name in ("FLOAT", "NUMBER"))
_OPTIONS = re.compile(r"\s*(\[[^\]]*\])\s*:")
"""Of a rule that is defined, behind its name."""
_NEVER = "/[a&&b]/"
"""What nothing fits."""
_Part = re.Match[str]


def quoted_lark(grammar: str, steps: Steps) -> str:
    """What `grammar` describes, as it is written between a JSON string's quotes. UnsupportedError tells what is wrong with it, or
    can't be enforced there, and in which line; ClientError that it is longer than MAX_CHARS, or takes longer than `steps` may."""
    if len(grammar) > MAX_CHARS:
        text = f"a tool's Lark grammar has {MAX_CHARS} characters at most, got {len(grammar)}"
        raise ClientError(text, param="tools")
    with _lock:
        if (known := _kept.get(grammar)) is not None:
            _kept.move_to_end(grammar)
            return known
    _check(grammar, "")
    try:
        quoted = _Quoted(grammar, steps).write()
    except RecursionError as error:
        raise UnsupportedError("terminals are nested too deeply for a JSON string", param="tools") from error
    steps.check_time()
    _check(quoted, "with its escapes, ")
    with _lock:
        _kept[grammar] = quoted
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return quoted


def _check(grammar: str, where: str) -> None:
    from llguidance import LLMatcher  # a gateway that sees no tools starts sooner without it

    from kvasir.engine.grammar import LIMITS

    failed, said = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(grammar), limits=LIMITS)
    if not failed:
        return
    why, *more = said[0].split("\n")
    more = [line.removeprefix("error:") for line in more if line.startswith("error:")]
    reason = re.sub(r"^(?:at )?(\d+)\((\d+)\)", r"line \1, column \2", "".join((why, *more)))
    raise UnsupportedError(f"{where}{reason:.300}", param="tools")


class _Quoted:
    """A grammar that the library has read without complaint."""

    def __init__(self, grammar: str, steps: Steps) -> None:
        self._grammar, self._steps = grammar, steps
        self._terminals: dict[str, Sequence[_Part]] = {}
        self._rules: list[tuple[str, Sequence[_Part]]] = []
        self._ignored: list[Sequence[_Part]] = []
        self._cuts: dict[str, Cut] = {}
        """Of terminals, by their names and by what they are."""
        self._fitting: dict[str, bool] = {}
        """Terminals, by their names."""
        self._made: dict[str, str] = {}
        """Names of rules, by the terminals that they stand for."""
        self._escapes: dict[str, str] = {}
        self._out: list[str] = []

    def write(self) -> str:
        """The same where nothing needs an escape."""
        self._sort([part for part in _PART.finditer(self._grammar) if part["gap"] is None])
        bodies = [*self._terminals.values(), *self._ignored, *(body for _, body in self._rules)]
        if all(self._fits(part) for body in bodies for part in body):
            return self._grammar
        self._out = [f"{name}: {_source(body)}" for name, body in self._terminals.items() if self._fits_all(body)]
        gap = self._gap()
        for name, body in self._rules:
            self._steps.check_time()
            self._out.append(f"{name}: {' '.join(self._in_rule(part, gap) for part in body)}")
        return "\n".join(self._out) + "\n"

    def _sort(self, parts: Sequence[_Part]) -> None:
        """Parts by what they define."""
        body: list[_Part] = []
        for number, part in enumerate(parts):
            after = parts[number + 1][0] if number + 1 < len(parts) else ""
            if part["refused"] is not None or part[0] == "~":
                raise self._barred(part, part[0])
            if part["rule"] is not None and (options := _OPTIONS.match(self._grammar, part.end())):
                raise self._barred(part, part[0] + options[1])
            if part["one"] is not None or part["several"] is not None:
                names = {part["alias"] or part["one"]: part["one"]} if part["one"] else {}
                for alias, name in names.items() or ((name, name) for name in re.findall(r"\w+", part["several"])):
                    self._terminals[alias] = [*_PART.finditer(f"/{_COMMON[name]}/")]
            elif part["ignore"] is not None:
                self._ignored.append(body := [])
            elif after == ":" and part["terminal"] is not None:
                self._terminals[part[0]] = body = []
            elif after == ":":
                self._rules.append((part[0], body := []))
            elif part[0] != ":":
                body.append(part)

    def _barred(self, part: _Part, what: str) -> UnsupportedError:
        line = self._grammar.count("\n", 0, part.start()) + 1 if part.string is self._grammar else 1
        return UnsupportedError(f"line {line}: {what:.40} can't be enforced in a JSON string", param="tools")

    # -- terminals

    def _fits(self, part: _Part) -> bool:
        """Its texts stand in a JSON string as they are."""
        if (name := part["terminal"]) is None:
            return not _is_text(part) or not self._cut(part).escapes
        if name not in self._fitting:
            self._fitting[name] = self._fits_all(self._terminals[name])
        return self._fitting[name]

    def _fits_all(self, body: Sequence[_Part]) -> bool:
        return all(self._fits(part) for part in body)

    def _cut(self, part: _Part) -> Cut:
        """A terminal's, or a text's."""
        if part[0] not in self._cuts:
            self._steps.check_time()
            try:
                if part["terminal"] is not None:
                    self._cuts[part[0]] = self._either([*reversed(self._terminals[part[0]])])
                else:
                    self._cuts[part[0]] = _cut_of(part)
            except BarredError as error:
                raise self._barred(part, str(error)) from error
        return self._cuts[part[0]]

    def _either(self, left: list[_Part]) -> Cut:
        """Up to the bracket that ends it. left: the next one is the last."""
        found, one = Cut(), Cut("")
        while left and left[-1][0] not in (")", "]"):
            self._steps.check_time()
            part = left.pop()
            if part[0] == "|":
                found, one = found.or_(one), Cut("")
                continue
            if part[0] in ("(", "["):
                value = self._either(left)
                left.pop()
                value = value.or_(Cut("")) if part[0] == "[" else value
            elif part["mark"] is not None:
                raise self._barred(part, part[0])
            else:
                value = self._cut(part).again()
            while left and left[-1]["count"] is not None:
                value = value.repeated(*_bounds(left.pop()[0]))
            one = one.then(value)
        return found.or_(one)

    # -- rules

    def _in_rule(self, part: _Part, gap: str) -> str:
        if part["terminal"] is None and not _is_text(part):
            return part[0]
        name = part[0] if self._fits(part) else self._rule(part[0], self._cut(part))
        return f"({name} {gap})" if gap else name

    def _gap(self) -> str:
        """The rule of what is ignored; "": nothing is."""
        ways = []
        for number, body in enumerate(self._ignored):
            if self._fits_all(body):
                ways.append(f"JSON-GAP-{number}")
                self._out.append(f"{ways[-1]}: {_source(body)}")
            else:
                ways.append(self._rule(_source(body), self._either([*reversed(body)])))
        if ways:
            self._out.append(f"json-gap: ({' | '.join(ways)})*")
        return "json-gap" if ways else ""

    def _rule(self, what: str, cut: Cut) -> str:
        """A new one for a terminal: one more for each place of an escape, which ends there."""
        if (known := self._made.get(what)) is not None:
            return known
        name = self._made[what] = f"json-{len(self._made)}"
        at = {place: f"{name}-{number}" for number, place in enumerate(cut.escapes)}
        ways: dict[str, list[str]] = {one: [] for one in (name, *at.values())}
        if cut.plain is not None:
            ways[name].append(_lexeme(cut.plain))
        for place, end in cut.ends.items():
            ways[name].append(f"{at[place]} {_lexeme(end)}")
        for place, begin in cut.begins.items():
            ways[at[place]].append(f"{_lexeme(begin)} {self._escape(cut.escapes[place])}")
        for (one, other), text in cut.between.items():
            ways[at[other]].append(f"{at[one]} {_lexeme(text)} {self._escape(cut.escapes[other])}")
        self._out += [f"{one}: {' | '.join(several or [_NEVER])}" for one, several in ways.items()]
        return name

    def _escape(self, written: str) -> str:
        """The terminal of some escapes."""
        if written not in self._escapes:
            self._escapes[written] = f"JSON-ESCAPE-{len(self._escapes)}"
            self._out.append(f"{self._escapes[written]}: /{written}/")
        return self._escapes[written]


def _is_text(part: _Part) -> bool:
    return part["text"] is not None or part["range"] is not None or part["regex"] is not None


def _cut_of(part: _Part) -> Cut:
    if part["range"] is not None:
        return cut_range(*(json.loads(one) for one in re.findall(_TEXT, part[0])))
    if part["text"] is not None:
        return cut_text(json.loads(part["text"]), folded=bool(part["folded"]))
    return cut_regex(part["regex"], part["flags"])


def _bounds(count: str) -> tuple[int, int | None]:
    """Lark's own way to write them, too."""
    least, to, most = count.removeprefix("~").replace(" ", "").partition("..")
    return (int(least), int(most if to else least)) if count.startswith("~") else bounds(count.replace(" ", ""))


def _source(body: Sequence[_Part]) -> str:
    return " ".join(part[0] for part in body)


def _lexeme(text: str) -> str:
    return f"/{text}/" if text else ""
