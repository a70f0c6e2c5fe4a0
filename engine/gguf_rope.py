"""How a GGUF file says that its rope is scaled -> config.json's `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvasir.engine.gguf_facts import Facts

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


def rope_scaling(f: Facts) -> dict[str, Any] | None:
    """The fields of config.json, None for a plain rope. Some scalings stand in tensors: a divisor for each frequency."""
    if f.has("rope_freqs.weight"):
        return _divided(_numbers(f, "rope_freqs.weight"), f.get("rope.freq_base", 10000.0), f.head_dim)
    original = f.get("rope.scaling.original_context_length")
    if f.has("rope_factors_long.weight"):
        magnitude = f.get("rope.scaling.attn_factor")
        return {
            "rope_type": "longrope",
            "long_factor": _numbers(f, "rope_factors_long.weight").tolist(),
            "short_factor": _numbers(f, "rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original or f.count("context_length"),
        } | ({} if magnitude is None else {"attention_factor": magnitude})
    factor = f.get("rope.scaling.factor") or f.get("rope.scale_linear")
    kind = f.text("rope.scaling.type", "linear" if factor else "none")
    match kind:
        case "none" | "longrope":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": factor} if factor and factor != 1 else None
        case "yarn" if factor and original:
            return _yarn(f, factor, original)
    return f.fail(f"{f.arch}.rope.scaling.type {kind!r:.40} is not supported, or lacks its factor or original length")


def _numbers(f: Facts, name: str) -> npt.NDArray[np.float32]:
    tensor = f.tensor(name)
    if tensor.type.name != "F32":
        f.fail(f"tensor {name} has type {tensor.type.name}, F32 is needed")
    return tensor.rows.reshape(-1).view(np.float32)


def _yarn(f: Facts, factor: float, original: int) -> dict[str, Any]:
    """DeepSeek's two mscales are equal in every published model; the file has one. Mistral's has mscale_all_dim itself, and
    mscale is 1. gpt-oss rounds no border."""
    made = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    multiplier = f.get("rope.scaling.yarn_log_multiplier")
    if multiplier and f.arch == "deepseek2":
        scale = round(multiplier / LOG_FACTOR, 6)
        made |= {"mscale": scale, "mscale_all_dim": scale}
    if multiplier and f.arch == "mistral3":
        made |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    if f.arch == "gpt-oss":
        made["truncate"] = False
    given = ((theirs, f.get(f"rope.scaling.{ours}")) for ours, theirs in YARN_KEYS.items())
    return made | {key: value for key, value in given if value is not None}


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
