"""What a call says about tools, and the grammar that holds the model to it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader, ToolFormat, read_answer, text_of
from kvasir.cluster.custom_tools import INPUT
from kvasir.cluster.overlooked import overlooked
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.engine.argument_check import check_arguments
from kvasir.engine.argument_schema import Steps
from kvasir.engine.argument_style import style_json
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.lark_text import quoted_lark
from kvasir.engine.loose_schema import loosened
from kvasir.engine.request import StructuredOutput
from kvasir.engine.schema import MAX_DEPTH, check_depth

MAX_TOOLS = 512
_NAME = re.compile(r"""[^\x00-\x1f\x7f-\x9f\ud800-\udfff"'\\<>{}\[\]]{1,128}""")
_PLAIN = re.compile(r"[a-zA-Z0-9_.-]+")
"""Names that every format can write."""
_MODES = ("auto", "none", "required")
_NAMED_IN = ("function", "custom")
"""Where tool_choice may hold a tool's name, the first of them that is there."""
_ANY_ID = re.compile(r"\{number\}|\{id\}")
_ID_PATTERNS = {"{number}": "[0-9]{1,4}", "{id}": "[a-zA-Z0-9_-]{1,64}"}

Json = dict[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HeldCalls:
    """How one model writes the calls of a request."""

    form: ToolFormat
    grammar: StructuredOutput
    unheld: tuple[str, ...] = ()
    """What of the tools' schemas the model isn't held to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """Tools that the model may call, in OpenAI's shape."""

    tools: Sequence[Tool]
    names: tuple[str, ...]
    """Those of them that it may call now."""
    required: bool = False
    """The answer is a call."""
    parallel: bool = True
    """It may make several calls in one answer."""
    custom: Mapping[str, str] = field(default_factory=dict)
    """Those whose calls are shown as a custom tool's -> the Lark grammar of its input, or ""."""

    @property
    def schemas(self) -> dict[str, Any]:
        """Tool -> its parameters' schema."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    def held(
        self, taught: ToolFormat | None, instead: StructuredOutput | None = None, limit_s: float = math.inf
    ) -> HeldCalls:
        """What holds the model to it, in the format that it was `taught`; where that can't be enforced and has to be, as JSON.
        instead: what an answer that is no call has to look like. UnsupportedError names what can't be enforced of a strict
        tool, or a forced one. Takes milliseconds as a rule; SlowSchemaError where the schemas take over `limit_s`."""
        steps = Steps(limit_s)
        form, unheld = self._format(taught, steps)
        if self.required:
            content = self._required(form, steps)
        elif instead is not None:
            if instead.disable_any_whitespace and form.call[0].startswith("{") and not form.wrap[0]:
                text = f"without any whitespace an answer isn't told from a call in this model's format ({form.name})"
                raise UnsupportedError(f"{text}: leave out disable_any_whitespace", param="structured_outputs")
            content = {"type": "or", "elements": [*self._answers(form, _schema(instead)), self._required(form, steps)]}
        else:
            content = self._whole(form, steps) if form.whole is not None else self._triggered(form, steps)
        tag = json.dumps({"type": "structural_tag", "format": content})
        compact = instead is not None and instead.disable_any_whitespace
        return HeldCalls(form, StructuredOutput(structural_tag=tag, disable_any_whitespace=compact), unheld)

    def _format(self, taught: ToolFormat | None, steps: Steps) -> tuple[ToolFormat, tuple[str, ...]]:
        """(how calls are written, what of their schemas isn't enforced)."""
        if taught is not None:
            try:
                return taught, self._unheld(taught, steps)
            except UnsupportedError:
                if not self.required:
                    raise
        return TOOL_FORMATS["json"], self._unheld(TOOL_FORMATS["json"], steps.again())

    def _unheld(self, form: ToolFormat, steps: Steps) -> tuple[str, ...]:
        """What of the schemas isn't enforced; UnsupportedError where it has to be, and for a name that can't be written."""
        found: list[str] = []
        for name in self.names:
            steps.check_time()
            if not _PLAIN.fullmatch(name) and not _carries(form, name):
                text = f"tool {name!r} can't be called so in this model's format of calls ({form.name})"
                hint = 'name it with letters, digits, "_", "." and "-" alone, or use tool_choice "required" or "none"'
                raise UnsupportedError(f"{text}; {hint}", param="tools")
            strict = bool(self._function(name).get("strict"))
            try:
                skipped = self._skipped(name, form, strict or self.required, steps)
            except UnsupportedError as error:
                raise UnsupportedError(self._refusal(name, form, strict, error.message), param="tools") from error
            found += [f"{what} in tool {name} (can't be enforced)" for what in skipped]
        return tuple(found)

    def _refusal(self, name: str, form: ToolFormat, strict: bool, why: str) -> str:
        if name in self.custom:
            return f"the format of tool {name!r} can't be enforced in this model's calls ({form.name}): {why}"
        if form.arguments is not None:
            text = f"tool {name!r} is strict, which can't be enforced in this model's format of calls ({form.name})"
            return f'{text}: {why}; use tool_choice "required" or "none"'
        if strict:
            return f"tool {name!r} is strict: {why}; leave that out, or strict"
        return (
            f'tool {name!r} is forced, so that its schema has to hold: {why}; leave that out, or use tool_choice "auto"'
        )

    def _skipped(self, name: str, form: ToolFormat, exact: bool, steps: Steps) -> tuple[str, ...]:
        if lark := self.custom.get(name):
            if form.arguments is not None and form.arguments.texts != "json":
                text = "a Lark grammar holds only where texts stand between quotes"
                raise UnsupportedError(f'{text}; use tool_choice "required" or "none"', param="tools")
            quoted_lark(lark, steps)
            return ()
        if form.arguments is not None:
            return check_arguments(self._parameters(name), form.arguments, exact=exact, steps=steps)
        found = loosened(self._parameters(name), steps)[1]
        if found and exact:
            raise UnsupportedError(f"{', '.join(found)} can't be enforced", param="tools")
        return found

    def _required(self, form: ToolFormat, steps: Steps) -> Json:
        before, between, behind = form.wrap
        calls = self._calls(form, steps, between)
        if not before and not behind:
            return calls
        ways = [{"type": "tag", "begin": one, "content": calls, "end": behind} for one in (before, *form.befores)]
        return ways[0] if len(ways) == 1 else {"type": "or", "elements": ways}

    def _answers(self, form: ToolFormat, answer: Json) -> list[Json]:
        """An answer that is no call, with what the format puts around it."""
        before, behind = form.answer
        if not before:
            return [answer]
        shut = {"type": "tag", "begin": before, "content": answer, "end": ""}
        return [shut, {"type": "tag", "begin": before, "content": answer, "end": behind}] if behind else [shut]

    def _whole(self, form: ToolFormat, steps: Steps) -> Json:
        """Thoughts and remarks, then an answer or calls; or text alone, where the prompt has begun one of them."""
        blocks = [{"begin": begin, "content": {"type": "any_text"}, "end": end} for begin, end in form.blocks]
        before: Json = {"type": "tags_with_separator", "tags": blocks, "separator": ""}
        then = {"type": "or", "elements": [*self._answers(form, {"type": "any_text"}), self._required(form, steps)]}
        begun = [{"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": end} for _, end in form.blocks]
        later = {"type": "sequence", "elements": [before, then]}
        return {
            "type": "or",
            "elements": [
                {"type": "any_text"},
                *(
                    [{"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": form.answer[1]}]
                    if form.answer[1]
                    else []
                ),
                later,
                *({"type": "sequence", "elements": [one, before, then]} for one in begun),
            ],
        }

    def _triggered(self, form: ToolFormat, steps: Steps) -> Json:
        """Free text, until a call begins."""
        before, between, behind = form.wrap
        tags = self._tags(form, steps, form.call)
        bare = len(form.begins[0]) == 1  # what announces such calls is their own beginning
        if before and bare:
            tags = [self._listed(form, steps, name) for name in self.names]
        elif before:
            tags = [{"begin": before, "content": self._calls(form, steps, between), "end": behind}]
        tags += self._tags(form, steps, form.unwrapped) if form.unwrapped else []
        triggers = [tag["begin"] for tag in tags] if bare or form.unwrapped else [form.begins[0]]
        return {"type": "triggered_tags", "triggers": triggers, "tags": tags, "stop_after_first": not self.parallel}

    def _listed(self, form: ToolFormat, steps: Steps, first: str) -> Json:
        """A list of calls whose first one is of that tool."""
        before, between, behind = form.wrap
        begin, end = form.call
        more = {"type": "tags_with_separator", "tags": self._tags(form, steps, (between + begin, end)), "separator": ""}
        rest = [{"type": "const_string", "value": end}, *([more] if self.parallel else [])]
        content = {"type": "sequence", "elements": [self._arguments(form, steps, first), *rest]}
        return {"begin": before + begin.replace("NAME", first), "content": content, "end": behind}

    def _calls(self, form: ToolFormat, steps: Steps, between: str) -> Json:
        tags = self._tags(form, steps, form.call)
        if form.unwrapped and form.whole is not None:
            tags += self._tags(form, steps, form.unwrapped)
        calls: Json = {"type": "tags_with_separator", "tags": tags, "separator": between}
        return calls | {"at_least_one": True, "stop_after_first": not self.parallel}

    def _tags(self, form: ToolFormat, steps: Steps, around: tuple[str, str]) -> list[Json]:
        begin, end = around
        return [_tag(begin.replace("NAME", name), self._arguments(form, steps, name), end) for name in self.names]

    def _arguments(self, form: ToolFormat, steps: Steps, name: str) -> Json:
        if lark := self.custom.get(name):
            # `_skipped` has asked for it: it is remembered, but where there are more of them than are
            return _input(form, quoted_lark(lark, steps.again()))
        exact = self.required or bool(self._function(name).get("strict"))
        kind = (
            {"type": "json_schema"} if form.arguments is None else {"type": "arguments", **style_json(form.arguments)}
        )
        return {**kind, "json_schema": self._parameters(name), "lenient": not exact}

    def _parameters(self, name: str) -> Json:
        return {"type": "object", **(self._function(name).get("parameters") or {})}

    def _function(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(t["function"] for t in self.tools if t["function"]["name"] == name)
        return found


@lru_cache(4096)
def _carries(form: ToolFormat, name: str) -> bool:
    """Whether calls by that name are read as such, in all ways in which the format writes them."""
    before, between, behind = form.wrap
    for begin, end in filter(None, (form.call, form.unwrapped)):
        call = _ANY_ID.sub("0", begin).replace("NAME", name) + ("" if form.arguments else "{}") + end
        parts = read_answer(AnswerReader(form, None, schemas={name: None}), f"{before}{call}{between}{call}{behind}")
        if [part.text for part in parts if part.kind == "call"] != [name] * 2 or text_of(parts, "content").strip():
            return False
    return True


def _tag(begin: str, content: Json, end: str) -> Json:
    """{number} and {id} in `begin` stand for any."""
    if (found := _ANY_ID.search(begin)) is None:
        return {"begin": begin, "content": content, "end": end}
    pattern, rest = _ID_PATTERNS[found[0]], begin[found.end() :]
    parts = [{"type": "regex", "pattern": pattern}, {"type": "const_string", "value": rest}, content]
    return {"begin": begin[: found.start()], "content": {"type": "sequence", "elements": parts}, "end": end}


def _input(form: ToolFormat, grammar: str) -> Json:
    """The arguments of a custom tool. grammar: of its input in a JSON string."""
    inside: Json = {"type": "grammar", "grammar": grammar}
    if form.arguments is None:
        gap: Json = {"type": "json_gap"}
        begin = [_text("{"), gap, _text(f'"{INPUT}"'), gap, _text(":"), gap, _text('"')]
        return {"type": "sequence", "elements": [*begin, inside, _text('"'), gap, _text("}")]}
    around = INPUT.join(form.arguments.key) + '"', '"' + form.arguments.end
    return {"type": "sequence", "elements": [_text(around[0]), inside, _text(around[1])]}


def _text(value: str) -> Json:
    return {"type": "const_string", "value": value}


def _schema(wanted: StructuredOutput) -> Json:
    """As a part of a structural tag."""
    if wanted.json is None and not wanted.json_object:
        text = "beside tools a structured output must be a JSON Schema, where the model is free to call"
        raise UnsupportedError(f'{text}; use tool_choice "required" or "none"', param="tool_choice")
    return {"type": "json_schema", "json_schema": json.loads(wanted.json) if wanted.json else {"type": "object"}}


def tool_use(
    tools: Sequence[Tool] | None, choice: object, parallel: bool = True, custom: Mapping[str, str] | None = None
) -> ToolUse | None:
    """Checked; None: there are no tools, or none may be called. ClientError names what is wrong. `custom`: of `ToolUse`."""
    names = _distinct([_checked(tool, f"tools[{number}]") for number, tool in enumerate(tools or ())], "tools")
    mode, allowed = _choice(choice)
    if not tools:
        if mode == "required" or allowed is not None:
            raise ClientError("tool_choice needs tools", param="tool_choice")
        return None
    if unknown := [name for name in allowed or () if name not in names]:
        raise ClientError(f"tool_choice names {unknown[0]!r:.60}, which isn't in tools", param="tool_choice")
    if mode == "none":
        return None
    single = isinstance(choice, Mapping) and choice.get("type") != "allowed_tools"
    return ToolUse(
        tools=tools,
        names=tuple(names if allowed is None else allowed),
        required=mode == "required",
        parallel=parallel and not single,
        custom=custom or {},
    )


def _checked(tool: Tool, at: str) -> str:
    """The tool's name."""
    if (kind := tool.get("type", "function")) != "function":
        raise UnsupportedError(f'{at}: only tools of type "function" are supported, got {kind!r:.60}', param="tools")
    if not isinstance(tool.get("function"), Mapping):
        raise ClientError(
            f"{at}.function must be an object with a name, got {tool.get('function')!r:.60}", param="tools"
        )
    function = tool["function"]
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name != name.strip():
        text = f"{at}: a tool's name must be 1 to 128 characters without quotes, brackets and control characters"
        raise ClientError(f"{text}, got {name!r:.60}", param="tools")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ClientError(f"{at}.function.parameters must be a JSON Schema, got {parameters!r:.60}", param="tools")
    if parameters and parameters.get("type", "object") != "object":
        raise ClientError(f"{at}.function.parameters must be the schema of an object", param="tools")
    if not isinstance(function.get("strict"), (bool, type(None))):
        raise ClientError(f"{at}.function.strict must be true or false, got {function['strict']!r:.60}", param="tools")
    check_depth(parameters, 2 * MAX_DEPTH, f"{at}.function.parameters", param="tools")
    return name


def _distinct(names: list[str], param: str) -> list[str]:
    """`names`, if each is there once and they aren't too many."""
    if len(names) > MAX_TOOLS:
        raise ClientError(f"{param} holds more than {MAX_TOOLS} tools", param=param)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ClientError(f"{param} holds {twice[0]!r:.60} twice", param=param)
    return names


def _choice(choice: object) -> tuple[str, list[str] | None]:
    """(auto, none or required; the tools it allows, or None for all)."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and (choice in _MODES or choice == "any"):
        return ("required" if choice == "any" else choice), None
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        if kind == "allowed_tools":
            inner = choice.get("allowed_tools", choice)
            mode, tools = (
                (inner.get("mode", "auto"), inner.get("tools")) if isinstance(inner, Mapping) else (None, None)
            )
            if mode in ("auto", "required") and isinstance(tools, list) and tools:
                return mode, _distinct([_named(tool) for tool in tools[: MAX_TOOLS + 1]], "tool_choice")
        elif kind in ("function", "custom"):
            return "required", [_named(choice)]
    text = 'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    raise ClientError(f"{text}, got {choice!r:.80}", param="tool_choice")


def unread_choice(choice: object) -> tuple[str, ...]:
    """Fields of a `tool_choice` that mean nothing; of one that `tool_use` takes."""
    if not isinstance(choice, Mapping):
        return ()
    if choice.get("type") != "allowed_tools":
        return _unread_name("tool_choice", [choice])
    inner = choice.get("allowed_tools", choice)
    at, known = ("tool_choice", ("type",)) if inner is choice else ("tool_choice.allowed_tools", ())
    beside = () if inner is choice else overlooked("tool_choice", [choice], ("type", "allowed_tools"))
    return (
        *beside,
        *overlooked(at, [inner], (*known, "mode", "tools")),
        *_unread_name(f"{at}.tools[]", inner["tools"]),
    )


def _unread_name(at: str, tools: Sequence[Tool]) -> tuple[str, ...]:
    """The same of what names a tool, itself or in an object of its kind."""
    found: dict[str, None] = {}
    for tool in tools:
        where = next((name for name in _NAMED_IN if name in tool), "name")
        inner = [tool[where]] if where in _NAMED_IN else []
        names = (*overlooked(at, [tool], ("type", where)), *overlooked(f"{at}.{where}", inner, ("name",)))
        found |= dict.fromkeys(names)
    return tuple(found)


def _named(choice: object) -> str:
    said = choice if isinstance(choice, Mapping) else {}
    inner = next((said[name] for name in _NAMED_IN if name in said), said)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise ClientError(f"tool_choice must name a tool, got {choice!r:.80}", param="tool_choice")
    return name
