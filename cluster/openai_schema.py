"""OpenAI's request bodies, and vLLM's additions to them, as a `Call`. Nothing that is asked for is ignored silently.

Every field is in one of three tables: HONOURED; IGNORED, which can't change the answer and is named in a warning;
REFUSED, which would change it and isn't supported: 400 with its name. Neutral values (null, the default) are always
fine. A field in no table is unknown, and named in a warning too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvasir.cluster.call import (
    EFFORT_IGNORED,
    Call,
    Conversation,
    Prompt,
    Text,
    check_variables,
    thinking_budget,
    thinking_variables,
)
from kvasir.cluster.custom_tools import custom_grammars, shown_tools
from kvasir.cluster.openai_fields import (
    CHAT_HONOURED,
    CHAT_IGNORED,
    CHAT_REFUSED,
    COMPLETION_HONOURED,
    COMPLETION_IGNORED,
    COMPLETION_REFUSED,
    DETOKENIZE_HONOURED,
    INSTEAD,
    INSTEAD_OF_CHATS,
    SAMPLING,
    STREAM_OPTIONS,
    TOKENIZE_HONOURED,
    TOKENIZE_IGNORED,
    Check,
    integer_from,
    unused,
)
from kvasir.cluster.openai_messages import template_messages, unread
from kvasir.cluster.service_fields import check_nesting, priority
from kvasir.cluster.structured_fields import known_as, structured_output
from kvasir.cluster.tool_use import tool_use, unread_choice
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import MAX_LOGPROBS

MAX_PROMPTS = 1024
"""Prompts in one /v1/completions request."""
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A body understood: the call, and how its answer is to be written."""

    call: Call
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """Show log probabilities, with that many most likely tokens."""
    prompt_logprobs: bool = False
    echo: bool = False
    """The answer begins with the prompt (in a chat: with the last message, when the model continues it)."""
    no_output: bool = False
    """max_tokens 0 with echo: the prompt alone was wanted, scored. One token is made and dropped."""
    return_token_ids: bool = False
    return_timing: bool = False
    """Say where the time went."""
    request_id: str | None = None
    warnings: tuple[str, ...] = ()
    """Fields that were ignored."""
    include_reasoning: bool = True
    """Show the model's thoughts."""
    service_tier: str | None = None
    session: str = ""
    """Requests of one session go to one group, where their prefixes are cached."""
    store: bool = False
    """The answer can be fetched again."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Labels of what is stored."""
    messages: Sequence[Mapping[str, Any]] = ()
    """Of a chat, as they were sent."""


def parse_chat(body: Mapping[str, Any]) -> Ask:
    """Body of POST /v1/chat/completions. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, CHAT_HONOURED, CHAT_IGNORED, CHAT_REFUSED, INSTEAD)
    if fields.get("store"):
        check_nesting(fields)
    conversation = _conversation(fields)
    parallel, custom = fields.get("parallel_tool_calls", True), custom_grammars(fields.get("tools", ()))
    use = tool_use(conversation.tools, fields.get("tool_choice"), parallel, custom)
    sampling = _sampling(fields)
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if limit is not None:
        sampling["max_tokens"] = limit
    logprobs = _chat_logprobs(fields)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    names = known_as(fields)
    if "max_completion_tokens" in fields:
        names["max_tokens"] = "max_completion_tokens"
    call = Call(
        prompts=(conversation,),
        sampling=sampling,
        known_as=names,
        tools=use,
        thinking_budget=thinking_budget(fields.get("thinking_token_budget")),
        **_common(fields),
    )
    warnings += (*unread_choice(fields.get("tool_choice")), *unread(fields["messages"]))
    if "reasoning_effort" in fields:
        warnings += (f"reasoning_effort {EFFORT_IGNORED}",)
    return Ask(
        call=call,
        logprobs=logprobs,
        echo=fields.get("echo", False),
        include_reasoning=fields.get("include_reasoning", True),
        messages=fields["messages"],
        **_shape(fields, warnings),
    )


def parse_completion(body: Mapping[str, Any]) -> Ask:
    """Body of POST /v1/completions. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, COMPLETION_HONOURED, COMPLETION_IGNORED, COMPLETION_REFUSED, INSTEAD_OF_CHATS)
    sampling = _sampling(fields)
    logprobs, echo = fields.get("logprobs"), fields.get("echo", False)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
        if echo:
            sampling.setdefault("prompt_logprobs", logprobs)
    no_output = echo and fields.get("max_tokens") == 0
    if "max_tokens" in fields:
        sampling["max_tokens"] = 1 if no_output else fields["max_tokens"]
    suffix = fields.get("suffix", "")
    if suffix and echo:
        raise ClientError("echo can't be combined with suffix: the prompt isn't all that is read", param="echo")
    prompts = _prompts(fields.get("prompt"), fields.get("add_special_tokens", not suffix), suffix)
    names = known_as(fields)
    reads, most = "echo" if echo else "", COMPLETION_MAX_TOKENS
    call = Call(prompts=prompts, sampling=sampling, max_tokens=most, known_as=names, reads=reads, **_common(fields))
    return Ask(call=call, logprobs=logprobs, echo=echo, no_output=no_output, **_shape(fields, warnings))


