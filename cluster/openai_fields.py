"""Every field of OpenAI's chat and completions bodies and of vLLM's additions, by what becomes of it.

HONOURED: name -> check of its type (ranges of sampling fields are SamplingParams' own). IGNORED and REFUSED: name ->
the neutral values, which say nothing; null always is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kvasir.cluster.described import Check as Check
from kvasir.cluster.described import Described, described
from kvasir.cluster.service_fields import check_metadata, check_tier
from kvasir.cluster.structured_fields import FIELDS as STRUCTURED
from kvasir.cluster.structured_fields import check_backend
from kvasir.engine.errors import ClientError

Neutral = dict[str, tuple[Any, ...]]
_TYPES = {bool: "boolean", str: "string", dict: "object", int: "integer"}


def _of_type(kind: type, what: str) -> Check:
    """Exactly that type: a bool isn't an integer here."""

    def check(name: str, value: Any) -> None:
        if type(value) is not kind:
            raise ClientError(f"{name} must be {what}, got {value!r:.60}", param=name)

    return Described(check, {"type": _TYPES[kind]})


def _list_of(kind: type, what: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise ClientError(f"{name} must be a list of {what}, got {value!r:.60}", param=name)

    return Described(check, {"type": "array", "items": {"type": _TYPES[kind]}})


def integer_from(low: int, high: int) -> Check:
    """An integer in [low, high]."""

    def check(name: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ClientError(f"{name} must be an integer from {low} to {high}, got {value!r:.60}", param=name)

    return Described(check, {"type": "integer", "minimum": low, "maximum": high})


def _switch(name: str, value: Any) -> None:
    """DeepSeek's, GLM's and Kimi's `thinking`."""
    if not isinstance(value, dict) or [*value] != ["type"] or value["type"] not in ("enabled", "disabled"):
        text = 'must be {"type": "enabled"} or {"type": "disabled"} (thinking_token_budget limits thoughts)'
        raise ClientError(f"{name} {text}, got {value!r:.60}", param=name)


def one_of(*values: str) -> Check:
    """One of these words."""

    def check(name: str, value: Any) -> None:
        if value not in values:
            raise ClientError(f"{name} must be one of {', '.join(values)}, got {value!r:.60}", param=name)

    return Described(check, {"type": "string", "enum": [*values]})


@described(anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}])
def _strings(name: str, value: Any) -> None:
    if not isinstance(value, str):
        _list_of(str, "strings, or one string")(name, value)


@described(type="array", items={"type": "integer"}, minItems=1)
def _some_ids(name: str, value: Any) -> None:
    _list_of(int, "token ids")(name, value)
    if not value:
        raise ClientError(f"{name} must hold at least one token id: no token could be chosen", param=name)


DRAWN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "tfs_z",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "seed",
)
"""What shapes draws, of which a beam search makes none."""


_NEEDS = {
    "length_penalty": "use_beam_search",
    "early_stopping": "use_beam_search",
    "mirostat_tau": "mirostat",
    "mirostat_eta": "mirostat",
    "truncation_side": "truncate_prompt_tokens",
    "num_keep": "truncate_prompt_tokens",
    "include_stop_str_in_output": "stop",
    "tool_choice": "tools",
    "parallel_tool_calls": "tools",
}
"""Field -> the one without which it means nothing."""


def unused(fields: Mapping[str, Any], *, beside: Collection[str] = ()) -> tuple[str, ...]:
    """Those of a body's fields that mean nothing without others, or with them, and why. `beside`: others that count as set."""
    given = [name for name in _NEEDS if fields.get(name) not in (None, False, "none", "auto")]
    missing = [name for name in given if not fields.get(_NEEDS[name]) and _NEEDS[name] not in beside]
    alone = [f"{name} (needs {_NEEDS[name]})" for name in missing]
    if not fields.get("use_beam_search"):
        return tuple(alone)
    return (*alone, *(f"{name} (beams aren't drawn)" for name in DRAWN if fields.get(name) not in (None, 0)))


