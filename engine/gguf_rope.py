"""How a GGUF file says that its rope is scaled -> config.json's `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import GGUF

LLAMA3_TURNS = ((1.0, 4.0), (1.0, 1.0))
"""low_freq_factor and high_freq_factor of Llama 3 and of Llama 4 Scout."""
LLAMA3_LENGTH = 8192
YARN_KEYS = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
LOG_FACTOR = 0.1
"""deepseek2 files hold YaRN's mscale_all_dim times this."""


def rope_scaling(file: GGUF, arch: str, head_dim: int) -> dict[str, Any] | None:
    """The fields of config.json, None for a plain rope. Some scalings stand in tensors: a divisor for each frequency."""

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch}.rope.scaling.{key}", default)

    if "rope_freqs.weight" in file.tensors:
        theta = float(file.metadata.get(f"{arch}.rope.freq_base", 10000.0))
        return _divided(_numbers(file, "rope_freqs.weight"), theta, head_dim)
    original = get("original_context_length")
    if "rope_factors_long.weight" in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _numbers(file, "rope_factors_long.weight").tolist(),
            "short_factor": _numbers(file, "rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original or file.metadata.get(f"{arch}.context_length"),
        } | ({} if get("attn_factor") is None else {"attention_factor": get("attn_factor")})
    factor = get("factor") or file.metadata.get(f"{arch}.rope.scale_linear")
    match get("type", "linear" if factor else "none"):
        case "none" | "longrope":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": factor} if factor and factor != 1 else None
        case "yarn" if factor:
            return _yarn(get("yarn_log_multiplier"), factor, original, arch) | {
                theirs: get(ours) for ours, theirs in YARN_KEYS.items() if get(ours) is not None
            }
    raise ConfigError(f"{file.path}: {arch}.rope.scaling.type {get('type')!r} is not supported, or lacks its factor")


def _numbers(file: GGUF, name: str) -> npt.NDArray[np.float32]:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type.name != "F32":
        raise ConfigError(f"{file.path}: tensor {name} of type F32 is missing")
    return tensor.rows.reshape(-1).view(np.float32)


def _yarn(multiplier: float | None, factor: float, original: int | None, arch: str) -> dict[str, Any]:
    """DeepSeek's two mscales are equal in every published model; the file has one. gpt-oss rounds no border."""
    made = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if multiplier and arch == "deepseek2":
        scale = round(multiplier / LOG_FACTOR, 6)
        made |= {"mscale": scale, "mscale_all_dim": scale}
    return made | ({"truncate": False} if arch == "gpt-oss" else {})


def _divided(divisors: npt.NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling by its parameters where they give these divisors, otherwise a longrope that never changes."""
    factor = float(divisors.max())
    if (divisors == 1).all():
        return None
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3_LENGTH * plain / (2 * math.pi)
    for low, high in LLAMA3_TURNS:
        kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns > low).astype(float)
        if divisors.shape == plain.shape and np.allclose(1 / ((1 - kept) / factor + kept), divisors, rtol=1e-4):
            named = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **named, "original_max_position_embeddings": LLAMA3_LENGTH}
    both = divisors.tolist()
    return {"rope_type": "longrope", "short_factor": both, "long_factor": both, "factor": 1.0, "attention_factor": 1.0}
