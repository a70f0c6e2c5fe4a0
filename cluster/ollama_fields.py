"""Every field and option of Ollama's API by what becomes of it; tables as in `openai_fields`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from kvasir.cluster.described import described
from kvasir.cluster.foreign_fields import foreign_constraints
from kvasir.cluster.openai_fields import SAMPLING, Check, Neutral, boolean, integer_from, later, string
from kvasir.engine.errors import ClientError

_DURATION = re.compile(r"-?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*|[+-]?0")
"""Go's spelling: 5m, 1h30m, -1s, 0."""
THINK_LEVELS = ("low", "medium", "high", "max")


@described(type="object")
def object_(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ClientError(f"{name} must be an object, got {value!r:.60}", param=name)


OPTIONS: dict[str, Check] = {
    **{name: check for name, check in SAMPLING.items() if name not in ("n", "prompt_logprobs", "repetition_penalty")},
    "repeat_penalty": SAMPLING["repetition_penalty"],
    "logit_bias": object_,
    "num_predict": integer_from(-2, 2**31 - 1),
    "num_ctx": integer_from(1, 2**31 - 1),
    "cache_salt": string,
}
OPTIONS_IGNORED: Neutral = {
    **dict.fromkeys(("num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "numa"), ()),
    **dict.fromkeys(("use_mmap", "use_mlock", "low_vram", "f16_kv"), ()),
}
"""Where and how the model runs: the same tokens come out."""
OPTIONS_REFUSED: Neutral = {
    **foreign_constraints({**OPTIONS, **OPTIONS_IGNORED}),
    "vocab_only": (False,),
    "logits_all": (False,),
    "embedding_only": (False,),
}
SAMPLING_NAMES = {"repeat_penalty": "repetition_penalty"}
"""Option -> field of SamplingParams where it is called otherwise."""
CLIENT_NAMES = {
    "max_tokens": "num_predict",
    "structured_outputs": "format",
    **{field: name for name, field in SAMPLING_NAMES.items()},
}
"""The other way round, for errors."""
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "repeat_last_n": 64}
"""Ollama's, where neither request nor model say anything."""
MIROSTAT_LACKS = ("top_p", "top_k")
"""Those of the defaults that Mirostat stands in for."""


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that hold beside what a request says about sampling."""
    return {name: value for name, value in DEFAULTS.items() if not (given.get("mirostat") and name in MIROSTAT_LACKS)}


@described(anyOf=[{"type": "number"}, {"type": "string", "pattern": f"^({_DURATION.pattern})$"}])
def keep_alive(name: str, value: Any) -> None:
    """Seconds, or a duration in Go's spelling."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and _DURATION.fullmatch(value)):
        raise ClientError(f'{name} must be seconds or a duration such as "5m", got {value!r:.60}', param=name)


def seconds(value: Any) -> float:
    """A checked keep_alive; only its sign and whether it is zero mean anything here."""
    if not isinstance(value, str):
        return float(value)
    number = re.sub(r"[^0-9.]", "", value)
    return -1.0 if value.startswith("-") else float(any(digit in number for digit in "123456789"))


@described(type="array", maxItems=0)
def no_images(name: str, value: Any) -> None:
    """There is no vision yet."""
    if value != []:
        raise ClientError(f"{name}: this server reads no images; send text only", param=name)


@described(enum=[True, False, *THINK_LEVELS])
def _think(name: str, value: Any) -> None:
    if not isinstance(value, bool) and value not in THINK_LEVELS:
        raise ClientError(f"{name} must be true, false, {', '.join(THINK_LEVELS)}; got {value!r:.60}", param=name)


@described(anyOf=[{"type": "object"}, {"enum": ["", "json"]}])
def _format(name: str, value: Any) -> None:
    if not isinstance(value, dict) and value not in ("", "json"):
        raise ClientError(f'{name} must be "json" or a JSON schema, got {value!r:.60}', param=name)


@described(type="array", items={"type": "object"})
def objects(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ClientError(f"{name} must be a list of objects, got {value!r:.60}", param=name)


@described(type="array", items={"type": "integer"})
def _ids(name: str, value: Any) -> None:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ClientError(f"{name} must be a list of token ids, got {value!r:.60}", param=name)


_COMMON: dict[str, Check] = {"model": string, "options": object_, "keep_alive": keep_alive}
_GENERATION: dict[str, Check] = {
    **_COMMON,
    "stream": boolean,
    "truncate": boolean,
    "format": _format,
    "think": _think,
    "logprobs": boolean,
    "top_logprobs": integer_from(0, 20),
    "return_timing": boolean,
}
GENERATE: dict[str, Check] = {
    **_GENERATION,
    "prompt": string,
    "suffix": string,
    "system": string,
    "template": string,
    "context": _ids,
    "raw": boolean,
    "images": no_images,
}
CHAT: dict[str, Check] = {**_GENERATION, "messages": objects, "tools": objects, "tool_choice": later}
EMBED: dict[str, Check] = {
    **_COMMON,
    "input": later,
    "truncate": boolean,
    "return_timing": boolean,
    "dimensions": integer_from(0, 2**31 - 1),
}
EMBEDDINGS: dict[str, Check] = {**_COMMON, "prompt": string, "return_timing": boolean}
SHOW: dict[str, Check] = {"model": string, "name": string, "verbose": boolean}

IGNORED: Neutral = {
    "shift": (False,),
}
_FOREIGN: Neutral = {
    **foreign_constraints({**GENERATE, **CHAT, **EMBED}),
    "_debug_render_only": (False,),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
}
GENERATE_REFUSED: Neutral = {**_FOREIGN, "messages": ([],), "tools": ([],), "tool_choice": ("none", "auto")}
CHAT_REFUSED: Neutral = {
    **_FOREIGN, "prompt": ("",), "suffix": ("",), "system": ("",), "template": ("",), "context": ([],), "raw": (False,),
    "images": ([],),
}  # fmt: skip
EMBED_REFUSED: Neutral = {**_FOREIGN, "prompt": ("",), "images": ([],), "messages": ([],)}
EMBEDDINGS_REFUSED: Neutral = {**_FOREIGN, "input": ("", []), "images": ([],), "messages": ([],)}
INSTEAD = {
    **{name: f"options.{name}" for name in OPTIONS},
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "options.num_predict"),
    **dict.fromkeys(("response_format", "guided_json", "structured_outputs"), "format"),
    "repetition_penalty": "options.repeat_penalty",
    "reasoning_effort": "think",
}
GENERATE_INSTEAD = {**INSTEAD, **dict.fromkeys(("messages", "tools", "tool_choice"), "/api/chat")}
CHAT_INSTEAD = {
    **INSTEAD, "prompt": "messages", "system": "a message of the role system", "template": "--chat-template",
    **dict.fromkeys(("suffix", "context", "raw"), "/api/generate"),
}  # fmt: skip
EMBED_INSTEAD = {**INSTEAD, **dict.fromkeys(("prompt", "images", "messages"), "input, which takes texts")}
EMBEDDINGS_INSTEAD = {**INSTEAD, **dict.fromkeys(("input", "images", "messages"), "prompt, which takes a text")}
"""Refused field -> what to use."""
