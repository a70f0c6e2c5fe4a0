"""The formats in which families of models call tools, and tell their thoughts from their answers.

Each is what the family's chat template teaches; names are those that vLLM's flags have. A format is a reader over
`Scanner`'s operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader, ThoughtFormat, ToolFormat
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_values import Literals, dumps, typed, unescaped

_NAMES = ("name", "tool_name", "function_name")
_ARGUMENTS = ("arguments", "parameters", "args")
_OPEN = {"function": "{", "tool_call": "{"}
"""Keys whose object holds name and arguments."""
_FENCE = "```"

Read = Callable[[AnswerReader, str], Steps[bool]]


# -- objects of name and arguments


def objects(*ends: str, bare: bool = False) -> Read:
    """`{"name": ..., "arguments": ...}`, one, several or a list of them, up to one of `ends`; without `ends` as long as they
    follow each other. bare: nothing announces them, so only tools that were offered count; the mark is their beginning."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner = answer.scanner
        if bare:
            scanner.skip(-len(mark))
        found = False
        while True:
            yield from scanner.space()
            if ends and (yield from scanner.literal(*ends)):
                return True
            char = yield from scanner.peek()
            if char and char in "[],;" and not (char == "]" and not ends):
                scanner.skip()
            elif char != "{":
                if char == "]":
                    scanner.skip()
                return found
            elif not (yield from _object(answer, bare)):
                return found
            else:
                found = True

    return read


def _object(answer: AnswerReader, known: bool) -> Steps[bool]:
    """One call; back to its beginning when it isn't one."""
    scanner = answer.scanner
    place = scanner.keep()
    if (yield from _members(answer, known)):
        scanner.drop()
        return True
    scanner.rewind(place)
    return False


def _members(answer: AnswerReader, known: bool) -> Steps[bool]:
    scanner, name, held, said, depth = answer.scanner, None, "", False, 0
    while True:
        yield from scanner.space()
        char = yield from scanner.peek()
        if char in ("{", "}", ","):
            scanner.skip()
            depth += (char == "{") - (char == "}")
            if depth == 0:
                break
            continue
        key = (yield from scanner.string()) if char == '"' else None
        yield from scanner.space()
        if key is None or not (yield from scanner.literal(":")):
            return said
        yield from scanner.space()
        char = yield from scanner.peek()
        if key in (*_NAMES, "function") and char == '"':
            name = yield from scanner.string()
            if known and name not in answer.schemas:
                return False
        elif _OPEN.get(key) == char:
            continue
        elif key not in _ARGUMENTS:
            yield from scanner.value(_nowhere)
        elif name is not None and not said:
            if not (yield from _arguments(answer, name)):
                return False
            said = True
        else:
            parts: list[str] = []
            yield from scanner.value(parts.append)
            held = "".join(parts)
    if not said and name is not None:
        answer.call(name)
        answer.arguments(held if held.startswith("{") else "{}")
    return said or name is not None


def _arguments(answer: AnswerReader, name: str) -> Steps[bool]:
    """A call's arguments, which come next: an object, JSON text of one in a string, or nothing. False: none of these."""
    scanner = answer.scanner
    char = yield from scanner.peek()
    if char == '"':
        text = yield from scanner.string()
        if text is None or not text.lstrip().startswith("{"):
            return False
        answer.call(name)
        answer.arguments(text)
        return True
    if char != "{":
        parts: list[str] = []
        yield from scanner.value(parts.append)
        if "".join(parts) != "null":
            return False
        answer.call(name)
        answer.arguments("{}")
        return True
    place = scanner.keep()
    scanner.skip()
    yield from scanner.space()
    first = yield from scanner.peek()
    scanner.rewind(place)
    if first not in ('"', "}", ""):
        return False
    answer.call(name)
    yield from scanner.value(answer.arguments)
    return True


def _nowhere(_: str) -> None:
    """Nobody wants it."""


# -- a name, then the arguments' JSON


