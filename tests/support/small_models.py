"""Small models that several tests share."""

from __future__ import annotations

from typing import Any

from kvasir.engine.spec import Layer, Rope, Spec

SPEC = Spec(
    vocab=50,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    eps=1e-5,
    max_len=256,
    layers=(Layer(Rope(10000.0, 8)),) * 2,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 24},
    "Gemma2": {"sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16},
    "DeepseekV3": {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Kinds of cache (windows, groups of layers, latent attention) by architecture: a checkpoint's facts."""
