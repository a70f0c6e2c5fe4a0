"""Anthropic's request bodies as calls. As in `openai_schema`, each field is honoured, ignored with a warning, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.anthropic_messages import conversation, unread
from kvasir.cluster.call import Call, Conversation, thinking_variables
from kvasir.cluster.context_edits import Edit, edits_of
from kvasir.cluster.foreign_fields import foreign_constraints
from kvasir.cluster.openai_fields import SAMPLING, Check, Neutral, boolean, integer_from, later, string
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.tool_use import ToolUse, tool_use
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import MAX_WHOLE, StructuredOutput

Body = Mapping[str, Any]
Json = dict[str, Any]

_POSITIVE = integer_from(1, 2**31 - 1)
_COUNTED: dict[str, Check] = {
    "model": string,
    "messages": later,
    "system": later,
    "tools": later,
    "tool_choice": later,
    "thinking": later,
    "output_config": later,
    "output_format": later,
    "context_management": later,
}
_MESSAGES: dict[str, Check] = {
    **_COUNTED,
    "max_tokens": _POSITIVE,
    "stream": boolean,
    "stop_sequences": SAMPLING["stop"],
    "temperature": SAMPLING["temperature"],
    "top_p": SAMPLING["top_p"],
    "top_k": SAMPLING["top_k"],
    "metadata": later,
    "cache_control": later,
    "cache_salt": string,
    "return_timing": boolean,
}
_IGNORED: Neutral = {
    "service_tier": ("auto", "standard_only"),
    **dict.fromkeys(("inference_geo", "user_profile_id", "workspace_id", "diagnostics"), ()),
    "speed": ("standard",),
}
_NOT_COUNTED: Neutral = {**_IGNORED, **{name: () for name in _MESSAGES if name not in _COUNTED}}
"""What is said of the answer, in a body whose tokens are counted."""
_REFUSED: Neutral = {
    **foreign_constraints(_MESSAGES),
    "container": (),
    "mcp_servers": ([],),
    "fallbacks": ([],),
}
_TOOL = ("type", "name", "description", "input_schema", "strict", "cache_control")
EFFORTS = ("low", "medium", "high", "xhigh", "max")
_CHOICES = ("auto", "any", "tool", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesAsk:
    """A body of /v1/messages or /v1/messages/count_tokens understood."""

    call: Call
    conversation: Conversation
    stream: bool = False
    hides_thoughts: bool = False
    """Their blocks come without a text."""
    return_timing: bool = False
    """Where the time went is told in the answer."""
    edits: Sequence[Edit] | None = None
    """What of the conversation the model may not read again."""
    applied: Sequence[Json] | None = None
    """Which of them were applied."""
    warnings: tuple[str, ...] = ()


def parse_messages(body: Body) -> MessagesAsk:
    """Body of POST /v1/messages. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, _MESSAGES, _IGNORED, _REFUSED)
    if "max_tokens" not in fields:
        raise ClientError("max_tokens is required: the most tokens to write", param="max_tokens")
    sampling: Json = {name: fields[name] for name in ("max_tokens", "temperature", "top_p", "top_k") if name in fields}
    sampling["stop"] = fields.get("stop_sequences", ())
    if schema := _schema(fields):
        sampling["structured_outputs"] = StructuredOutput(json=json.dumps(schema))
    if "metadata" in fields:
        warnings += _metadata(fields["metadata"])
    found, cached = _conversation(fields)
    warnings += _overlooked(fields)
    if "reasoning_effort" in found.variables:
        warnings += ("output_config.effort (but by chat templates that know reasoning_effort)",)
    if cached or fields.get("cache_control"):
        warnings += ("cache_control (prefixes are cached without it)",)
    thinking = fields.get("thinking") or {}
    call = Call(
        model=fields.get("model", ""),
        prompts=(found,),
        cache_salt=fields.get("cache_salt", ""),
        sampling=sampling,
        known_as={
            "stop": "stop_sequences",
            "structured_outputs": "output_format" if "output_format" in fields else "output_config",
        },
        tools=_use(fields, found.tools),
        thinks=thinking.get("type") == "enabled",  # adaptive leaves it to the model
        thinking_budget=_budget(thinking),
    )
    asked = {name: fields[name] for name in ("stream", "return_timing") if name in fields}
    hides = thinking.get("display") == "omitted"
    return MessagesAsk(
        call=call, conversation=found, hides_thoughts=hides, edits=_edits(fields), warnings=warnings, **asked
    )


def parse_count(body: Body) -> MessagesAsk:
    """Body of POST /v1/messages/count_tokens."""
    fields, warnings = sort_fields(body, _COUNTED, _NOT_COUNTED, _REFUSED)
    found, _ = _conversation(fields)
    warnings += _overlooked(fields)
    call = Call(model=fields.get("model", ""), prompts=(found,))
    return MessagesAsk(call=call, conversation=found, edits=_edits(fields), warnings=warnings)


def _edits(fields: Mapping[str, Any]) -> Sequence[Edit] | None:
    return edits_of(fields["context_management"]) if "context_management" in fields else None