def named(item: str, separator: str, end: str, *ends: str) -> Read:
    """`item NAME separator JSON end`, several of them, up to one of `ends`. A type in place of the name ("function") has the
    name behind the separator, and the JSON in a code fence: DeepSeek V3 and R1."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, begun, before = answer.scanner, mark == item, answer.calls
        while True:
            yield from scanner.space()
            if not begun:
                found = yield from scanner.literal(item, *ends)
                if found != item:
                    return bool(found) or answer.calls > before
            begun = False
            name, mark_ = yield from scanner.collect([separator])
            if mark_ is None:
                return answer.calls > before
            if name.strip() == "function":
                name, _ = yield from scanner.collect(["\n"])
            yield from scanner.space()
            yield from scanner.literal(_FENCE + "json", _FENCE)
            yield from scanner.space()
            if not (yield from _arguments(answer, _bare_name(name))) and not ends:
                return False
            yield from scanner.until([end])

    return read


def _bare_name(name: str) -> str:
    """Without what Kimi puts around it: functions.NAME:0."""
    return re.sub(r"^functions\.|:\d+$", "", name.strip())


def _mistral(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`[TOOL_CALLS] [{...}]`, or since 2025 `[TOOL_CALLS]NAME[ARGS]{...}`, with a [CALL_ID] or not."""
    scanner = answer.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) in ("[", "{"):
        return (yield from objects()(answer, mark))
    name, found = yield from scanner.collect(["[ARGS]", "[CALL_ID]", "{"])
    if found == "[CALL_ID]":
        yield from scanner.until(["[ARGS]"])
    elif found == "{":
        scanner.skip(-1)
    elif found is None:
        return False
    yield from scanner.space()
    return (yield from _arguments(answer, name.strip()))


