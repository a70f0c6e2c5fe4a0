"""Falcon 7B, 40B, 180B, 11B and RW: attention and MLP side by side, or one after the other with ALiBi (arXiv:2311.16867)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.config_json import activation, lm_head, rope
from kvasir.engine.fused import grouped, qkv_rows, stacked
from kvasir.engine.spec import Layer, Placement, Spec

ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM", "FalconModel")
NAMES = {
    "word_embeddings.": "embed.",
    "h.": "blocks.",
    "ln_f.": "norm.",
    "lm_head.": "head.",
    ".self_attention.query.": ".attn.q.",
    ".self_attention.key.": ".attn.k.",
    ".self_attention.value.": ".attn.v.",
    ".self_attention.dense.": ".attn.o.",
    ".mlp.dense_h_to_4h.": ".mlp.up.",
    ".mlp.dense_4h_to_h.": ".mlp.down.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".ln_attn.": ".attn_norm.",
    ".ln_mlp.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """RW files call some fields n_head, n_layer, n_head_kv."""
    heads, hidden = c.get("num_attention_heads") or c["n_head"], c.get("hidden_size") or c["n_embed"]
    depth = c.get("num_hidden_layers") or c["n_layer"]
    c = {"max_position_embeddings": 2048, **c, "num_attention_heads": heads, "hidden_size": hidden}
    alibi, bias = bool(c.get("alibi")), bool(c.get("bias"))
    new = bool(c.get("new_decoder_architecture", "n_head_kv" in c))
    kv_heads = (
        (c.get("num_kv_heads") or c.get("n_head_kv") or heads) if new else 1 if c.get("multi_query", True) else heads
    )
    return Spec(
        vocab=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=c.get("ffn_hidden_size") or 4 * hidden,
        eps=c.get("layer_norm_epsilon", 1e-5),
        max_len=c["max_position_embeddings"],
        layers=(Layer(None if alibi else rope(c)),) * depth,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        alibi=(hidden // heads) ** -0.5 if alibi else 0.0,  # Falcon scales scores after adding the distances
        activation=activation(c, "activation", default="gelu"),
        gated=False,
        norm="layer",
        norm_bias=True,
        placement=_placement(c, new),
        tied=c.get("tie_word_embeddings", True),
        lm_head=lm_head(c),
        prefixes=("transformer.",),
        names=NAMES,
        split=split,
    )


def _placement(c: Mapping[str, Any], new: bool) -> Placement:
    if not c.get("parallel_attn", True):
        return "pre"
    norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    return "parallel_two" if norms == 2 else "parallel"


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """query_key_value: grouped by kv head; with a single kv head that is one upon the other."""
    if "query_key_value" not in name:
        return ((name, tensor),)
    if spec.kv_heads == 1:
        return stacked(name, tensor, "query_key_value", spec, qkv_rows(spec, "query", "key", "value"))
    return grouped(name, tensor, "query_key_value", spec, "query", "key", "value")
