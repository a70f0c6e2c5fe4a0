"""The formats in which families of models call tools, and tell their thoughts from their answers.

Each is what the family's chat template teaches; names are those that vLLM's flags have.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from kvasir.cluster.answer_parts import ThoughtFormat, ToolFormat
from kvasir.cluster.channel_readers import cohere, harmony
from kvasir.cluster.derived_format import derived_format, derived_thoughts, taught_differs
from kvasir.cluster.recent_formats import FAMILIES, RECENT_FORMATS, TOOL_ALIASES
from kvasir.cluster.tagged_readers import glm, tagged
from kvasir.cluster.thought_formats import THOUGHT_ALIASES, THOUGHT_FORMATS
from kvasir.cluster.tool_readers import (
    function,
    gemma,
    mistral,
    named,
    never,
    objects,
    pythonic,
)
from kvasir.cluster.tool_values import unescaped
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.errors import ConfigError
from kvasir.engine.tokenizer import Tokenizer

_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")

_COHERE = tuple(
    f"<|{edge}_{kind}|>" for edge in ("START", "END") for kind in ("THINKING", "ACTION", "RESPONSE", "TEXT")
)
_DSML = "｜DSML｜"

_PARAMETERS = ArgumentStyle(
    key=("<parameter=", ">"), end="</parameter>", marks=("</parameter>", "</function>"), edge="\n", gap="\n"
)
_KEYWORDS = ArgumentStyle(key=("", "="), between=", ", texts="json")

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    form.name: form
    for form in (
        *RECENT_FORMATS,
        ToolFormat(
            name="openai",
            begins=(),
            read=never,
            whole=harmony,
            inner=_HARMONY,
            signs=("<|channel|>", "<|call|>"),
            call=("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", ""),
            wrap=("", "<|call|><|start|>assistant", ""),
            unwrapped=(" to=functions.NAME<|channel|>commentary <|constrain|>json<|message|>", ""),
            blocks=(
                ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
                ("<|channel|>commentary<|message|>", "<|end|><|start|>assistant"),
            ),
            answer=("<|channel|>final<|message|>", ""),
            thoughts=ThoughtFormat(
                "openai", ("<|channel|>analysis<|message|>",), "<|end|><|start|>assistant<|channel|>final<|message|>"
            ),
        ),
        ToolFormat(
            name="cohere",
            begins=(),
            read=never,
            whole=cohere,
            inner=_COHERE,
            signs=("<|START_ACTION|>",),
            call=('{"tool_call_id": "0", "tool_name": "NAME", "parameters": ', "}"),
            wrap=("<|START_ACTION|>[", ", ", "]<|END_ACTION|>"),
            blocks=(("<|START_THINKING|>", "<|END_THINKING|>"),),
            answer=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            thoughts=ThoughtFormat("cohere", ("<|START_THINKING|>",), "<|END_THINKING|><|START_RESPONSE|>"),
        ),
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
            call=('<invoke name="NAME">\n', "</invoke>\n"),
            wrap=("<minimax:tool_call>\n", "", "</minimax:tool_call>"),
            arguments=ArgumentStyle(
                key=('<parameter name="', '">'),
                end="</parameter>",
                marks=("</parameter>", "</invoke>"),
                edge="\n",
                gap="\n",
                escapes=True,
            ),
        ),
        ToolFormat(
            name="step3",
            begins=("<｜tool_calls_begin｜>",),
            read=tagged(
                ('<steptml:invoke name="', '">', "</steptml:invoke>"),
                ('<steptml:parameter name="', ">", "</steptml:parameter>"),
                "<｜tool_calls_end｜>",
                noise="<｜tool_call_begin｜>function<｜tool_sep｜>|<｜tool_call_end｜>",
            ),
            inner=("<｜tool_calls_end｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>", "<｜tool_sep｜>"),
            call=(
                '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME">',
                "</steptml:invoke><｜tool_call_end｜>",
            ),
            wrap=("<｜tool_calls_begin｜>", "", "<｜tool_calls_end｜>"),
            arguments=ArgumentStyle(
                key=('<steptml:parameter name="', '">'),
                end="</steptml:parameter>",
                marks=("</steptml:parameter>", "</steptml:invoke>"),
                edge="\n",
                gap="\n",
            ),
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
            call=(f'<{_DSML}invoke name="NAME">\n', f"</{_DSML}invoke>\n"),
            wrap=(f"<{_DSML}function_calls>\n", "", f"</{_DSML}function_calls>"),
            arguments=ArgumentStyle(
                key=(f'<{_DSML}parameter name="', '" string="true">'),
                key_json='" string="false">',
                end=f"</{_DSML}parameter>",
                marks=(f"</{_DSML}parameter>", f"</{_DSML}invoke>"),
                edge="\n",
                gap="\n",
            ),
        ),
        ToolFormat(
            name="glm45",
            begins=("<tool_call>",),
            read=glm,
            inner=("</tool_call>",),
            signs=("<arg_key>",),
            call=("<tool_call>NAME", "</tool_call>"),
            arguments=ArgumentStyle(
                key=("<arg_key>", "</arg_key>\n<arg_value>"),
                end="</arg_value>",
                marks=("</arg_value>", "<arg_key>", "</tool_call>"),
                gap="\n",
            ),
        ),
        ToolFormat(
            name="seed_oss",
            begins=("<seed:tool_call>",),
            read=tagged(("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>"), "</seed:tool_call>"),
            inner=("</seed:tool_call>",),
            call=("<seed:tool_call>\n<function=NAME>", "</function>\n</seed:tool_call>"),
            arguments=_PARAMETERS,
        ),
        ToolFormat(
            name="qwen3_coder",
            begins=("<tool_call>", "<function="),
            read=tagged(("<function=", ">", "</function>"), ("<parameter=", ">", "</parameter>"), "</tool_call>"),
            inner=("</tool_call>",),
            signs=("<function=", "<parameter="),
            call=("<tool_call>\n<function=NAME>", "</function>\n</tool_call>"),
            unwrapped=("<function=NAME>", "</function>"),
            arguments=_PARAMETERS,
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
            call=("<|tool_call_begin|>functions.NAME:{number}<|tool_call_argument_begin|>", "<|tool_call_end|>"),
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
            read=mistral,
            inner=("[ARGS]", "[CALL_ID]"),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("[TOOL_CALLS][", ", ", "]"),
        ),
        ToolFormat(
            name="gemma4",
            begins=("<|tool_call>", "<tool_call|>"),
            read=gemma("<tool_call|>", '<|"|>'),
            inner=('<|"|>',),
            call=("<|tool_call>call:NAME{", "}<tool_call|>"),
            wrap=("", "", ""),
            arguments=ArgumentStyle(key=("", ":"), between=",", texts="quoted", quote='<|"|>', marks=("<tool_call|>",)),
        ),
        ToolFormat(
            name="functiongemma",
            begins=("<start_function_call>",),
            read=gemma("<end_function_call>", "<escape>"),
            inner=("<end_function_call>", "<escape>"),
            call=("<start_function_call>call:NAME{", "}<end_function_call>"),
            wrap=("", "", ""),
            arguments=ArgumentStyle(
                key=("", ":"), between=",", texts="quoted", quote="<escape>", marks=("<end_function_call>",)
            ),
        ),
        ToolFormat(
            name="lfm2",
            begins=("<|tool_call_start|>",),
            read=pythonic("<|tool_call_end|>"),
            inner=("<|tool_call_end|>",),
            call=("NAME(", ")"),
            wrap=("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
            arguments=_KEYWORDS,
        ),
        ToolFormat(
            name="olmo3",
            begins=("<function_calls>",),
            read=pythonic("</function_calls>"),
            call=("NAME(", ")"),
            wrap=("<function_calls>", "\n", "</function_calls>"),
            arguments=_KEYWORDS,
        ),
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
            read=function,
            signs=("<function=example_function_name>{",),
            call=("<function=NAME>", "</function>"),
        ),
        ToolFormat(
            name="llama3_json",
            begins=("{", "[", "<|python_tag|>"),
            read=lambda answer, mark: objects(bare=mark in "{[")(answer, mark),
            signs=("<|python_tag|>",),
            call=('{"name": "NAME", "parameters": ', "}"),
            wrap=("", "; ", ""),
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
            signs=("func_name1(param",),
            call=("NAME(", ")"),
            wrap=("[", ", ", "]"),
            arguments=_KEYWORDS,
        ),
        ToolFormat(
            name="json",
            begins=("{", "["),
            read=objects(bare=True),
            signs=('{"name": function name, "parameters":',),
            call=('{"name": "NAME", "arguments": ', "}"),
            wrap=("[", ", ", "]"),
            unwrapped=('{"name": "NAME", "arguments": ', "}"),
        ),
    )
}
"""The first whose signs a chat template holds is what it teaches; `json` is what a model is told that was taught none."""


def model_formats(
    tools: str, thoughts: str, tokenizer: Tokenizer | None
) -> tuple[ToolFormat | None, ThoughtFormat | None]:
    """Those of --tool-call-parser and --reasoning-parser. ConfigError when there is none of that name."""
    templates = [] if tokenizer is None else [*tokenizer.templates.sources.values()]
    if tools == "auto":
        found = taught_tools(templates)
        if tokenizer is not None and (found is None or taught_differs(tokenizer.templates, found)):
            found = derived_format(tokenizer.templates)
    elif (found := TOOL_FORMATS.get(TOOL_ALIASES.get(tools, tools))) is None:
        known = ", ".join(sorted({*TOOL_FORMATS, *TOOL_ALIASES}))
        raise ConfigError(
            f"--tool-call-parser must be auto or one of {known}; got {tools!r:.60}", param="tool_call_parser"
        )
    if thoughts == "auto":
        taught = taught_thoughts(templates)
        return found, taught or (derived_thoughts(tokenizer.templates) if tokenizer is not None else None)
    name = THOUGHT_ALIASES.get(thoughts, thoughts)
    whole = {form.name for form in TOOL_FORMATS.values() if form.whole is not None} - {*THOUGHT_FORMATS}
    if name not in (*THOUGHT_FORMATS, "none", *whole):
        known = ", ".join(sorted({*THOUGHT_FORMATS, *THOUGHT_ALIASES, *whole}))
        text = f"--reasoning-parser must be auto, none or one of {known}; got {thoughts!r:.60}"
        raise ConfigError(text, param="reasoning_parser")
    return found, THOUGHT_FORMATS.get(name)


def taught_tools(templates: Sequence[str]) -> ToolFormat | None:
    """The format that a model's chat templates teach."""
    text = "\n".join(templates)
    found = (form for form in TOOL_FORMATS.values() if all(sign in text for sign in form.signs or form.begins))
    families = (TOOL_FORMATS[name] for sign, name in FAMILIES.items() if sign in text)
    return next(itertools.chain(found, families), None)


def taught_thoughts(templates: Sequence[str]) -> ThoughtFormat | None:
    """How a model thinks, by its chat templates."""
    text = "\n".join(templates)
    return next((form for form in THOUGHT_FORMATS.values() if form.end in text and not form.always), None)


def marks_of(tools: ToolFormat | None, thoughts: ThoughtFormat | None) -> set[str]:
    """All text by which calls and thoughts are told from the rest."""
    found: set[str] = {*tools.begins, *tools.inner} if tools else set()
    return found | ({*thoughts.begins, thoughts.end} if thoughts else set())