def _function(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`<function=NAME>{...}</function>`: Llama 3.1's own alternative, Functionary's."""
    name, found = yield from answer.scanner.collect([">"])
    if found is None:
        return False
    yield from answer.scanner.space()
    if not (yield from _arguments(answer, name)):
        return False
    yield from answer.scanner.until(["</function>"])
    return True


# -- a tag for each parameter


def tagged(
    call: tuple[str, str, str],
    parameter: tuple[str, str, str],
    *ends: str,
    decode: Callable[[str], str] = str,
) -> Read:
    """call, parameter: what stands before the name, behind it, and at the end. Values are typed by the tool's schema."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, begun, before = answer.scanner, mark == call[0], answer.calls
        while True:
            if not begun:
                found = yield from scanner.until([call[0], *ends])
                if found != call[0]:
                    return answer.calls > before or found is not None
            begun = False
            name, found = yield from scanner.collect([call[1]])
            if found is None:
                return answer.calls > before
            yield from _parameters(answer, name.strip(), call[2], parameter, decode)
            if not ends:
                return True

    return read


def _parameters(
    answer: AnswerReader, name: str, end: str, form: tuple[str, str, str], decode: Callable[[str], str]
) -> Steps[None]:
    scanner, schemas, written = answer.scanner, answer.properties(name), "{"
    answer.call(name)
    while (yield from scanner.until([form[0], end])) == form[0]:
        head, _ = yield from scanner.collect([form[1]])
        key, _, rest = head.partition('"') if form[0].endswith('"') else (head, "", "")
        value, mark = yield from scanner.collect([form[2], end])
        text = _unwrapped(decode(value))
        forced = text if 'string="true"' in rest else typed(text, schemas.get(key.strip()))
        answer.arguments(f"{written}{dumps(key.strip())}: {dumps(forced)}")
        written = ", "
        if mark != form[2]:
            break
    answer.arguments("{}" if written == "{" else "}")


def _unwrapped(text: str) -> str:
    """Without the line breaks around it that belong to the tags."""
    text = text[1:] if text.startswith("\n") else text
    return text[:-1] if text.endswith("\n") else text


def _glm(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`<tool_call>NAME <arg_key>K</arg_key><arg_value>V</arg_value> </tool_call>`."""
    scanner, written = answer.scanner, "{"
    name, found = yield from scanner.collect(["<arg_key>", "</tool_call>"])
    if found is None or not name.strip():
        return False
    name = name.strip()
    schemas = answer.properties(name)
    answer.call(name)
    while found == "<arg_key>":
        key, _ = yield from scanner.collect(["</arg_key>"])
        yield from scanner.space()
        opened = yield from scanner.literal("<arg_value>")
        value, found = yield from scanner.collect(
            ["</arg_value>", "<arg_key>", "</tool_call>"]
        )  # models forget to close
        text = value if opened else value.strip()
        answer.arguments(f"{written}{dumps(key.strip())}: {dumps(typed(text, schemas.get(key.strip())))}")
        written = ", "
        if found == "</arg_value>":
            found = yield from scanner.until(["<arg_key>", "</tool_call>"])
    answer.arguments("{}" if written == "{" else "}")
    return True


# -- calls as a programming language has them


def pythonic(*ends: str) -> Read:
    """`[f(a=1), g(b="x")]` up to one of `ends`; without them the whole answer from "[" on, of tools that were offered."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        parts: list[str] = []
        if ends:
            yield from answer.scanner.until(ends, parts.append)
        else:
            answer.scanner.skip(-1)
            yield from answer.scanner.value(parts.append)
        try:
            calls = Literals("".join(parts)).calls()
        except ValueError:
            return False
        if not calls or (not ends and not all(name in answer.schemas for name, _ in calls)):
            return False
        for name, arguments in calls:
            answer.call(name)
            answer.arguments(dumps(arguments))
        return True

    return read


def gemma(end: str, quote: str) -> Read:
    """`call:NAME{key:value}`, strings between `quote`s of their own."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        if mark == end:  # one too many
            return True
        text, _ = yield from answer.scanner.collect([end])
        head, brace, rest = text.strip().partition("{")
        try:
            arguments = Literals(brace + rest, (quote, "'")).mapping() if brace else {}
        except ValueError:
            return False
        name = head.partition(":")[2].strip() if head.startswith("call:") else ""
        if not name:
            return False
        answer.call(name)
        answer.arguments(dumps(arguments))
        return True

    return read


# -- channels


_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")


def _harmony(answer: AnswerReader) -> Steps[None]:
    """gpt-oss: messages in channels; `to=functions.NAME` is a call. https://github.com/openai/harmony"""
    scanner = answer.scanner
    while True:
        head, mark = yield from scanner.collect(["<|message|>"])
        if mark is None:
            answer.content("" if "<|channel|>" in head or head.strip() == "<|start|>assistant" else head)
            return
        recipient, channel = _TO.search(head), _CHANNEL.search(head)
        take = answer.reasoning if channel and channel[1] == "analysis" else answer.content
        if recipient:
            answer.call(recipient[1])
            take = answer.arguments
        if (yield from scanner.until(["<|end|>", "<|call|>", "<|return|>", "<|start|>"], take)) is None:
            return


def _never(_: AnswerReader, __: str) -> Steps[bool]:
    yield from ()
    return False


def _cohere(answer: AnswerReader) -> Steps[None]:
    """Command R7B and later: thoughts, actions and the response, each between marks of its own."""
    scanner = answer.scanner
    begins = ("<|START_THINKING|>", "<|START_ACTION|>", "<|START_RESPONSE|>", "<|START_TEXT|>")
    while (mark := (yield from scanner.until(begins, answer.content))) is not None:
        kind = mark.removeprefix("<|START_")
        if kind == "ACTION|>":
            if not (yield from objects("<|END_ACTION|>")(answer, mark)):
                yield from scanner.until(["<|END_ACTION|>"], answer.content)
        else:
            take = answer.reasoning if kind == "THINKING|>" else answer.content
            yield from scanner.until([f"<|END_{kind}"], take)
            answer.gap()


_COHERE = tuple(
    f"<|{edge}_{kind}|>" for edge in ("START", "END") for kind in ("THINKING", "ACTION", "RESPONSE", "TEXT")
)
_DSML = "｜DSML｜"

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    form.name: form
    for form in (
        ToolFormat(
            name="openai", begins=(), read=_never, whole=_harmony, inner=_HARMONY, signs=("<|channel|>", "<|call|>")
        ),
        ToolFormat(name="cohere", begins=(), read=_never, whole=_cohere, inner=_COHERE, signs=("<|START_ACTION|>",)),
        ToolFormat(
            name="minimax_m2",
            begins=("<minimax:tool_call>",),
            read=tagged(
                ('<invoke name="', '">', "</invoke>"),
                ('<parameter name="', ">", "</parameter>"),
                "</minimax:tool_call>",
                decode=unescaped,
            ),
            inner=("</minimax:tool_call>",),
        ),
        ToolFormat(
            name="step3",
            begins=("<｜tool_calls_begin｜>",),
            read=tagged(
                ('<steptml:invoke name="', '">', "</steptml:invoke>"),
                ('<steptml:parameter name="', ">", "</steptml:parameter>"),
                "<｜tool_calls_end｜>",
            ),
            inner=("<｜tool_calls_end｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>", "<｜tool_sep｜>"),
        ),
        ToolFormat(
            name="deepseek_v32",
            begins=(f"<{_DSML}function_calls>",),
            read=tagged(
                (f'<{_DSML}invoke name="', '">', f"</{_DSML}invoke>"),
                (f'<{_DSML}parameter name="', ">", f"</{_DSML}parameter>"),
                f"</{_DSML}function_calls>",
            ),
            inner=(_DSML, f"</{_DSML}function_calls>"),
            signs=(_DSML,),
        ),
        ToolFormat(name="glm45", begins=("<tool_call>",), read=_glm, inner=("</tool_call>",), signs=("<arg_key>",)),
        ToolFormat(
            name="qwen3_coder",
            begins=("<tool_call>", "<function="),
            read=tagged(("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>"), "</tool_call>"),
            inner=("</tool_call>",),
            signs=("<function=", "<parameter="),
        ),
        ToolFormat(
            name="seed_oss",
            begins=("<seed:tool_call>",),
            read=tagged(("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>"), "</seed:tool_call>"),
            inner=("</seed:tool_call>",),
        ),
        ToolFormat(
            name="kimi_k2",
            begins=("<|tool_calls_section_begin|>",),
            read=named(
                "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"
            ),
            inner=(
                "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                "<|tool_calls_section_end|>",
            ),
            call=("<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
            wrap=("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"),
        ),
        ToolFormat(
            name="deepseek_v31",
            begins=("<｜tool▁calls▁begin｜>",),
            read=named("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            signs=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>'+ tool['function']['name']"),
            call=("<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
            wrap=("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
        ),
        ToolFormat(
            name="deepseek_v3",
            begins=("<｜tool▁calls▁begin｜>",),
            read=named("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            call=("<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n", "\n```<｜tool▁call▁end｜>"),
            wrap=("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
        ),
        ToolFormat(
            name="mistral",
            begins=("[TOOL_CALLS]",),
            read=_mistral,
            inner=("[ARGS]", "[CALL_ID]"),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("[TOOL_CALLS][", ", ", "]"),
        ),
        ToolFormat(
            name="gemma4",
            begins=("<|tool_call>", "<tool_call|>"),
            read=gemma("<tool_call|>", '<|"|>'),
            inner=('<|"|>',),
        ),
        ToolFormat(
            name="functiongemma",
            begins=("<start_function_call>",),
            read=gemma("<end_function_call>", "<escape>"),
            inner=("<end_function_call>", "<escape>"),
        ),
        ToolFormat(
            name="lfm2",
            begins=("<|tool_call_start|>",),
            read=pythonic("<|tool_call_end|>"),
            inner=("<|tool_call_end|>",),
        ),
        ToolFormat(name="olmo3", begins=("<function_calls>",), read=pythonic("</function_calls>")),
        ToolFormat(
            name="internlm",
            begins=("<|action_start|><|plugin|>",),
            read=objects("<|action_end|>"),
            inner=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
            signs=("<|action_start|>",),
            call=('<|action_start|><|plugin|>{"name": "NAME", "parameters": ', "}<|action_end|>"),
        ),
        ToolFormat(
            name="granite",
            begins=("<|tool_call|>", "<tool_call>"),
            read=objects(),
            signs=("<|tool_call|>",),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("<|tool_call|>[", ", ", "]"),
        ),
        ToolFormat(
            name="nemotron",
            begins=("<TOOLCALL>",),
            read=objects("</TOOLCALL>"),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("<TOOLCALL>[", ", ", "]</TOOLCALL>"),
        ),
        ToolFormat(
            name="jamba",
            begins=("<tool_calls>",),
            read=objects("</tool_calls>"),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("<tool_calls>[", ", ", "]</tool_calls>"),
        ),
        ToolFormat(
            name="phi4_mini_json",
            begins=("functools",),
            read=objects(),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("functools[", ", ", "]"),
        ),
        ToolFormat(
            name="functionary",
            begins=("<function=",),
            read=_function,
            signs=("<function=example_function_name>{",),
            call=("<function=NAME>", "</function>"),
        ),
        ToolFormat(
            name="llama3_json",
            begins=("<|python_tag|>", "{", "["),
            read=lambda answer, mark: objects(bare=mark in "{[")(answer, mark),
            signs=("<|python_tag|>",),
            call=('{"name": "NAME", "parameters": ', "}"),
            wrap=("", "; ", ""),
            trigger="<|python_tag|>",
        ),
        ToolFormat(
            name="hermes",
            begins=("<tool_call>",),
            read=objects("</tool_call>"),
            inner=("</tool_call>",),
            call=('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
        ),
        ToolFormat(
            name="pythonic",
            begins=("[",),
            read=pythonic(),
            signs=("func_name1(params_name1=",),
        ),
        ToolFormat(
            name="json",
            begins=("{", "["),
            read=objects(bare=True),
            signs=('{"name": function name, "parameters":',),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("[", ", ", "]"),
        ),
    )
}
"""The first whose signs a chat template holds is what it teaches; `json` is what a model is told that was taught none."""

THOUGHT_FORMATS: Mapping[str, ThoughtFormat] = {
    form.name: form
    for form in (
        ThoughtFormat("gemma4", ("<|channel>thought\n", "<|channel>"), "<channel|>"),
        ThoughtFormat("mistral", ("[THINK]",), "[/THINK]"),
        ThoughtFormat("seed_oss", ("<seed:think>",), "</seed:think>"),
        ThoughtFormat("cohere", ("<|START_THINKING|>",), "<|END_THINKING|>"),
        ThoughtFormat("granite", ("Here is my thought process:",), "Here is my response:"),
        ThoughtFormat("think", ("<think>",), "</think>"),
        ThoughtFormat("deepseek_r1", ("<think>",), "</think>", always=True),
    )
}
"""As `TOOL_FORMATS`; a chat template that holds the end mark teaches it."""

_THOUGHT_ALIASES = {
    "qwen3": "think",
    "deepseek_v3": "think",
    "glm45": "think",
    "olmo3": "deepseek_r1",
    "minimax_m2": "deepseek_r1",
    "nemotron": "deepseek_r1",
    "step3": "deepseek_r1",
}
_TOOL_ALIASES = {
    "qwen3_xml": "qwen3_coder",
    "qwen": "hermes",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "glm47": "glm45",
    "granite-20b-fc": "granite",
    "hunyuan_a13b": "jamba",
    "xlam": "json",
    "command_r": "cohere",
    "gpt_oss": "openai",
}


def tool_format(name: str) -> ToolFormat | None:
    """By its name or another engine's name for it."""
    return TOOL_FORMATS.get(_TOOL_ALIASES.get(name, name))


def thought_format(name: str) -> ThoughtFormat | None:
    """By its name or another engine's name for it."""
    return THOUGHT_FORMATS.get(_THOUGHT_ALIASES.get(name, name))


def taught_tools(templates: Sequence[str]) -> ToolFormat | None:
    """The format that a model's chat templates teach."""
    text = "\n".join(templates)
    return next(
        (form for form in TOOL_FORMATS.values() if all(sign in text for sign in form.signs or form.begins)), None
    )


def taught_thoughts(templates: Sequence[str]) -> ThoughtFormat | None:
    """How a model thinks, by its chat templates."""
    text = "\n".join(templates)
    return next((form for form in THOUGHT_FORMATS.values() if form.end in text and not form.always), None)


def names() -> tuple[Sequence[str], Sequence[str]]:
    """What --tool-call-parser and --reasoning-parser take."""
    return sorted({*TOOL_FORMATS, *_TOOL_ALIASES}), sorted({*THOUGHT_FORMATS, *_THOUGHT_ALIASES})


def marks_of(tools: ToolFormat | None, thoughts: ThoughtFormat | None) -> set[str]:
    """All text by which calls and thoughts are told from the rest."""
    found: set[str] = {*tools.begins, *tools.inner} if tools else set()
    return found | ({*thoughts.begins, thoughts.end} if thoughts else set())


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tool -> its parameters' schema."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function.get("parameters") for function in functions}
