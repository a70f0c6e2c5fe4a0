"""Tools, and calls of them in every format, for several tests."""

from __future__ import annotations

import itertools

from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer
from kvasir.cluster.tool_formats import THOUGHT_FORMATS, TOOL_FORMATS

END = 256
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}}
OTHER = {"type": "function", "function": {"name": "ping"}}
SAMPLES = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Bergen", "days": 2}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nBergen\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bergen</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
    'Bergen</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "openai": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Bergen", "days": 2}<|call|>',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Bergen<|"|>,days:2}<tool_call|>',
    "seed_oss": "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Bergen</parameter>\n<parameter=days>2</parameter>\n"
    "</function>\n</seed:tool_call>",
    "functionary": '<function=get_weather>{"city": "Bergen", "days": 2}</function>',
    "phi4_mini_json": 'functools[{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
}


def read(form, text, *, thoughts=None, begun=False, schemas=None, cuts=()):
    """The answer, fed in the pieces that `cuts` make."""
    reader = AnswerReader(TOOL_FORMATS.get(form), THOUGHT_FORMATS.get(thoughts), begun=begun, schemas=schemas)
    answer, edges = ReadAnswer(), [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        answer.add(reader.feed(text[start:end]))
    answer.add(reader.finish())
    answer.cut = reader.cut
    return answer
