"""BERT and MiniLM, mxbai, BGE...: norms behind the residuals, every row sees its whole text (arXiv:1810.04805); and Jina's
second version of it, with symmetric ALiBi and gated MLPs (Günther et al. 2023, arXiv:2310.19923)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.config_json import activation, only, same
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import stacked
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = (
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "JinaBertModel",
    "JinaBertForMaskedLM",
    "JinaBertForSequenceClassification",
)
NAMES = {
    "embeddings.word_embeddings.": "embed.",
    "embeddings.position_embeddings.": "positions.",
    "embeddings.token_type_embeddings.": "token_types.",
    "embeddings.LayerNorm.": "embed_norm.",
    "encoder.layer.": "blocks.",
    ".attention.self.query.": ".attn.q.",
    ".attention.self.key.": ".attn.k.",
    ".attention.self.value.": ".attn.v.",
    ".attention.output.dense.": ".attn.o.",
    ".attention.output.LayerNorm.": ".attn_norm.",
    ".intermediate.dense.": ".mlp.up.",
    ".output.dense.": ".mlp.down.",
    ".output.LayerNorm.": ".mlp_norm.",
    ".mlp.wo.": ".mlp.down.",
    ".mlp.layernorm.": ".mlp_norm.",
}
NOT_BODY = (r"^(\w+\.)?pooler\.", r"^cls\.", r"^lm_head\.", r"position_ids$")
"""What stands behind the body: heads that predict masked words, and the one that a classifier reads."""


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """The facts of an encoder with learned positions, or Jina's."""
    only(c, "is_decoder", False)
    kind = c.get("position_embedding_type") or "absolute"
    if kind not in ("absolute", "alibi"):
        raise ConfigError(f"config.json: position_embedding_type {kind!r} is not supported; absolute and alibi are")
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    gated = c.get("feed_forward_type", "original") in ("geglu", "reglu")
    facts: dict[str, Any] = {
        "vocab": c["vocab_size"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn": c["intermediate_size"],
        "eps": c.get("layer_norm_eps", 1e-12),
        "max_len": c["max_position_embeddings"],
        "layers": same(c, Layer()),
        "causal": False,
        "qkv_bias": True,
        "o_bias": True,
        "alibi": 1.0 if kind == "alibi" else 0.0,
        "activation": "relu" if c.get("feed_forward_type") == "reglu" else activation(c, default="gelu"),
        "gated": gated,
        "mlp_bias": not gated,
        "down_bias": True,
        "norm": "layer",
        "norm_bias": True,
        "placement": "after",
        "final_norm": False,
        "embed_norm": True,
        "positions": c["max_position_embeddings"] if kind == "absolute" else 0,
        "token_types": c.get("type_vocab_size", 2),
        "lm_head": False,
        "prefixes": ("bert.", "roberta.", "model."),
        "names": NAMES,
        "split": split,
        "ignored": NOT_BODY,
    }
    return Spec(**facts | changes)


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """Jina's gated_layers: gate upon up. Old checkpoints call a norm's weight gamma, its bias beta."""
    if ".mlp.gated_layers." in name:
        return stacked(name, tensor, "gated_layers", spec, {"gate": spec.ffn, "up": spec.ffn})
    return ((name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"), tensor),)