def later(name: str, value: Any) -> None:
    """Checked where it is used."""


list_of_texts = _list_of(str, "texts")
boolean = _of_type(bool, "true or false")
string = _of_type(str, "a string")
_OBJECT = _of_type(dict, "an object")
_OBJECTS = _list_of(dict, "objects")
_POSITIVE = integer_from(1, 2**31 - 1)
_NOT_NEGATIVE = integer_from(0, 2**31 - 1)

SAMPLING: dict[str, Check] = {
    "n": later,
    "temperature": later,
    "top_p": later,
    "top_k": later,
    "min_p": later,
    "presence_penalty": later,
    "frequency_penalty": later,
    "repetition_penalty": later,
    "seed": later,
    "stop": _strings,
    "stop_token_ids": _list_of(int, "token ids"),
    "include_stop_str_in_output": boolean,
    "min_tokens": later,
    "repeat_last_n": later,
    "penalize_newline": boolean,
    "typical_p": later,
    "tfs_z": later,
    "mirostat": later,
    "mirostat_tau": later,
    "mirostat_eta": later,
    "best_of": later,
    "use_beam_search": boolean,
    "length_penalty": later,
    "early_stopping": later,
    "truncate_prompt_tokens": later,
    "truncation_side": later,
    "num_keep": later,
    "logits_processors": later,
    "bad_words": _list_of(str, "texts"),
    "allowed_token_ids": _some_ids,
    "ignore_eos": boolean,
    "deterministic": boolean,
    "prompt_logprobs": later,
    "prompt_logprob_start": later,
    "skip_special_tokens": boolean,
    "spaces_between_special_tokens": boolean,
}
"""Same name and meaning in SamplingParams."""

_HONOURED: dict[str, Check] = {
    **SAMPLING,
    **dict.fromkeys(STRUCTURED, later),
    "guided_decoding_backend": check_backend,
    "model": string,
    "stream": boolean,
    "stream_options": _OBJECT,
    "logit_bias": _OBJECT,
    "echo": boolean,
    "add_special_tokens": boolean,
    "priority": integer_from(-(2**31), 2**31 - 1),
    "service_tier": check_tier,
    "prompt_cache_key": string,
    "session_id": string,
    "cache_salt": string,
    "request_id": string,
    "return_token_ids": boolean,
    "return_timing": boolean,
}

