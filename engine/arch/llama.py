"""Llama 2 and 3, the base the other files start from (Touvron et al. 2023, arXiv:2307.09288; Llama 3 Herd 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Activation, Layer, Llama3Scaling, Rope, Spec

NAMES = {
    "model.embed_tokens.": "embed.",
    "model.layers.": "blocks.",
    "model.norm.weight": "norm",
    "lm_head.": "head.",
    ".self_attn.q_proj.": ".attn.q.",
    ".self_attn.k_proj.": ".attn.k.",
    ".self_attn.v_proj.": ".attn.v.",
    ".self_attn.o_proj.": ".attn.o.",
    ".self_attn.q_norm.weight": ".attn.q_norm",
    ".self_attn.k_norm.weight": ".attn.k_norm",
    ".mlp.gate_proj.": ".mlp.gate.",
    ".mlp.up_proj.": ".mlp.up.",
    ".mlp.down_proj.": ".mlp.down.",
    ".input_layernorm.weight": ".attn_norm",
    ".post_attention_layernorm.weight": ".mlp_norm",
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """The facts of a Llama, with `changes` on top: an architecture that differs in a fact is one call."""
    bias = bool(c.get("attention_bias", False))
    facts: dict[str, Any] = {
        "vocab": c["vocab_size"],
        "hidden": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "ffn": c["intermediate_size"],
        "eps": c.get("rms_norm_eps", 1e-6),
        "max_len": c["max_position_embeddings"],
        "activation": activation(c),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias", False)),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "names": NAMES,
    }
    if "layers" not in changes:
        facts["layers"] = (Layer(rope=rope(c)),) * c["num_hidden_layers"]
    return Spec(**facts | changes)


def activation(c: Mapping[str, Any]) -> Activation:
    """hidden_act in our words."""
    name = c.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope(c: Mapping[str, Any]) -> Rope:
    """Hub files say rope_theta and rope_scaling; transformers 5 writes both into rope_parameters."""
    p = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = float(p.get("rope_theta") or c.get("rope_theta") or 10000.0)
    if p.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor {p['partial_rotary_factor']} is not supported")
    kind = p.get("rope_type", p.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, factor=float(p["factor"]))
    if kind == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        return Rope(theta, llama3=Llama3Scaling(float(p["factor"]), low, high, p["original_max_position_embeddings"]))
    raise ConfigError(f"config.json: rope_type {kind!r} is not supported; supported are default, linear, llama3")
