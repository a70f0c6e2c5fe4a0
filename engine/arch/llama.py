"""Llama 2 and 3, the base the other files start from (Touvron et al. 2023, arXiv:2307.09288; Llama 3 Herd 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvasir.engine.config_json import activation, head_dim, lm_head, max_len, rope, same
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "YiForCausalLM")

NAMES = {
    "embed_tokens.": "embed.",
    "layers.": "blocks.",
    "lm_head.": "head.",
    ".self_attn.q_proj.": ".attn.q.",
    ".self_attn.k_proj.": ".attn.k.",
    ".self_attn.v_proj.": ".attn.v.",
    ".self_attn.o_proj.": ".attn.o.",
    ".self_attn.q_norm.": ".attn.q_norm.",
    ".self_attn.k_norm.": ".attn.k_norm.",
    ".mlp.gate_proj.": ".mlp.gate.",
    ".mlp.up_proj.": ".mlp.up.",
    ".mlp.down_proj.": ".mlp.down.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """The facts of a Llama, with `changes` on top: an architecture that differs in a fact is one call."""
    bias = bool(c.get("attention_bias", False))
    facts: dict[str, Any] = {
        "vocab": c["vocab_size"],
        "hidden": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": head_dim(c),
        "ffn": c["intermediate_size"],
        "eps": c.get("rms_norm_eps", 1e-6),
        "max_len": max_len(c),
        "causal": bool(c.get("is_causal", True)),
        "activation": activation(c),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias", False)),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "lm_head": lm_head(c),
        "names": NAMES,
    }
    if "layers" not in changes:
        facts["layers"] = same(c, Layer(rope=rope(c)))
    facts |= changes
    if not c.get("is_causal", True):  # a window that looks both ways says how far
        wider = (replace(layer, window=layer.window and layer.window + 1) for layer in facts["layers"])
        facts["layers"] = tuple(wider)
    return Spec(**facts)