CHAT_HONOURED: dict[str, Check] = {
    **_HONOURED,
    "messages": _OBJECTS,
    "max_tokens": _POSITIVE,
    "max_completion_tokens": _POSITIVE,
    "logprobs": boolean,
    "top_logprobs": later,
    "tools": _OBJECTS,
    "tool_choice": later,
    "parallel_tool_calls": boolean,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "enable_thinking": boolean,
    "thinking": Described(
        _switch,
        {
            "type": "object",
            "properties": {"type": {"enum": ["enabled", "disabled"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
    ),
    "include_reasoning": boolean,
    "thinking_token_budget": integer_from(-1, 2**31 - 1),
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "chat_template_kwargs": _OBJECT,
    "store": boolean,
    "metadata": check_metadata,
}

COMPLETION_HONOURED: dict[str, Check] = {
    **_HONOURED,
    "prompt": later,
    "suffix": string,
    "max_tokens": _NOT_NEGATIVE,
    "logprobs": later,
}

TOKENIZE_HONOURED: dict[str, Check] = {
    **{name: CHAT_HONOURED[name] for name in ("model", "messages", "tools", "add_special_tokens")},
    **{name: CHAT_HONOURED[name] for name in ("add_generation_prompt", "continue_final_message")},
    "chat_template_kwargs": _OBJECT,
    "prompt": string,
    "return_token_strs": boolean,
}

TOKENIZE_IGNORED: Neutral = {
    name: () for name in CHAT_HONOURED.keys() | COMPLETION_HONOURED.keys() if name not in TOKENIZE_HONOURED
}
"""Most of it is said of the answer, and there is none."""

DETOKENIZE_HONOURED: dict[str, Check] = {
    "model": string,
    "tokens": _list_of(int, "token ids"),
    "skip_special_tokens": boolean,
}

STREAM_OPTIONS: dict[str, Check] = {"include_usage": boolean}

_IGNORED: Neutral = {
    "user": (),
    "safety_identifier": (),
    "prompt_cache_retention": (),
    "prompt_cache_options": ({},),
    "stream_interval": (1,),
    "skip_reading_prefix_cache": (False,),
}

CHAT_IGNORED: Neutral = {
    **_IGNORED,
    "prediction": (),  # speeds generation up elsewhere
}

COMPLETION_IGNORED: Neutral = {**_IGNORED, "metadata": ({},), "store": (False,)}

_REFUSED: Neutral = {
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "grammar": ("",),
    "regex": (),
    "ebnf": (),
    "format": ("",),
    "logit_processor": (),
    "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "return_offsets": (False,),
    "logprob_token_ids": ([],),
    "flat_logprobs": (False,),
    "prompt_embeds": (),
    "kv_transfer_params": (),
    "repetition_detection": (),
    "lora_path": (),
    "options": ({},),
    "num_ctx": (),
    "max_new_tokens": (),
    "n_predict": (),
    "num_predict": (),
    "repeat_penalty": (1,),
    "top_a": (0.0,),
    "dry_multiplier": (0.0,),
    "xtc_probability": (0.0,),
    "no_repeat_ngram_size": (0,),
    "return_token_offsets": (False,),
    **dict.fromkeys(("watermark", "watermarking"), (False,)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"), ()),
    **dict.fromkeys(("custom_logit_processor", "negative_prompt"), ("",)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), (1,)),
    **dict.fromkeys(("top_n_sigma", "nsigma"), (-1, 0)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "dynatemp_range", "smoothing_factor", "penalty_alpha"), (0,)),
}

CHAT_REFUSED: Neutral = {
    **_REFUSED,
    "audio": (),
    "modalities": (["text"],),
    "reasoning": ({},),
    "verbosity": ("medium",),
    "moderation": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "thinking_budget": (-1,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}

OF_CHATS: Neutral = {
    **dict.fromkeys(CHAT_HONOURED.keys() - COMPLETION_HONOURED.keys() - COMPLETION_IGNORED.keys(), ()),
    **CHAT_REFUSED,
    "messages": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "top_logprobs": (0,),
    "include_reasoning": (True, False),
    "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
"""What says nothing to a plain text."""
COMPLETION_REFUSED: Neutral = {**_REFUSED, **OF_CHATS}

INSTEAD = {
    **dict.fromkeys(("num_predict", "n_predict", "max_new_tokens"), "max_tokens"),
    "repeat_penalty": "repetition_penalty",
    "num_ctx": "--max-model-len when the server starts",
    "no_repeat_ngram_size": "repetition_penalty",
    **dict.fromkeys(("json_schema", "grammar", "regex", "ebnf"), "structured_outputs"),
    "format": "response_format",
    **dict.fromkeys(("functions", "function_call"), "tools and tool_choice"),
    "reasoning": "reasoning_effort",
    **dict.fromkeys(("logit_processor", "custom_logit_processor"), "logits_processors"),
    "bad_words_ids": "bad_words",
    "suppress_tokens": "logit_bias",
    "num_beams": "use_beam_search and best_of",
    "thinking_budget": "thinking_token_budget",
    "options": "their names at the top of the body",
}
"""Refused field -> what to use."""
INSTEAD_OF_CHATS = {
    **INSTEAD,
    **dict.fromkeys(("messages", "tools", "tool_choice", "functions", "function_call"), "/v1/chat/completions"),
    "max_completion_tokens": "max_tokens",
    "top_logprobs": "logprobs, a number",
}
