"""Nomic Embed: BERT that rotates, with gated MLPs and no biases (Nussbaum et al. 2024, arXiv:2402.01613)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import bert
from kvasir.engine.config_json import only, rope
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import qkv_rows, stacked
from kvasir.engine.spec import Dynamic, Layer, Rope, Spec

ARCHITECTURES = ("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForSequenceClassification")
NAMES = {
    "embeddings.word_embeddings.": "embed.",
    "embeddings.token_type_embeddings.": "token_types.",
    "emb_ln.": "embed_norm.",
    "encoder.layers.": "blocks.",
    ".attn.out_proj.": ".attn.o.",
    ".mlp.fc11.": ".mlp.up.",
    ".mlp.fc12.": ".mlp.gate.",
    ".mlp.fc2.": ".mlp.down.",
    ".norm1.": ".attn_norm.",
    ".norm2.": ".mlp_norm.",
}
REFUSED = (
    *("prenorm", "parallel_block", "causal", "use_rms_norm", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"),
    *("rotary_emb_interleaved", "rotary_emb_scale_base", "num_experts"),
)
FIELDS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""transformers' names -> the hub's."""


def spec(c: Mapping[str, Any]) -> Spec:
    """Beyond the length it was trained for (2048) theta grows."""
    for field in REFUSED:
        if c.get(field):
            raise ConfigError(f"config.json: {field} is not supported for nomic_bert")
    only(c, "activation_function", "swiglu")
    only(c, "hidden_act", "silu")
    only(c, "rotary_emb_fraction", 1.0)
    c = {**{name: c[old] for name, old in FIELDS.items() if old in c}, **c, "position_embedding_type": "absolute"}
    turning = rope({"rope_theta": c.get("rotary_emb_base", 1000.0), **c})
    trained = c.get("max_trained_positions") or c["max_position_embeddings"]
    if trained < c["max_position_embeddings"]:
        turning = Rope(turning.theta, turning.dim, scaling=Dynamic(c.get("rotary_scaling_factor") or 1.0, trained))
    return bert.spec(
        {**c, "hidden_act": "silu"},
        layers=(Layer(turning),) * c["num_hidden_layers"],
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        down_bias=False,
        gated=True,
        positions=0,
        names=NAMES,
        split=split,
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """Wqkv holds q, k, v one upon the other."""
    if ".Wqkv." in name:
        return stacked(name, tensor, "Wqkv", spec, qkv_rows(spec, "q", "k", "v"))
    return ((name, tensor),)
