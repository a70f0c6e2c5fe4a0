"""OPT: learned positions, ReLU, LayerNorm before or (350m) after the branches (Zhang et al. 2022, arXiv:2205.01068)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.config_json import activation, lm_head, same
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification")
NAMES = {
    "embed_tokens.": "embed.",
    "embed_positions.": "positions.",
    "layers.": "blocks.",
    "final_layer_norm.": "norm.",
    "lm_head.": "head.",
    ".self_attn.q_proj.": ".attn.q.",
    ".self_attn.k_proj.": ".attn.k.",
    ".self_attn.v_proj.": ".attn.v.",
    ".self_attn.out_proj.": ".attn.o.",
    ".self_attn_layer_norm.": ".attn_norm.",
    ".final_layer_norm.": ".mlp_norm.",
    ".fc1.": ".mlp.up.",
    ".fc2.": ".mlp.down.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """The first two rows of the position table are padding's."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    before, bias = c.get("do_layer_norm_before", True), c.get("enable_bias", True)
    width = c.get("word_embed_proj_dim") or hidden
    return Spec(
        vocab=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=c["ffn_dim"],
        eps=1e-5,
        max_len=c["max_position_embeddings"],
        layers=same(c, Layer()),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        activation=activation(c, "activation_function", default="relu"),
        gated=False,
        norm="layer",
        norm_bias=True,
        placement="pre" if before else "after",
        final_norm=before and not c.get("_remove_final_layer_norm", False),
        embed_dim=None if width == hidden else width,
        positions=c["max_position_embeddings"] + 2,
        position_offset=2,
        tied=c.get("tie_word_embeddings", True),
        lm_head=lm_head(c),
        prefixes=("model.decoder.", "decoder.", "model."),
        names=NAMES,
    )
