"""Answers of models, a target for each format in which they call tools or think: `tool_hermes`, `thought_granite`...

However an answer is cut the same is read, and it can be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvasir.cluster.answer_parts import AnswerReader, Part, ThoughtFormat, ToolFormat, read_answer, text_of
from kvasir.cluster.derived_format import derived_format
from kvasir.cluster.tool_formats import THOUGHT_FORMATS, TOOL_FORMATS
from kvasir.engine.chat_template import ChatTemplates

KINDS = ("content", "reasoning", "call", "arguments")
TOOLS, THOUGHTS = [None, *TOOL_FORMATS.values()], [None, *THOUGHT_FORMATS.values()]
SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "string"},
            "c": {"type": "array"},
            "d": {"type": "object"},
        },
    }
}


def check(tools: ToolFormat | None, thoughts: ThoughtFormat | None, begun: bool, step: int, text: str) -> None:
    """Raises when pieces of `step` characters are read otherwise than the whole; or calls are read where there are no tools."""
    if tools is not None and tools.whole is not None:
        unarmed = _pieces(AnswerReader(tools, thoughts, begun=begun, may_call=False), step, text)
        assert all(part.kind != "call" for part in unarmed), text
    whole = read_answer(AnswerReader(tools, thoughts, begun=begun, schemas=SCHEMAS), text)
    parts = _pieces(AnswerReader(tools, thoughts, begun=begun, schemas=SCHEMAS), step, text)
    for kind in KINDS:
        said = text_of(parts, kind)
        assert said == text_of(whole, kind), (kind, text)
        for one in said if isinstance(said, list) else [said]:
            one.encode()


def _pieces(reader: AnswerReader, step: int, text: str) -> list[Part]:
    parts = [part for at in range(0, len(text), step) for part in reader.feed(text[at : at + step])]
    return [*parts, *reader.finish()]


def answers(data: bytes) -> None:
    """Calls and thoughts in any two formats."""
    if len(data) >= 3:
        tools, thoughts = TOOLS[data[0] % len(TOOLS)], THOUGHTS[data[1] % len(THOUGHTS)]
        check(tools, thoughts, bool(data[2] & 128), data[2] % 16 + 1, data[3:].decode("utf-8", "replace"))


def derived(data: bytes) -> None:
    """A chat template nobody knows, before a line of \\0, and an answer in the format that it shows."""
    source, _, answer = data[1:].decode("utf-8", "replace").partition("\0")
    if (form := derived_format(ChatTemplates({"default": source}, {"bos_token": "<s>"}))) is not None:
        check(form, None, False, data[0] % 16 + 1, answer)


def _one(tools: ToolFormat | None, thoughts: ThoughtFormat | None, data: bytes) -> None:
    if data:
        check(tools, thoughts, bool(data[0] & 128), data[0] % 16 + 1, data[1:].decode("utf-8", "replace"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "answers": answers,
    "derived": derived,
    **{f"tool_{name}": partial(_one, form, None) for name, form in TOOL_FORMATS.items()},
    **{f"thought_{name}": partial(_one, None, form) for name, form in THOUGHT_FORMATS.items()},
}
