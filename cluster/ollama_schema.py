"""Ollama's request bodies as calls. As in `openai_schema`, each field is honoured, ignored with a warning, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvasir.cluster.call import Conversation, Text, thinking_variables
from kvasir.cluster.ollama_fields import (
    CHAT,
    CHAT_INSTEAD,
    CHAT_REFUSED,
    EMBED,
    EMBED_INSTEAD,
    EMBED_REFUSED,
    EMBEDDINGS,
    EMBEDDINGS_INSTEAD,
    EMBEDDINGS_REFUSED,
    GENERATE,
    GENERATE_INSTEAD,
    GENERATE_REFUSED,
    IGNORED,
    OPTIONS,
    OPTIONS_IGNORED,
    OPTIONS_REFUSED,
    SAMPLING_NAMES,
    no_images,
    objects,
    seconds,
)
from kvasir.cluster.openai_fields import string, unused
from kvasir.cluster.openai_schema import processors, sort_fields, token_bias
from kvasir.cluster.overlooked import overlooked
from kvasir.cluster.tool_use import ToolUse, tool_use, unread_choice
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.prompt_cut import WHAT_FITS
from kvasir.engine.request import StructuredOutput

Body = Mapping[str, Any]
_MESSAGE = ("role", "content", "images", "thinking", "tool_calls", "tool_name", "name", "tool_call_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class OllamaAsk:
    """A body of /api/generate or /api/chat understood."""

    model: str
    prompt: Text | Conversation | None
    """None: nothing to answer, the model is to be loaded or unloaded."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    logprobs: int | None = None
    """Show log probabilities, with that many most likely tokens."""
    context: Sequence[int] = ()
    """Token ids before the prompt, from an earlier answer."""
    num_ctx: int | None = None
    """Tokens that prompt and output may have together."""
    cache_salt: str = ""
    gives_context: bool = False
    unload: bool = False
    tools: ToolUse | None = None
    thinks: bool = False
    """Thoughts are asked for."""
    return_timing: bool = False
    """Where the time went is told in the answer."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OllamaEmbedAsk:
    """A body of /api/embed or /api/embeddings understood."""

    model: str
    texts: Sequence[str]
    truncate: bool = True
    dimensions: int | None = None
    num_ctx: int | None = None
    """Tokens that are kept of each text, of those that the model would."""
    cache_salt: str = ""
    return_timing: bool = False
    """Where the time went is told in the answer."""
    warnings: tuple[str, ...] = ()


def parse_generate(body: Body) -> OllamaAsk:
    """Body of POST /api/generate."""
    fields, warnings = sort_fields(body, GENERATE, IGNORED, GENERATE_REFUSED, GENERATE_INSTEAD)
    if not fields.get("prompt") and not fields.get("suffix"):
        return _loading(fields, warnings)
    raw, suffix = fields.get("raw", False), fields.get("suffix", "")
    for name in ("system", "template", "context", "think"):
        if (raw or suffix) and fields.get(name):
            text = f"{name} can't be combined with {'raw' if raw else 'suffix'}, which uses no template"
            raise ClientError(text, param=name)
    if raw or suffix:
        prompt: Text | Conversation = Text(text=fields.get("prompt", ""), add_special_tokens=not suffix, suffix=suffix)
    else:
        prompt = Conversation(
            messages=_turn(fields),
            variables=_variables(fields),
            chat_template=_template(fields.get("template")),
            source="system" if fields.get("system") else "prompt",
        )
    return OllamaAsk(
        prompt=prompt,
        context=fields.get("context", ()),
        gives_context=not raw,
        **_shared(fields, warnings),
    )


def parse_chat(body: Body) -> OllamaAsk:
    """Body of POST /api/chat."""
    fields, warnings = sort_fields(body, CHAT, IGNORED, CHAT_REFUSED, CHAT_INSTEAD)
    if not fields.get("messages"):
        return _loading(fields, warnings)
    use = tool_use(fields.get("tools"), fields.get("tool_choice"))
    messages = [_message(message, number) for number, message in enumerate(fields["messages"])]
    prompt = Conversation(messages=messages, tools=fields.get("tools") or None, variables=_variables(fields))
    warnings += unread_choice(fields.get("tool_choice"))
    warnings += overlooked("messages[]", fields["messages"], _MESSAGE)
    return OllamaAsk(prompt=prompt, tools=use, **_shared(fields, warnings))


def parse_embed(body: Body) -> OllamaEmbedAsk:
    """Body of POST /api/embed."""
    fields, warnings = sort_fields(body, EMBED, {}, EMBED_REFUSED, EMBED_INSTEAD)
    given = fields.get("input", [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ClientError(f"input must be a text or a list of texts, got {given!r:.60}", param="input")
    return OllamaEmbedAsk(
        model=fields.get("model", ""),
        texts=[] if texts == [""] else texts,
        truncate=fields.get("truncate", True),
        dimensions=fields.get("dimensions") or None,
        num_ctx=_num_ctx(fields),
        cache_salt=_salt(fields),
        return_timing=fields.get("return_timing", False),
        warnings=(*warnings, *_unread(fields)),
    )


def parse_embeddings(body: Body) -> OllamaEmbedAsk:
    """Body of POST /api/embeddings."""
    fields, warnings = sort_fields(body, EMBEDDINGS, {}, EMBEDDINGS_REFUSED, EMBEDDINGS_INSTEAD)
    texts = [fields["prompt"]] if fields.get("prompt") else []
    return OllamaEmbedAsk(
        model=fields.get("model", ""),
        texts=texts,
        num_ctx=_num_ctx(fields),
        cache_salt=_salt(fields),
        return_timing=fields.get("return_timing", False),
        warnings=(*warnings, *_unread(fields)),
    )


def _loading(fields: Mapping[str, Any], warnings: tuple[str, ...]) -> OllamaAsk:
    unload = "keep_alive" in fields and seconds(fields["keep_alive"]) == 0
    shared = _shared(fields, warnings)
    if unload:
        shared["warnings"] = (*warnings, "keep_alive 0 (the model stays loaded until the server stops)")
    return OllamaAsk(prompt=None, unload=unload, **shared)


def _shared(fields: Mapping[str, Any], warnings: tuple[str, ...]) -> dict[str, Any]:
    """Fields of `OllamaAsk` that both bodies have."""
    sampling, more = _options(_given(fields), beside=("truncate_prompt_tokens",) if fields.get("truncate") else ())
    if schema := fields.get("format"):
        form = {"json_object": True} if schema == "json" else {"json": json.dumps(schema)}
        sampling["structured_outputs"] = StructuredOutput(**form)
    if fields.get("truncate"):
        sampling.setdefault("truncate_prompt_tokens", WHAT_FITS)
    logprobs = _logprobs(fields)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    if "keep_alive" in fields:
        more += ("keep_alive (the model stays loaded)",)
    return {
        "model": fields.get("model", ""),
        "sampling": sampling,
        "num_ctx": _num_ctx(fields),
        "cache_salt": _salt(fields),
        "stream": fields.get("stream", True),
        "logprobs": logprobs,
        "thinks": bool(fields.get("think")),
        "return_timing": fields.get("return_timing", False),
        "warnings": (*warnings, *more),
    }


def _options(options: Body, beside: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(by the names of SamplingParams, ignored options)."""
    fields, unknown = sort_fields(options, OPTIONS, OPTIONS_IGNORED, OPTIONS_REFUSED)
    limit = fields.pop("num_predict", -1)
    for own in ("num_ctx", "cache_salt"):
        fields.pop(own, None)
    if fields.get("seed") == -1:
        del fields["seed"]
    sampling = {SAMPLING_NAMES.get(name, name): value for name, value in fields.items()}
    if "logits_processors" in sampling:
        sampling["logits_processors"] = processors(sampling["logits_processors"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = token_bias(sampling["logit_bias"])
    sampling["max_tokens"] = limit if limit > 0 else None
    return sampling, tuple(f"options.{name}" for name in (*unknown, *unused(fields, beside=beside)))


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    wanted, top = fields.get("logprobs", False), fields.get("top_logprobs", 0)
    if top and not wanted:
        raise ClientError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return top if wanted else None


def _turn(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that a prompt with a system text means."""
    system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    return [*system, {"role": "user", "content": fields["prompt"]}]


def _template(given: str | None) -> str | None:
    """A Jinja template; Go's are told apart by what they call the prompt."""
    if given and "{%" not in given and "messages" not in given:
        text = (
            "template must be a Jinja chat template over `messages`; Go templates aren't read. Use raw with the whole"
        )
        raise UnsupportedError(f"{text} text, or serve the model with --chat-template FILE", param="template")
    return given or None


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `think` tells the chat template."""
    think = fields.get("think")
    return thinking_variables(think) if isinstance(think, str) else thinking_variables(None, think)


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message as chat templates know it."""
    at = f"messages[{number}]"
    no_images(f"{at}.images", message.get("images") or [])
    content = message.get("content", "")
    if content is not None and not isinstance(content, str):
        raise ClientError(f"{at}.content must be a text, got {content!r:.60}", param="messages")
    found: dict[str, Any] = {"role": message.get("role"), "content": content or ""}
    if message.get("thinking"):
        found["reasoning_content"] = message["thinking"]
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(call, at) for call in _calls(message["tool_calls"], at)]
    if name := message.get("tool_name") or message.get("name"):
        found["name"] = name
    if message.get("tool_call_id"):
        found["tool_call_id"] = message["tool_call_id"]
    return found


def _calls(given: Any, at: str) -> list[dict[str, Any]]:
    objects(f"{at}.tool_calls", given)
    found: list[dict[str, Any]] = given
    return found


def _call(call: Mapping[str, Any], at: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ClientError(f"{at}.tool_calls must be objects with a function that has a name", param="messages")
    said = {name: value for name, value in function.items() if name != "index"}  # which templates would show the model
    return {"id": call.get("id"), "type": "function", "function": {"arguments": {}, **said}}


def _given(fields: Mapping[str, Any]) -> Body:
    """The options; clients send whole numbers as 40.0, too."""
    options: Body = fields.get("options", {})
    return {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in options.items()}


def _num_ctx(fields: Mapping[str, Any]) -> int | None:
    """None where it isn't given, or says nothing."""
    given: int | None = _given(fields).get("num_ctx")
    if given is not None:
        OPTIONS["num_ctx"]("num_ctx", given)
    return given


def _salt(fields: Mapping[str, Any]) -> str:
    salt = _given(fields).get("cache_salt")
    if salt is None:
        return ""
    string("options.cache_salt", salt)
    return str(salt)


def _unread(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What means nothing where a vector is wanted."""
    options = tuple(f"options.{name}" for name in fields.get("options", {}) if name not in ("num_ctx", "cache_salt"))
    if "num_ctx" in fields.get("options", {}) and not fields.get("truncate", True):
        options += ("options.num_ctx (needs truncate)",)
    return (*options, *(("keep_alive (the model stays loaded)",) if "keep_alive" in fields else ()))
