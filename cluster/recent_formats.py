"""Formats of calls that families of models have had since 2025: see `tool_formats`, which holds them too."""

from __future__ import annotations

from kvasir.cluster.answer_parts import ThoughtFormat, ToolFormat
from kvasir.cluster.channel_readers import Channel, addressed, channels, recipients
from kvasir.cluster.nested_readers import nested
from kvasir.cluster.styled_readers import CDATA, styled
from kvasir.cluster.tool_readers import enclosed, keyed, named, never, objects
from kvasir.engine.argument_style import ArgumentStyle

_MM = "]<]minimax[>["
_DSML = "｜DSML｜"
_XTML = ("<|open|>", "<|close|>", "<|sep|>")
_K3 = ArgumentStyle(
    key=('<|open|>argument key="', '" type="string"<|sep|>'),
    key_json='" type="KIND"<|sep|>',
    end="<|close|>argument<|sep|>",
    marks=("<|close|>argument<|sep|>", "<|close|>call<|sep|>"),
)
_ATTRIBUTES = r'(\s+\w+="[^"]*")*<\|sep\|>'
"""What a call of Kimi K3 has behind its tool."""
_SOLAR = ("<|think|>", "<|content|>", "<|end|>", "<|begin|>", "<|tool_calls|>", "<|calls|>")
_SOLAR_CALL = tuple(f"<|tool_call:{part}|>" for part in ("begin", "name", "args", "end"))
_INKLING = (
    "<|message_model|>", "<|content_text|>", "<|content_thinking|>", "<|content_invoke_tool_json|>", "<|end_message|>",
    "<|content_model_end_sampling|>",
)  # fmt: skip
_INKLING_ENDS = ("<|end_message|>", "<|content_model_end_sampling|>")
_GLIMMER = ArgumentStyle(
    key=('<atem:parameter name="', '">'),
    end="</atem:parameter>",
    marks=("</atem:parameter>", "</atem:invoke>", "</atem:function_calls>"),
    gap="\n",
)
_HY = ArgumentStyle(
    key=("<arg_key>", "</arg_key>\n<arg_value>"),
    end="</arg_value>",
    marks=("</arg_value>", "</tool_call>"),
    gap="\n",
)
_SOLAR2 = ArgumentStyle(
    key=("<|tool_arg:start|>", "<|tool_arg:value|>"),
    end="<|tool_arg:end|>",
    marks=("<|tool_arg:end|>", "<|tool_call:end|>"),
    gap="\n",
)
_PARAM = ArgumentStyle(key=('<param name="', '">'), end="</param>", marks=("</param>", "</function>", CDATA), gap="\n")


def _dsml(name: str, section: str, space: str) -> ToolFormat:
    """DeepSeek's since V4. section: what is around all calls. space: behind the mark of each tag."""
    invoke, parameter = (f"{_DSML}{space}{word}" for word in ("invoke", "parameter"))
    style = ArgumentStyle(
        key=(f'<{parameter} name="', '" string="true">'),
        key_json='" string="false">',
        end=f"</{parameter}>",
        marks=(f"</{parameter}>", f"</{invoke}>"),
        gap="\n",
    )
    around = f"{_DSML}{section}>"
    return ToolFormat(
        name=name,
        begins=(f"<{around}",),
        read=styled((f'<{invoke} name="', '">', f"</{invoke}>"), style, f"</{around}"),
        inner=(_DSML, f"</{around}"),
        call=(f'<{invoke} name="NAME">\n', f"</{invoke}>\n"),
        wrap=(f"<{around}\n", "", f"</{around}"),
        arguments=style,
    )


