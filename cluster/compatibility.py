"""Spellings that users know from vLLM, old and new: mapped with a warning, true already, or refused by name.

Nothing is accepted and ignored: a value that asks for what isn't there yet is an error that says so.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvasir.engine.errors import ConfigError


class CompatibilityWarning(UserWarning):
    """A spelling was understood, but has a better one."""


@dataclass(frozen=True)
class Renamed:
    """The same under another name."""

    to: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class PerRank(Renamed):
    """The same under another name, but said of one rank: ours is for all ranks of a copy."""


@dataclass(frozen=True)
class Always:
    """These values ask for what is the case anyway; any other is refused."""

    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Refused:
    """Not supported yet."""

    why: str


def _gib(value: Any) -> int:
    return int(float(value) * 2**30)


TRUE = (True, "true", "True")
FALSE = (False, "false", "False")
_LORA = "adapters are not supported yet"
_DRAFT = "speculative decoding is not supported yet"
_TASKS = "a model does all it can: generate, embed, classify or score, as its files say"

SPELLINGS: dict[str, Renamed | Always | Refused] = {
    "uvicorn_log_level": Renamed("log_level"),
    "middleware": Refused("middleware is not supported"),
    "max_log_len": Refused("prompts are never logged"),
    "disable_log_requests": Always(TRUE, "requests are logged only with --enable-log-requests"),
    "disable_fastapi_docs": Renamed("enable_docs", lambda value: value not in TRUE),
    "expert_parallel": Renamed("enable_expert_parallel"),
    "ray_workers_use_nsight": Always(FALSE, "profiling under Nsight is not supported"),
    "device_memory_utilization": Renamed("gpu_memory_utilization"),
    "swap_space": PerRank("kv_offloading_size"),
    "kv_offloading_backend": Always(("native",), "there is one way to offload blocks, our own"),
    "kv_transfer_config": Refused(
        "groups fetch blocks from each other without a connector; --kv-transfer auto|shm|tcp|gloo|nccl|nixl|off says how"
    ),
    "enable_chunked_prefill": Always(TRUE, "long prompts are always cut into chunks"),
    "num_scheduler_steps": Always((1, "1"), "every step is scheduled by itself"),
    "calculate_kv_scales": Always(TRUE, "scales are always computed, for each token and head"),
    "logits_processor_pattern": Refused("name those that requests may use: --logits-processors NAME,..."),
    "quantization": Refused("quantised weights are not supported yet"),
    "enable_auto_tool_choice": Always(TRUE, "a model may always call the tools that a request offers"),
    "enable_reasoning": Always(TRUE, "thoughts are told from the answer; --reasoning-parser none leaves them in it"),
    "enable_lora": Always(FALSE, _LORA),
    "max_loras": Refused(_LORA),
    "max_lora_rank": Refused(_LORA),
    "lora_extra_vocab_size": Refused(_LORA),
    "lora_modules": Refused(_LORA),
    "long_lora_scaling_factors": Refused(_LORA),
    "speculative_config": Refused(_DRAFT),
    "speculative_model": Refused(_DRAFT),
    "num_speculative_tokens": Refused(_DRAFT),
    "speculative_draft_tensor_parallel_size": Refused(_DRAFT),
    "speculative_disable_by_batch_size": Refused(_DRAFT),
    "ngram_prompt_lookup_max": Refused(_DRAFT),
    "ngram_prompt_lookup_min": Refused(_DRAFT),
    "task": Always(("auto", "generate", "embed", "embedding", "classify", "score"), _TASKS),
    "runner": Always(("auto", "generate", "pooling"), _TASKS),
    "convert": Always(("auto", "none", "embed"), _TASKS),
    "pooler_config": Refused("pooling is what the model's files say (1_Pooling/config.json)"),
    "override_pooler_config": Refused("pooling is what the model's files say (1_Pooling/config.json)"),
}
"""vLLM's flags that are no option of ours -> what becomes of them."""

KV_CACHE_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "q8_0": "int8",
    "half": "float16",
    "float": "float32",
    "int8_per_token_head": "int8",
    "fp8_per_token_head": "fp8",
}
"""Other spellings of KV cache types: llama.cpp's and Ollama's, vLLM's."""

SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size"}
SHORT |= {"-q": "--quantization"}

ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "VLLM_LOGGING_LEVEL": ("log_level", str.lower),
    "VLLM_CPU_KVCACHE_SPACE": ("kv_cache_memory_bytes", _gib),
    "VLLM_TARGET_DEVICE": ("device", str.lower),
    "VLLM_PP_LAYER_PARTITION": ("pipeline_layer_partition", str),
    "OLLAMA_KV_CACHE_TYPE": ("kv_cache_dtype", str),
}
"""vLLM's variables -> (option, how its value reads). VLLM_API_KEY is read with KVASIR_API_KEY, never shown."""

QUIET = {"VLLM_API_KEY", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_USE_V1"}
"""Variables of vLLM that need no word: read elsewhere, or true already (nothing is ever reported to anybody)."""
OURS = {"KVASIR_API_KEY", "KVASIR_CHECK_GRAPHS", "KVASIR_KERNELS", "KVASIR_NOHISTORY", "KVASIR_DATA"}
"""Variables of ours that are no option: read where they are needed."""
KUBERNETES = re.compile(r"KVASIR_(PORT|SERVICE)(_|$)")
"""What Kubernetes sets for a Service named kvasir."""


def warn_of_variables(environ: Mapping[str, str], known: Iterable[str]) -> None:
    """Name the variables of vLLM's and ours that do nothing, so that nobody relies on one."""
    read = {*known, *QUIET, *OURS}
    names = [name for name in environ if name.startswith(("VLLM_", "KVASIR_")) and name not in read]
    idle = sorted(name for name in names if not KUBERNETES.match(name))
    if idle:
        _say(f"{', '.join(idle)}: no meaning in Kvasir")


def translate(spec: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """`spec` with known spellings made ours. ConfigError for what is refused, a warning for what was mapped."""
    found: dict[str, Any] = {}
    for name, value in spec.items():
        meaning = SPELLINGS.get(name)
        if meaning is None:
            found[name] = _value(name, value)
        elif isinstance(meaning, Renamed):
            if meaning.to in spec:
                raise ConfigError(
                    f"{_flag(name)} and {_flag(meaning.to)} are both given; they mean the same", param=name
                )
            found[meaning.to] = meaning.convert(value)
            if isinstance(meaning, PerRank):
                found[meaning.to] = _of_all_ranks(name, value, spec)
            if warn:
                _say(f"{_flag(name)} is spelled {_flag(meaning.to)}")
        elif isinstance(meaning, Refused):
            raise ConfigError(f"{_flag(name)}: {meaning.why}", param=name)
        elif value in meaning.values:
            if warn:
                _say(f"{_flag(name)} is not needed: {meaning.why}")
        else:
            raise ConfigError(f"{_flag(name)} {value}: not supported yet; {meaning.why}", param=name)
    if warn and found.get("enable_expert_parallel") in TRUE and str(found.get("data_parallel_size", 1)) != "1":
        _say(
            "--enable-expert-parallel deals out experts over the --tensor-parallel-size ranks of each copy: not over copies, each"
            " of which (--data-parallel-size) has them all"
        )
    return found


def _of_all_ranks(name: str, value: Any, spec: Mapping[str, Any]) -> float:
    """A size for each rank, for all of them."""
    sizes = [spec.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    try:
        return float(value) * math.prod(map(int, sizes))
    except (TypeError, ValueError):
        raise ConfigError(f"{_flag(name)} must be a number, got {value!r:.60}", param=name) from None


def _value(name: str, value: Any) -> Any:
    """Values that have another spelling."""
    if name == "dtype" and value in ("half", "float"):
        return {"half": "float16", "float": "float32"}[value]
    if name == "kv_cache_dtype":
        return KV_CACHE_DTYPES.get(value, value) if isinstance(value, str) else value
    if name == "max_model_len" and value == "auto":
        return None
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _say(text: str) -> None:
    warnings.warn(text, CompatibilityWarning, stacklevel=3)
