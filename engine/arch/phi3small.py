"""Phi-3-small: block-sparse attention in every other layer, clamped gates, factors by width (arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import rope
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import expect, grouped, shape_of
from kvasir.engine.spec import BlockSparse, Layer, Spec

ARCHITECTURES = ("Phi3SmallForCausalLM",)
NAMES = llama.NAMES | {".self_attn.dense.": ".attn.o.", "final_layernorm.": "norm."}


def spec(c: Mapping[str, Any]) -> Spec:
    """Its scaling rules (mup) divide scores by the head's width and logits by the model's."""
    if c.get("blocksparse_homo_head_pattern"):
        raise ConfigError("config.json: blocksparse_homo_head_pattern is not supported")
    scaled, width = c.get("mup_use_scaling", True), c["hidden_size"] // c["num_attention_heads"]
    return llama.spec(
        {**c, "hidden_act": "silu", "intermediate_size": c["ff_intermediate_size"]},
        layers=_layers({**c, "rope_theta": c.get("rope_embedding_base", 10000.0)}),
        eps=c.get("layer_norm_epsilon", 1e-5),
        norm="layer",
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation="clamped",
        activation_limit=float(c.get("gegelu_limit", 20.0)),
        embed_scale=float(c.get("mup_embedding_multiplier", 10.0)),
        attn_scale=c.get("mup_attn_multiplier", 1.0) / width if scaled else None,
        logit_scale=1.0 / c.get("mup_width_multiplier", 8.0) if scaled else 1.0,
        tied=c.get("tie_word_embeddings", True),
        names=NAMES,
        split=split,
    )


def _layers(c: Mapping[str, Any]) -> tuple[Layer, ...]:
    dense = int(c.get("dense_attention_every_n_layers") or 0)
    pattern = BlockSparse(c["blocksparse_block_size"], c["blocksparse_num_local_blocks"], c["blocksparse_vert_stride"])
    turning = rope(c)
    every = (dense > 0 and (i + 1) % dense == 0 for i in range(c["num_hidden_layers"]))
    return tuple(Layer(turning, sparse=None if full else pattern) for full in every)


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """query_key_value is grouped by kv head; the rows of gate and up take turns."""
    if ".query_key_value." in name:
        return grouped(name, tensor, "query_key_value", spec, "q_proj", "k_proj", "v_proj")
    if ".mlp.up_proj." in name:
        expect(name, tensor, *shape_of(name, 2 * spec.ffn, spec))
        return ((name.replace("up_proj", "gate_proj"), tensor[::2]), (name, tensor[1::2]))
    return ((name, tensor),)