RECENT_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        name="minimax_m3",
        begins=(f"{_MM}<tool_call>",),
        read=nested(_MM),
        inner=(_MM,),
        signs=(_MM,),
        call=(f'{_MM}<invoke name="NAME">', f"{_MM}</invoke>\n"),
        wrap=(f"{_MM}<tool_call>\n", "", f"{_MM}</tool_call>"),
        arguments=ArgumentStyle(key=(f"{_MM}<", ">"), end=f"{_MM}</", again=("", ">"), texts="nested", marks=(_MM,)),
    ),
    ToolFormat(
        name="kimi_k3",
        begins=(),
        read=never,
        whole=channels(
            {
                "<|open|>think<|sep|>": Channel("reasoning", ("<|close|>think<|sep|>",)),
                "<|open|>response<|sep|>": Channel("content", ("<|close|>response<|sep|>",)),
                "<|open|>tools<|sep|>": Channel(
                    "content",
                    ("<|close|>tools<|sep|>",),
                    styled(
                        ('<|open|>call tool="', '"', "<|close|>call<|sep|>"), _K3, "<|close|>tools<|sep|>", _ATTRIBUTES
                    ),
                ),
            },
            skipped=tuple(f"<|close|>{name}<|sep|>" for name in ("message", "response", "think", "tools")),
        ),
        inner=_XTML,
        signs=("<|open|>", "xtml_value"),
        call=('<|open|>call tool="NAME" index="{number}"<|sep|>', "<|close|>call<|sep|>"),
        wrap=("<|open|>tools<|sep|>", "", "<|close|>tools<|sep|>"),
        befores=(
            "<|open|>response<|sep|><|close|>response<|sep|><|open|>tools<|sep|>",
            "<|close|>response<|sep|><|open|>tools<|sep|>",
        ),
        arguments=_K3,
        blocks=(
            ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
            ("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
        ),
        answer=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
        thoughts=ThoughtFormat("kimi_k3", ("<|open|>think<|sep|>",), "<|close|>think<|sep|><|open|>response<|sep|>"),
    ),
    ToolFormat(
        name="solar_open",
        begins=(),
        read=never,
        whole=channels(
            {
                "<|think|>": Channel("reasoning", ("<|end|>",)),
                "<|content|>": Channel("content", ("<|end|>",)),
                "<|tool_calls|>": Channel(
                    "content",
                    ("<|calls|>",),
                    named(_SOLAR_CALL[0], _SOLAR_CALL[2], _SOLAR_CALL[3], "<|calls|>", before=_SOLAR_CALL[1]),
                ),
            },
            heads={"<|begin|>": "assistant"},
            skipped=("<|end|>", "<|calls|>"),
        ),
        inner=(*_SOLAR, *_SOLAR_CALL),
        signs=("<|tool_calls|>", "<|tool_call:begin|>"),
        call=("".join((_SOLAR_CALL[0], "{id}", _SOLAR_CALL[1], "NAME", _SOLAR_CALL[2])), _SOLAR_CALL[3]),
        wrap=("<|tool_calls|>", "", "<|calls|>"),
        blocks=(("<|think|>", "<|end|><|begin|>assistant"),),
        answer=("<|content|>", "<|end|>"),
        thoughts=ThoughtFormat("solar_open", ("<|think|>",), "<|end|><|begin|>assistant<|content|>"),
    ),
    ToolFormat(
        name="inkling",
        begins=(),
        read=never,
        whole=channels(
            {
                "<|content_thinking|>": Channel("reasoning", _INKLING_ENDS),
                "<|content_text|>": Channel("content", _INKLING_ENDS),
                "<|content_invoke_tool_json|>": Channel("content", _INKLING_ENDS, objects(*_INKLING_ENDS)),
            },
            skipped=("<|message_model|>", *_INKLING_ENDS),
        ),
        inner=_INKLING,
        signs=("<|content_invoke_tool_json|>",),
        call=('<|content_invoke_tool_json|>{"name": "NAME", "args": ', "}<|end_message|>"),
        wrap=("", "<|message_model|>", ""),
        blocks=(("<|content_thinking|>", "<|end_message|><|message_model|>"),),
        answer=("<|content_text|>", "<|end_message|>"),
        thoughts=ThoughtFormat(
            "inkling", ("<|content_thinking|>",), "<|end_message|><|message_model|><|content_text|>"
        ),
    ),
    ToolFormat(
        name="muse_glimmer",
        begins=(),
        read=never,
        whole=addressed(
            styled(
                ('<atem:invoke name="', '">', "</atem:invoke>"),
                _GLIMMER,
                "</atem:function_calls>",
                "<atem:function_calls>",
            ),
            "<|eom|>",
            "<|eot|>",
        ),
        inner=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
        signs=("<atem:invoke", "to=self"),
        call=(
            ' to=NAME<|message|><atem:function_calls>\n<atem:invoke name="NAME">',
            "</atem:invoke>\n</atem:function_calls>",
        ),
        wrap=("", "<|eom|><|start|>assistant", ""),
        arguments=_GLIMMER,
        blocks=((" to=self<|message|>", "<|eom|><|start|>assistant"),),
        answer=(" to=user<|message|>", ""),
        thoughts=ThoughtFormat(
            "muse_glimmer", (" to=self<|message|>",), "<|eom|><|start|>assistant to=user<|message|>"
        ),
    ),
    ToolFormat(
        name="functionary_v32",
        begins=(),
        read=never,
        whole=recipients,
        signs=(">>>all\\n", "recipient==all"),
        call=("NAME\n", ""),
        wrap=("", ">>>", ""),
        blocks=(("all\n", ">>>"),),
        answer=("all\n", ""),
    ),
    ToolFormat(
        name="apertus",
        begins=("<|tools_prefix|>",),
        read=keyed("<|tools_suffix|>"),
        inner=("<|tools_suffix|>",),
        call=('{"NAME": ', "}"),
        wrap=("<|tools_prefix|>[", ", ", "]<|tools_suffix|>"),
    ),
    ToolFormat(
        name="ernie45",
        begins=("<tool_call>", "<response>"),
        read=enclosed("<response>", "</response>", "<tool_call>", objects("</tool_call>")),
        inner=("</response>", "</tool_call>"),
        call=('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
    ),
    ToolFormat(
        name="longcat",
        begins=("<longcat_tool_call>",),
        read=objects("</longcat_tool_call>"),
        inner=("</longcat_tool_call>",),
        call=('<longcat_tool_call>\n{"name": "NAME", "arguments": ', "}\n</longcat_tool_call>"),
    ),
    ToolFormat(
        name="gigachat3",
        begins=("<|function_call|>", "<|message_sep|>\n\nfunction call<|role_sep|>", "function call<|role_sep|>"),
        read=objects(),
        inner=("<|message_sep|>", "<|role_sep|>"),
        call=('<|function_call|>{"name": "NAME", "arguments": ', "}"),
    ),
    ToolFormat(
        name="hy_v3",
        begins=("<tool_calls>",),
        read=styled(("<tool_call>", "<tool_sep>", "</tool_call>"), _HY, "</tool_calls>"),
        inner=("<tool_call>", "</tool_call>", "</tool_calls>", "<tool_sep>"),
        signs=("<tool_calls>", "<tool_sep>"),
        call=("<tool_call>NAME<tool_sep>", "</tool_call>\n"),
        wrap=("<tool_calls>\n", "", "</tool_calls>"),
        arguments=_HY,
    ),
    ToolFormat(
        name="solar_open2",
        begins=("<|tool_call:start|>",),
        read=styled(("<|tool_call:start|>", "\n", "<|tool_call:end|>"), _SOLAR2, None),
        inner=("<|tool_call:end|>", "<|tool_arg:start|>", "<|tool_arg:value|>", "<|tool_arg:end|>"),
        call=("<|tool_call:start|>NAME\n", "<|tool_call:end|>"),
        arguments=_SOLAR2,
    ),
    ToolFormat(
        name="minicpm5",
        begins=('<function name="',),
        read=styled(('<function name="', '">', "</function>"), _PARAM, None),
        inner=("</function>", "</param>"),
        signs=('<function name="', '<param name="'),
        call=('<function name="NAME">', "</function>"),
        arguments=_PARAM,
    ),
    _dsml("deepseek_v41", " calls", " "),
    _dsml("deepseek_v4", "tool_calls", ""),
    ToolFormat(
        name="command_r_plus",
        begins=("Action:\n```json", "Action: ```json", "Action:```json"),
        read=objects("```"),
        signs=("Action:\\n```json",),
        call=('{"tool_name": "NAME", "parameters": ', "}"),
        wrap=("Action:\n```json\n[", ",\n", "]```"),
    ),
)

TOOL_ALIASES = {
    "qwen3_xml": "qwen3_coder",
    "qwen": "hermes",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "glm47": "glm45",
    "granite-20b-fc": "granite",
    "hunyuan_a13b": "jamba",
    "xlam": "json",
    "command_r": "cohere",
    "cohere_command3": "cohere",
    "cohere_command4": "cohere",
    "granite4": "hermes",
    "gpt_oss": "openai",
    "mimo": "qwen3_coder",
    "minimax": "jamba",
    "poolside_v1": "glm45",
    "qwen25": "hermes",
    "step3p5": "qwen3_coder",
}
FAMILIES = {
    "<|tool_list_start|>": "lfm2",
    "List of tools: [": "lfm2",
}
"""Families whose chat templates show tools and no calls -> how they write them."""
