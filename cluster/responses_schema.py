"""Bodies of /v1/responses as asks. As in `openai_schema`, each field is honoured, ignored with a warning, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.call import EFFORT_IGNORED, Call, Conversation, check_variables, thinking_budget, thinking_variables
from kvasir.cluster.call_sampling import named
from kvasir.cluster.custom_tools import chat_tool, custom_grammars, shown_tools
from kvasir.cluster.foreign_fields import foreign_constraints
from kvasir.cluster.openai_fields import (
    CHAT_HONOURED,
    SAMPLING,
    Check,
    Neutral,
    boolean,
    integer_from,
    later,
    list_of_texts,
    one_of,
    string,
    unused,
)
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.responses_items import input_items, messages, unread
from kvasir.cluster.service_fields import check_metadata, check_nesting, check_tier, priority
from kvasir.cluster.structured_fields import structured_output
from kvasir.cluster.tool_use import tool_use, unread_choice
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import MAX_LOGPROBS, SamplingParams

Body = Mapping[str, Any]
Json = dict[str, Any]

_OBJECT = CHAT_HONOURED["chat_template_kwargs"]
HONOURED: dict[str, Check] = {
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids")},
    **{name: SAMPLING[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")},
    **{name: CHAT_HONOURED[name] for name in ("cache_salt", "chat_template_kwargs", "priority", "request_id")},
    "return_timing": boolean,
    "model": string,
    "input": later,
    "instructions": string,
    "max_output_tokens": integer_from(1, 2**31 - 1),
    "text": _OBJECT,
    "tools": CHAT_HONOURED["tools"],
    "tool_choice": later,
    "parallel_tool_calls": boolean,
    "reasoning": _OBJECT,
    "thinking_token_budget": CHAT_HONOURED["thinking_token_budget"],
    "include": list_of_texts,
    "max_tool_calls": integer_from(1, 2**31 - 1),  # of tools that the server runs: there are none
    "top_logprobs": integer_from(0, MAX_LOGPROBS),
    "metadata": check_metadata,
    "store": boolean,
    "previous_response_id": string,
    "conversation": later,
    "background": boolean,
    "stream": boolean,
    "stream_options": _OBJECT,
    "service_tier": check_tier,
    "truncation": one_of("auto", "disabled"),
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), string),
}
IGNORED: Neutral = {
    "prompt_cache_retention": (),
    "prompt_cache_options": ({},),
    "prewarm": (False,),
}
REFUSED: Neutral = {
    **foreign_constraints({*HONOURED, *IGNORED}),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "access_programs": ({},),
    "image": ({},),
}
COMPACTED: dict[str, Check] = {
    **{name: HONOURED[name] for name in ("model", "input", "instructions", "previous_response_id", "conversation")},
    **{name: HONOURED[name] for name in ("prompt_cache_key", "service_tier", "priority", "cache_salt", "request_id")},
    "chat_template_kwargs": HONOURED["chat_template_kwargs"],
}
"""What a compaction reads of a response's body."""
NOT_COMPACTED: Neutral = {
    **REFUSED,
    **{name: () for name in HONOURED if name not in COMPACTED},
    "stream": (False,),
    "stream_options": ({},),
    "background": (False,),
    "store": (True, False),
    "metadata": ({},),
    "include": ([],),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "truncation": ("auto", "disabled"),
    "text": ({}, {"format": {"type": "text"}}),
    "reasoning": ({},),
    "top_logprobs": (0,),
    "user": (),
    "safety_identifier": (),
}
"""And what it doesn't, with the values that say nothing to it."""
INSTEAD = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "num_predict"), "max_output_tokens"),
    **dict.fromkeys(("response_format", "guided_json", "structured_outputs"), "text.format"),
    "repeat_penalty": "repetition_penalty",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "logprobs": 'include: ["message.output_text.logprobs"]',
}
"""Refused field -> what to use."""
THOUGHTS = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
_ECHOED = (
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "max_output_tokens",
    "instructions",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseAsk:
    """A body of /v1/responses understood. `body` is kept to ask it again after a restart."""

    body: Body
    call: Call
    """Without a prompt, which depends on what was said before: see `with_items`."""
    items: Sequence[Json]
    """Input of this response alone."""
    instructions: str | None
    variables: Mapping[str, Any]
    tools: Sequence[Json]
    """As chat templates know them."""
    echo: Json
    """Fields of the answer that repeat the body's."""
    session: str = ""
    """Requests of one session go to one group, where their prefixes are cached."""
    previous: str | None = None
    conversation: str | None = None
    """What is said is read from there, and added."""
    store: bool = True
    background: bool = False
    stream: bool = False
    truncates: bool = False
    """What doesn't fit into the context may be left out."""
    logprobs: int | None = None
    summarised: bool = False
    """Thoughts are shown as a summary."""
    carried: bool = False
    """And given out for the client to send back, in the field that has them encrypted elsewhere."""
    request_id: str | None = None
    return_timing: bool = False
    """Where the time went is told in the answer."""
    warnings: tuple[str, ...] = ()

    def with_items(self, items: Sequence[Json]) -> ResponseAsk:
        """The same with a prompt: all that was said so far."""
        said = messages(items, self.instructions)
        conversation = Conversation(messages=said, tools=self.tools or None, variables=self.variables, source="input")
        return dataclasses.replace(self, call=dataclasses.replace(self.call, prompts=(conversation,)))


def parse_response(body: Body) -> ResponseAsk:
    """Body of POST /v1/responses. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, HONOURED, IGNORED, REFUSED, INSTEAD)
    _check_together(fields)
    check_nesting(fields)
    given = [chat_tool(tool, f"tools[{number}]") for number, tool in enumerate(fields.get("tools", ()))]
    tools, parallel = shown_tools(given), fields.get("parallel_tool_calls", True)
    use = tool_use(tools, fields.get("tool_choice"), parallel, custom_grammars(given))
    effort, unknown = _effort(fields.get("reasoning", {}))
    check_variables(fields.get("chat_template_kwargs", {}), "chat_template_kwargs")
    sampling: Json = {name: fields[name] for name in SAMPLING if name in fields}
    if "max_output_tokens" in fields:
        sampling["max_tokens"] = fields["max_output_tokens"]
    form = _format(fields)
    with named({"response_format": "text.format"}):
        wanted = structured_output({"response_format": _chat_format(form)})
    if wanted is not None:
        sampling["structured_outputs"] = wanted
    logprobs, more = _logprobs(fields)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    SamplingParams(**sampling)  # one that runs later is refused now
    items = input_items(fields.get("input"))
    call = Call(
        model=fields.get("model", ""),
        prompts=(),
        sampling=sampling,
        known_as={"max_tokens": "max_output_tokens", "structured_outputs": "text"},
        priority=priority(fields),
        cache_salt=fields.get("cache_salt", ""),
        tools=use,
        thinking_budget=thinking_budget(fields.get("thinking_token_budget")),
    )
    return ResponseAsk(
        body=body,
        call=call,
        items=items,
        instructions=fields.get("instructions"),
        variables={**thinking_variables(effort), **fields.get("chat_template_kwargs", {})},
        tools=tools,
        echo=_echo(fields, form),
        session=fields.get("prompt_cache_key", ""),
        conversation=_conversation_id(fields.get("conversation")),
        previous=fields.get("previous_response_id"),
        truncates=fields.get("truncation") == "auto",
        logprobs=logprobs,
        summarised=bool(_summary(fields.get("reasoning", {}))),
        carried=THOUGHTS in fields.get("include", ()),
        request_id=fields.get("request_id"),
        warnings=(*warnings, *more, *unknown, *_stream_options(fields), *unused(fields), *_unread(fields)),
        **{name: fields[name] for name in ("store", "background", "stream", "return_timing") if name in fields},
    )


def parse_input_tokens(body: Body) -> ResponseAsk:
    """Body of POST /v1/responses/input_tokens: the fields of a response; those that say nothing about input are ignored."""
    return parse_response({**body, "store": False, "background": False, "stream": False, "stream_options": None})


def parse_compaction(body: Body) -> ResponseAsk:
    """Body of POST /v1/responses/compact: what a response would read. UnsupportedError names what says more than that."""
    fields, warnings = sort_fields(body, COMPACTED, IGNORED, NOT_COMPACTED)
    given = fields.get("input", [{"role": "user", "content": ""}])
    ask = parse_response({**fields, "input": given, "store": False})
    items = ask.items if "input" in fields else ()
    return dataclasses.replace(ask, items=items, warnings=(*warnings, *ask.warnings))


def _unread(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the choice among tools and of items says nothing here."""
    return (*unread_choice(fields.get("tool_choice")), *unread(fields.get("input")))


def _check_together(fields: Mapping[str, Any]) -> None:
    """Fields that only make sense with others."""
    if fields.get("background") and not fields.get("store", True):
        raise ClientError("background needs store to be true: the answer is fetched later", param="background")
    if "conversation" in fields and "previous_response_id" in fields:
        raise ClientError("conversation and previous_response_id exclude each other", param="conversation")
    if fields.get("top_logprobs") and LOGPROBS not in fields.get("include", ()):
        raise ClientError(f'top_logprobs needs include to hold "{LOGPROBS}"', param="top_logprobs")


def _effort(reasoning: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """(how much the model is to think, what is ignored)."""
    neutral = {"context": (None, "auto"), "mode": (None, "standard")}
    known = ("effort", "summary", "generate_summary")
    if other := [
        name for name, value in reasoning.items() if name not in known and value not in neutral.get(name, (None,))
    ]:
        raise UnsupportedError(f"reasoning.{other[0]:.60} isn't supported", param="reasoning")
    effort = reasoning.get("effort")
    if effort is not None:
        CHAT_HONOURED["reasoning_effort"]("reasoning.effort", effort)
    ignored = [f"reasoning.effort {EFFORT_IGNORED}"] if effort else []
    return effort, (*ignored, *(["reasoning.summary (thoughts are shown whole)"] if _summary(reasoning) else []))


def _summary(reasoning: Mapping[str, Any]) -> str | None:
    found: str | None = None
    for name in ("generate_summary", "summary"):
        if (given := reasoning.get(name)) is not None:
            one_of("auto", "concise", "detailed")(f"reasoning.{name}", given)
            found = given
    return found


def _format(fields: Mapping[str, Any]) -> Json:
    """text.format; its other field, verbosity, says nothing to the models here."""
    text = fields.get("text", {})
    if other := [name for name, value in text.items() if name not in ("format", "verbosity") and value is not None]:
        raise UnsupportedError(f"text.{other[0]} isn't supported", param="text")
    if text.get("verbosity") not in (None, "medium"):
        raise UnsupportedError(f"text.verbosity must be medium, got {text['verbosity']!r:.60}", param="text")
    form = text.get("format")
    if form is None:
        return {"type": "text"}
    if not isinstance(form, dict) or form.get("type") not in ("text", "json_object", "json_schema"):
        known = "text, json_object or json_schema"
        raise ClientError(f"text.format must be an object whose type is {known}; got {form!r:.60}", param="text")
    if form["type"] == "json_schema" and "schema" not in form:
        raise ClientError("text.format: json_schema has no schema", param="text")
    return form


def _chat_format(form: Json) -> Json:
    """The same as response_format of chats, where the schema lies deeper."""
    if form["type"] != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _logprobs(fields: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """(most likely tokens that are shown, what of `include` there is nothing of)."""
    include = fields.get("include", ())
    wanted = fields.get("top_logprobs", 0) if LOGPROBS in include else None
    return wanted, tuple(f"include: {name}" for name in include if name not in (LOGPROBS, THOUGHTS))


def _stream_options(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What of it is ignored."""
    options = fields.get("stream_options")
    if options is None:
        return ()
    if not fields.get("stream"):
        raise ClientError("stream_options needs stream to be true", param="stream_options")
    return tuple(f"stream_options.{name}" for name, value in options.items() if value not in (None, False))


def _conversation_id(given: Any) -> str | None:
    """Of an id, or an object with one."""
    found = given.get("id") if isinstance(given, dict) else given
    if given is not None and not isinstance(found, str):
        raise ClientError(f"conversation must be an id, or an object with one; got {given!r:.60}", param="conversation")
    return found


def _echo(fields: Mapping[str, Any], form: Json) -> Json:
    """What the answer repeats, with OpenAI's defaults."""
    conversation = _conversation_id(fields.get("conversation"))
    return {
        **{name: fields.get(name) for name in _ECHOED},
        **{name: fields[name] for name in ("user",) if name in fields},  # null isn't among its values
        "background": fields.get("background", False),
        "conversation": None if conversation is None else {"id": conversation},
        "metadata": fields.get("metadata", {}),
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "reasoning": {"effort": None, "summary": None, **fields.get("reasoning", {})},
        "store": fields.get("store", True),
        "text": {"format": _shown(form), "verbosity": "medium"},
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.get("tools", []),
        "top_logprobs": fields.get("top_logprobs", 0),
        "truncation": fields.get("truncation", "disabled"),
    }


def _shown(form: Json) -> Json:
    """text.format with what OpenAI's clients read of it."""
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    shown = {"name": "response", "description": None, "strict": True, **form}
    return {name: shown[name] for name in ("type", "name", "description", "schema", "strict")}
