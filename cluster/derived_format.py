"""The format in which a chat template shows calls, for templates of families that aren't known: it writes one, and what stands
around its name and arguments is the format."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from kvasir.cluster.answer_parts import ToolFormat
from kvasir.cluster.tool_readers import named, objects
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError

_NAME, _TEXT = "probe_function", "probe_answer"
_ARGUMENTS = {"probe_key": "probe_value"}
_SPELLINGS = (json.dumps(_ARGUMENTS), json.dumps(_ARGUMENTS, separators=(",", ":")))
_PARAMETERS = {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": ["p"]}
_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": _PARAMETERS}}
_ID = "probe0000"
_KEY = re.compile(r'"(name|tool_name|function|function_name)"\s*:\s*"$')
_USER = {"role": "user", "content": "Hello"}


def shows_tools(templates: ChatTemplates) -> bool:
    """A tool that a request offers is there for the model to see."""
    return "probe_tool" in _rendered(templates, [_USER])


def derived_format(templates: ChatTemplates) -> ToolFormat | None:
    """None: the template shows no calls, or in a form that can't be told from other text."""
    call = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    called = _rendered(templates, [_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    said = _rendered(templates, [_USER, {"role": "assistant", "content": _TEXT}])
    given = next((spelling for spelling in _SPELLINGS if spelling in called), None)
    if _NAME not in called or given is None or _TEXT not in said:
        return None
    head, _, tail = said.partition(_TEXT)
    start, end = _outwards(called, _shared(called, head), len(called) - _shared(called[::-1], tail[::-1]))
    shown = called[start:end].removeprefix(_header(templates))
    before, _, rest = shown.partition(_NAME)
    between, _, after = rest.partition(given)
    return _format(before, between, after) if rest and _ID not in before + between + after else None


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _outwards(text: str, start: int, end: int) -> tuple[int, int]:
    """Where two renderings begin to differ may be in the middle of a mark: all of it counts."""
    opened = text.rfind("<", 0, start)
    if opened > text.rfind(">", 0, start):
        start = opened
    if text.rfind("<", start, end) > text.rfind(">", start, end) and (closed := text.find(">", end)) >= 0:
        end = closed + 1
    return start, end


def _header(templates: ChatTemplates) -> str:
    """What an answer begins with."""
    prompt = _rendered(templates, [_USER], add_generation_prompt=True)
    return prompt.removeprefix(_rendered(templates, [_USER]))


def _format(before: str, between: str, after: str) -> ToolFormat | None:
    """`before` NAME `between` JSON `after`."""
    mark, brace, _ = before.partition("{")
    mark, end = mark.strip().rstrip("["), after.strip().lstrip("}] \t\n")
    call = (before.lstrip() + "NAME" + between, after.rstrip())
    if brace and not _KEY.search(before):
        return None
    if brace:
        if mark:
            return ToolFormat(name="derived", begins=(mark,), read=objects(*([end] if end else [])), call=call)
        return ToolFormat(name="derived", begins=("{", "["), read=objects(bare=True), call=call)
    if before.strip() and between.strip() and end:
        item = before.strip()
        return ToolFormat(
            name="derived", begins=(item,), read=named(item, between.strip(), end), inner=(end,), call=call
        )
    return None


def _rendered(templates: ChatTemplates, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Empty where the template refuses."""
    try:
        return templates.render(messages, [_TOOL], add_generation_prompt=add_generation_prompt)
    except ClientError:
        return ""