def parse_tokenize(body: Mapping[str, Any]) -> tuple[str, Text | Conversation, bool, tuple[str, ...]]:
    """Body of POST /tokenize: (model, what to tokenise, whether texts of tokens are wanted, ignored fields)."""
    fields, warnings = sort_fields(body, TOKENIZE_HONOURED, TOKENIZE_IGNORED, {"chat_template": ()})
    if "messages" not in fields and "prompt" not in fields:
        raise ClientError("send prompt (a text) or messages", param="prompt")
    prompt = (
        _conversation(fields)
        if "messages" in fields
        else Text(text=fields["prompt"], add_special_tokens=fields.get("add_special_tokens", True))
    )
    return fields.get("model", ""), prompt, fields.get("return_token_strs", False), warnings


def parse_detokenize(body: Mapping[str, Any]) -> tuple[str, list[int], bool, tuple[str, ...]]:
    """Body of POST /detokenize: (model, token ids, whether special tokens are left out, ignored fields)."""
    fields, warnings = sort_fields(body, DETOKENIZE_HONOURED, {}, {})
    if "tokens" not in fields:
        raise ClientError("tokens must be a list of token ids", param="tokens")
    return fields.get("model", ""), fields["tokens"], fields.get("skip_special_tokens", False), warnings


_MEANT = re.compile(
    r"images|guided_|structur|json_|stop_|banned_|response_(?:format|mime|model)|.*(?:grammar|regex|constrain)"
    r"|(?:.*_)?(?:json)?schema$|(?:min|max)_(?:\w+_)?(?:tokens|length)$",
    re.IGNORECASE,
)
"""Names that speak of what the output must be, or are input: refused even if nobody here knows them."""
_EMPTY: tuple[Any, ...] = ("", [], {})
_SILENT: tuple[Any, ...] = (*_EMPTY, False)


def sort_fields(
    body: Mapping[str, Any],
    honoured: Mapping[str, Check],
    ignored: Mapping[str, Sequence[Any]],
    refused: Mapping[str, Sequence[Any]],
    instead: Mapping[str, str] = {},
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(honoured fields that are set, checked; names of what was ignored). A literal extra_body is unwrapped: OpenAI's
    client merges it into the body, and so do we for those who send it as it is written in examples. instead: what to use
    in place of what is refused."""
    if isinstance(body.get("extra_body"), dict):
        body = {**body, **body["extra_body"]}
        del body["extra_body"]
    fields: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in body.items():
        if value is None:
            continue
        if check := honoured.get(name):
            check(name, value)
            fields[name] = value
        elif name in refused:
            if value not in refused[name]:
                advice = f"; use {instead[name]}" if name in instead else ""
                raise UnsupportedError(_refusal(name, value, refused[name]) + advice, param=name)
        elif name not in ignored and _MEANT.match(name) and value not in _SILENT:
            cut = f"{name:.60}"  # the client made it up
            raise UnsupportedError(_refusal(cut, value, _EMPTY), param=cut)
        elif value not in ignored.get(name, ()):
            warnings.append(name)
    return fields, tuple(warnings)


def _refusal(name: str, value: object, neutral: Sequence[Any]) -> str:
    empty = " or empty" if any(one in _EMPTY for one in neutral) else ""
    said = " or ".join(json.dumps(one) for one in neutral if one not in _EMPTY)
    advice = f"leave it out{empty}" + (f", or send {said}" if said else "")
    return f"{name} isn't supported: it would change the answer, so it isn't ignored; got {value!r:.60}; {advice}"


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into SamplingParams by the same name; ranges are checked there."""
    sampling = {name: fields[name] for name in SAMPLING if name in fields}
    if bias := fields.get("logit_bias"):
        sampling["logit_bias"] = token_bias(bias)
    if "logits_processors" in fields:
        sampling["logits_processors"] = processors(fields["logits_processors"])
    if (wanted := structured_output(fields)) is not None:
        sampling["structured_outputs"] = wanted
    return sampling


def processors(given: Any) -> Any:
    """Name -> arguments, from that itself, or from vLLM's list of names and {"qualname": ..., "kwargs": {...}}."""
    if not isinstance(given, list):
        return given
    found: dict[str, Any] = {}
    for one in given:
        said = {"qualname": one} if isinstance(one, str) else one
        if not isinstance(said, dict) or not isinstance(said.get("qualname"), str) or said.get("args"):
            text = 'logits_processors must be names or {"qualname": NAME, "kwargs": {...}}'
            raise ClientError(f"{text}, got {one!r:.60}", param="logits_processors")
        found[said["qualname"]] = said.get("kwargs") or {}
    return found


def token_bias(given: Mapping[str, Any]) -> dict[int, Any]:
    """JSON's keys are texts."""
    return {_token_id(key): value for key, value in given.items()}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 11):
        raise ClientError(f"logit_bias keys must be token ids, got {key!r:.60}", param="logit_bias")
    return int(key)


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    wanted, top = fields.get("logprobs", False), fields.get("top_logprobs")
    if top is not None and not wanted:
        raise ClientError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if top is not None:
        integer_from(0, MAX_LOGPROBS)("top_logprobs", top)
    return (top or 0) if wanted else None