def _conversation(fields: Mapping[str, Any]) -> tuple[Conversation, bool]:
    """(what the chat template reads, whether cache_control was met)."""
    messages, cached = conversation(fields.get("messages"), fields.get("system"))
    tools, more = _tools(fields.get("tools"))
    _choice(fields.get("tool_choice"))
    prefilled = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    found = Conversation(
        messages=messages,
        tools=tools or None,
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        variables={**_variables(fields.get("thinking")), **_effort(fields)},
    )
    return found, cached or more


def _tools(given: Any) -> tuple[list[Json], bool]:
    """(tools as chat templates know them, whether cache_control was met)."""
    if given is None:
        return [], False
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise ClientError(f"tools must be a list of objects, got {given!r:.60}", param="tools")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(given)], any("cache_control" in tool for tool in given)


def _tool(tool: Body, at: str) -> Json:
    if tool.get("type", "custom") not in ("custom", None):
        text = f"{at}: this server runs no tools of its own, such as {tool['type']!r:.60}; describe yours"
        raise UnsupportedError(text, param="tools")
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
        raise ClientError(f"{at} must have a name and an input_schema", param="tools")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if _flag(tool, "strict", at, "tools"):
        function["strict"] = True
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(given: Any) -> Any:
    """tool_choice in OpenAI's words."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in _CHOICES:
        text = f"tool_choice must be an object whose type is {', '.join(_CHOICES)}; got {given!r:.60}"
        raise ClientError(text, param="tool_choice")
    if kind == "tool":
        return {"type": "function", "function": {"name": given.get("name")}}
    return "required" if kind == "any" else kind


def _variables(thinking: Any) -> Json:
    """What `thinking` tells the chat template."""
    if thinking is None:
        return {}
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind not in ("enabled", "adaptive", "disabled"):
        text = f"thinking must be an object whose type is enabled, adaptive or disabled; got {thinking!r:.60}"
        raise ClientError(text, param="thinking")
    if (display := thinking.get("display")) not in (None, "summarized", "omitted"):
        raise ClientError(f"thinking.display must be summarized or omitted, got {display!r:.60}", param="thinking")
    return thinking_variables(None, kind != "disabled")


def _budget(thinking: Mapping[str, Any]) -> int | None:
    """Tokens of thoughts."""
    budget = thinking.get("budget_tokens")
    if budget is not None and (type(budget) is not int or not 1 <= budget <= MAX_WHOLE):
        text = f"thinking.budget_tokens must be an integer from 1 to {MAX_WHOLE}, got {budget!r:.60}"
        raise ClientError(text, param="thinking")
    return budget


def _use(fields: Mapping[str, Any], tools: Any) -> ToolUse | None:
    """What is said about tools."""
    choice = fields.get("tool_choice") or {}
    one = _flag(choice, "disable_parallel_tool_use", "tool_choice", "tool_choice")
    return tool_use(tools, _choice(fields.get("tool_choice")), not one)


def _flag(given: Body, name: str, at: str, param: str) -> bool:
    if (value := given.get(name)) is not None and not isinstance(value, bool):
        raise ClientError(f"{at}.{name} must be true or false, got {value!r:.60}", param=param)
    return bool(value)


def _overlooked(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What of messages, tools, the choice among them and thoughts says nothing here."""
    given: list[tuple[str, Body, tuple[str, ...]]] = [
        *((f"tools[{number}]", tool, _TOOL) for number, tool in enumerate(fields.get("tools") or ())),
        ("tool_choice", fields.get("tool_choice") or {}, ("type", "name", "disable_parallel_tool_use")),
        ("thinking", fields.get("thinking") or {}, ("type", "budget_tokens", "display")),
    ]
    named = [
        f"{at}.{name}" for at, one, known in given for name, v in one.items() if name not in known and v is not None
    ]
    return (*named, *unread(fields["messages"], fields.get("system")))


def _effort(fields: Mapping[str, Any]) -> Json:
    """What output_config.effort tells the chat template; most know no such thing."""
    config = fields.get("output_config")
    effort = config.get("effort") if isinstance(config, dict) else None
    if effort is not None and effort not in EFFORTS:
        text = f"output_config.effort must be {', '.join(EFFORTS)}; got {effort!r:.60}"
        raise ClientError(text, param="output_config")
    return {} if effort is None else {"reasoning_effort": effort}


def _schema(fields: Mapping[str, Any]) -> Json | None:
    """The JSON schema that output_config.format or its predecessor output_format asks for."""
    config = fields.get("output_config", {})
    if not isinstance(config, dict):
        raise ClientError(f"output_config must be an object, got {config!r:.60}", param="output_config")
    if other := [name for name, value in config.items() if name not in ("format", "effort") and value is not None]:
        raise UnsupportedError(f"output_config.{other[0]} isn't supported", param="output_config")
    form = fields.get("output_format", config.get("format"))
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        text = f'the output format must be {{"type": "json_schema", "schema": {{...}}}}, got {form!r:.60}'
        raise ClientError(text, param="output_format" if "output_format" in fields else "output_config")
    schema: Json = form["schema"]
    return schema


def _metadata(given: Any) -> tuple[str, ...]:
    """What is ignored of it: all, nothing here depends on who asks."""
    if not isinstance(given, dict):
        raise ClientError(f"metadata must be an object, got {given!r:.60}", param="metadata")
    return tuple(f"metadata.{name}" for name in given)
