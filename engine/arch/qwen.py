"""Qwen 1: Llama with a fused, biased qkv; beyond its training length theta grows, and queries with log n (arXiv:2309.16609)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.config_json import rope
from kvasir.engine.fused import qkv_rows, stacked
from kvasir.engine.spec import Dynamic, Layer, QueryScale, Rope, Spec

ARCHITECTURES = ("QWenLMHeadModel",)
NAMES = {
    "wte.": "embed.",
    "h.": "blocks.",
    "ln_f.": "norm.",
    "lm_head.": "head.",
    ".attn.c_proj.": ".attn.o.",
    ".mlp.w1.": ".mlp.up.",
    ".mlp.w2.": ".mlp.gate.",
    ".mlp.c_proj.": ".mlp.down.",
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """w1 * silu(w2), each half as wide as intermediate_size says. seq_length is what it was trained for."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    trained = c.get("seq_length") or c["max_position_embeddings"]
    dim = int(c.get("kv_channels", hidden // heads) * c.get("rotary_pct", 1.0))
    turning = rope({**c, "rope_theta": c.get("rotary_emb_base", 10000.0)}, dim=dim)
    if c.get("use_dynamic_ntk") and turning.scaling is None:
        turning = Rope(turning.theta, dim, scaling=Dynamic(2.0, trained, doubling=True))
    log = QueryScale("log", trained) if c.get("use_logn_attn") else None
    return Spec(
        vocab=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=c.get("kv_channels", hidden // heads),
        ffn=c["intermediate_size"] // 2,
        eps=c.get("layer_norm_epsilon", 1e-6),
        max_len=c.get("max_position_embeddings") or trained,
        layers=(Layer(turning, query_scale=log),) * c["num_hidden_layers"],
        qkv_bias=True,
        o_bias=not c.get("no_bias", True),
        mlp_bias=not c.get("no_bias", True),
        tied=bool(c.get("tie_word_embeddings", False)),
        prefixes=("transformer.",),
        names=NAMES,
        split=split,
        ignored=(r"visual\.",),
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """c_attn holds q, k and v one upon the other."""
    if ".attn.c_attn." in name:
        return stacked(name, tensor, "c_attn", spec, qkv_rows(spec, "q", "k", "v"))
    return ((name, tensor),)