def _conversation(fields: Mapping[str, Any]) -> Conversation:
    messages = fields.get("messages")
    if not messages:
        raise ClientError("messages must be a list of at least one message", param="messages")
    variables = fields.get("chat_template_kwargs", {})
    check_variables(variables, "chat_template_kwargs")
    variables = {**thinking_variables(fields.get("reasoning_effort"), _enabled(fields)), **variables}
    continued = fields.get("continue_final_message", False)
    return Conversation(
        messages=template_messages(messages),
        tools=shown_tools(fields.get("tools", ())) or None,
        add_generation_prompt=fields.get("add_generation_prompt", not continued),
        continue_final_message=continued,
        variables=variables,
        add_special_tokens=fields.get("add_special_tokens", False),
    )


def _enabled(fields: Mapping[str, Any]) -> bool | None:
    """Whether thoughts are switched on or off, by either of its names."""
    enabled, switch = fields.get("enable_thinking"), fields.get("thinking")
    if switch is None:
        return enabled
    wanted: bool = switch["type"] == "enabled"
    if enabled not in (None, wanted):
        raise ClientError("thinking and enable_thinking differ; give one", param="thinking")
    return wanted


def _prompts(prompt: Any, add_special_tokens: bool, suffix: str) -> list[Prompt]:
    """A text, a list of texts, a list of token ids or a list of lists of token ids; only texts have a suffix."""
    if isinstance(prompt, str):
        return [Text(text=prompt, add_special_tokens=add_special_tokens, suffix=suffix)]
    kinds = set(map(type, prompt)) if isinstance(prompt, list) else set()
    if suffix and kinds != {str}:
        raise ClientError("suffix needs prompt to be a text, or a list of texts", param="suffix")
    if kinds == {int}:
        return [prompt]
    if len(kinds) == 1 and len(prompt) > MAX_PROMPTS:
        text = f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} in one request, use kvasir batch for more"
        raise ClientError(text, param="prompt")
    if kinds == {str}:
        return [Text(text=text, add_special_tokens=add_special_tokens, suffix=suffix) for text in prompt]
    if kinds == {list} and all(set(map(type, ids)) == {int} for ids in prompt):
        return list(prompt)
    wanted = "a text, a list of texts, a list of token ids or a list of lists of token ids, none of them empty"
    raise ClientError(f"prompt must be {wanted}; got {prompt!r:.60}", param="prompt")


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Call` that both bodies have."""
    salt = {"cache_salt": fields["cache_salt"]} if "cache_salt" in fields else {}
    return {"model": fields.get("model", ""), "priority": priority(fields), **salt}


def _shape(fields: Mapping[str, Any], warnings: tuple[str, ...]) -> dict[str, Any]:
    """Fields of `Ask` that both bodies have."""
    options = fields.get("stream_options")
    stream = fields.get("stream", False)
    include_usage = False
    if options is not None:
        if not stream:
            raise ClientError("stream_options needs stream to be true", param="stream_options")
        include_usage, more = _stream_options(options)
        warnings += more
    unstored = ("metadata",) if fields.get("metadata") and not fields.get("store") else ()
    return {
        "stream": stream,
        "include_usage": include_usage,
        "prompt_logprobs": "prompt_logprobs" in fields,
        "return_token_ids": fields.get("return_token_ids", False),
        "return_timing": fields.get("return_timing", False),
        "request_id": fields.get("request_id"),
        "warnings": (*warnings, *unused(fields), *unstored),
        "session": fields.get("session_id", fields.get("prompt_cache_key", "")),
        **{name: fields[name] for name in ("service_tier", "store", "metadata") if name in fields},
    }


def _stream_options(options: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """(include_usage, ignored fields)."""
    ignored, refused = {"include_obfuscation": (False,)}, {"continuous_usage_stats": (False,)}
    fields, unknown = sort_fields(options, STREAM_OPTIONS, ignored, refused)
    return fields.get("include_usage", False), tuple(f"stream_options.{name}" for name in unknown)
