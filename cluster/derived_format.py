"""The format in which a chat template shows calls, for templates of families that aren't known: it writes one, and what stands
around its name and arguments is the format."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from kvasir.cluster.answer_parts import ThoughtFormat, ToolFormat
from kvasir.cluster.derived_tags import NAMES, Call, tag_format, understood
from kvasir.cluster.tool_readers import named, objects
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError

_NAME, _TEXT = NAMES[0], "probe_answer"
_ARGUMENTS = {"probe_key": "probe_value"}
_SPELLINGS = (json.dumps(_ARGUMENTS), json.dumps(_ARGUMENTS, separators=(",", ":")))
_PARAMETERS = {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": ["p"]}
_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": _PARAMETERS}}
_ID = "probe0000"
_THOUGHT = "probe_thought"
_BEGIN_MARK = re.compile(r"(<[^<>/\s][^<>\s]{0,40}>|\[[A-Za-z_]{2,40}\])\s*$")
_END_MARK = re.compile(r"\s*(<[^<>\s]{1,41}>|\[/?[A-Za-z_]{2,40}\])\s*")
_KEY = re.compile(r'"(name|tool_name|function|function_name)"\s*:\s*"$')
_USER = {"role": "user", "content": "Hello"}


def shows_tools(templates: ChatTemplates) -> bool:
    """A tool that a request offers is there for the model to see."""
    return "probe_tool" in _rendered(templates, [_USER])


def derived_format(templates: ChatTemplates) -> ToolFormat | None:
    """None: the template shows no calls, or in a form that can't be told from other text."""
    shown = shown_calls(templates, [(_NAME, _ARGUMENTS)])
    given = next((spelling for spelling in _SPELLINGS if spelling in shown), None)
    if given is None:
        return tag_format(lambda calls: shown_calls(templates, calls))
    before, _, rest = shown.partition(_NAME)
    between, _, after = rest.partition(given)
    return _format(before, between, after) if rest and _ID not in between + after else None


def taught_differs(templates: ChatTemplates, taught: ToolFormat) -> bool:
    """What the template shows of a call isn't read as one in this format, though it is in the one that is derived."""
    if taught.whole is not None:  # what is shown of a call begins in the midst of it
        return False
    calls = [(_NAME, _ARGUMENTS)]
    shown = shown_calls(templates, calls)
    if not shown or understood(taught, shown, calls):
        return False
    return (derived := derived_format(templates)) is not None and understood(derived, shown, calls)


def derived_thoughts(templates: ChatTemplates) -> ThoughtFormat | None:
    """The marks in which the template shows thoughts. None: it shows none, or between marks that can't be told from others."""
    message = {"role": "assistant", "content": _TEXT} | dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), _THOUGHT
    )
    before, _, rest = _rendered(templates, [_USER, message]).partition(_THOUGHT)
    between, text, _ = rest.partition(_TEXT)
    begin, end = _BEGIN_MARK.search(before), _END_MARK.fullmatch(between)
    if not text or begin is None or end is None or _words(begin[1]) != _words(end[1]) or begin[1] == end[1]:
        return None
    return ThoughtFormat("derived", (begin[1],), end[1])


def _words(mark: str) -> set[str]:
    """What a beginning and its end have in common: all but that they are such."""
    return {*re.findall(r"[a-z]+", mark.lower())} - {"begin", "end", "start", "stop", "prefix", "suffix", "of"}


def shown_calls(templates: ChatTemplates, calls: Sequence[Call]) -> str:
    """What the template makes of an answer that is these calls; empty where it refuses, or shows none."""
    tool_calls = [
        {
            "id": _ID if not number else f"{_ID[:-1]}{number}",
            "type": "function",
            "function": {"name": name, "arguments": given},
        }
        for number, (name, given) in enumerate(calls)
    ]
    called = _rendered(templates, [_USER, {"role": "assistant", "content": "", "tool_calls": tool_calls}])
    said = _rendered(templates, [_USER, {"role": "assistant", "content": _TEXT}])
    if not all(name in called for name, _ in calls) or _TEXT not in said:
        return ""
    head, _, tail = said.partition(_TEXT)
    start, end = _outwards(called, _shared(called, head), len(called) - _shared(called[::-1], tail[::-1]))
    return called[start:end].removeprefix(_header(templates))


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
    item, numbered, named_by = before.strip().partition(_ID)
    if numbered:
        given = (item.strip(), named_by.strip(), between.strip(), after.strip())
        return _with_ids(*given) if all(given) else None
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


def _with_ids(item: str, behind: str, separator: str, end: str) -> ToolFormat:
    """`item` ID `behind` NAME `separator` JSON `end`."""
    return ToolFormat(
        name="derived",
        begins=(item,),
        read=named(item, separator, end, before=behind),
        inner=(behind, separator, end),
        call=(f"{item}{{id}}{behind}NAME{separator}", end),
        wrap=("", "", ""),
    )


def _rendered(templates: ChatTemplates, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Empty where the template refuses."""
    try:
        return templates.render(messages, [_TOOL], add_generation_prompt=add_generation_prompt)
    except ClientError:
        return ""
