"""Qwen 1.5, 2, 2.5 and QwQ: Llama with biased q, k, v, and windows on upper layers (arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import layer_kinds, rope
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification", "Qwen2ForRewardModel")


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's facts; only the projections into attention have a bias."""
    return llama.spec(c, qkv_bias=True, o_bias=False, layers=layers(c))


def layers(c: Mapping[str, Any]) -> tuple[Layer, ...]:
    """`layer_types` says which layers slide; files without it mean those from max_window_layers on."""
    depth = c["num_hidden_layers"]
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", depth)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    kinds = {"full_attention": Layer(rope(c)), "sliding_attention": Layer(rope(c), window)}
    return layer_kinds(c, kinds, default)
