"""Qwen 1.5, 2 and 2.5: Llama with biased q, k, v, and windows on upper layers (Qwen Team 2024, arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Layer, Spec


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's facts; only the projections into attention have a bias."""
    return llama.spec(c, qkv_bias=True, o_bias=False, layers=layers(c))


def layers(c: Mapping[str, Any]) -> tuple[Layer, ...]:
    """`layer_types` says which layers slide; files without it mean those from max_window_layers on."""
    depth = c["num_hidden_layers"]
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", depth)
    kinds = c.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ConfigError(f"config.json: layer_types {unknown} are not supported")
    if len(kinds) != depth:
        raise ConfigError(f"config.json: layer_types has {len(kinds)} entries for {depth} layers")
    rope = llama.rope(c)
    return tuple(Layer(rope, window if kind == "sliding_attention" else None) for kind in kinds)
