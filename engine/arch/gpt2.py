"""GPT-2: learned positions, LayerNorm, a plain MLP (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.config_json import activation, lm_head
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import qkv_rows, stacked
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification")
NAMES = {
    "wte.": "embed.",
    "wpe.": "positions.",
    "h.": "blocks.",
    "ln_f.": "norm.",
    "lm_head.": "head.",
    ".attn.c_proj.": ".attn.o.",
    ".mlp.c_fc.": ".mlp.up.",
    ".mlp.c_proj.": ".mlp.down.",
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """GPT-2 has its own field names."""
    for field in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if c.get(field):
            raise ConfigError(f"config.json: {field} is not supported")
    hidden, heads = c["n_embd"], c["n_head"]
    return Spec(
        vocab=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=c.get("n_inner") or 4 * hidden,
        eps=c.get("layer_norm_epsilon", 1e-5),
        max_len=c.get("n_positions", 1024),
        layers=(Layer(),) * c["n_layer"],
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        attn_scale=None if c.get("scale_attn_weights", True) else 1.0,
        activation=activation(c, "activation_function", default="gelu_new"),
        gated=False,
        norm="layer",
        norm_bias=True,
        positions=c.get("n_positions", 1024),
        tied=c.get("tie_word_embeddings", True),
        lm_head=str((c.get("architectures") or [""])[0]) == "GPT2LMHeadModel" or lm_head(c),
        prefixes=("transformer.",),
        names=NAMES,
        split=split,
        ignored=(r"\.attn\.(masked_)?bias$",),
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """Its matrices are [in, out]; c_attn holds q, k and v side by side."""
    parts: Iterable[tuple[str, Any]] = ((name, tensor),)
    if ".attn.c_attn." in name:
        parts = stacked(name, tensor, "c_attn", spec, qkv_rows(spec, "q", "k", "v"), dim=-1)
    matrix = tensor.dim() == 2 and ".c_" in name
    return ((part, piece.t() if matrix else piece) for part, piece in parts)
