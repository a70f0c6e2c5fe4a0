"""Jina embeddings v3: XLM-R that rotates (Sturua et al. 2024, arXiv:2409.10173). Its five task adapters aren't applied: the
vectors are those of no task in particular."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import bert
from kvasir.engine.config_json import rope, same
from kvasir.engine.fused import qkv_rows, stacked
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("JinaEmbeddingsV3Model", "JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3ForSequenceClassification")
NAMES = {
    "embeddings.word_embeddings.": "embed.",
    "embeddings.token_type_embeddings.": "token_types.",
    "emb_ln.": "embed_norm.",
    "encoder.layers.": "blocks.",
    ".mixer.out_proj.": ".attn.o.",
    ".mixer.": ".attn.",
    ".mlp.fc1.": ".mlp.up.",
    ".mlp.fc2.": ".mlp.down.",
    ".norm1.": ".attn_norm.",
    ".norm2.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """BERT's facts otherwise."""
    c = {**c, "position_embedding_type": "absolute", "rotary_emb_base": c.get("rotary_emb_base", 20000.0)}
    return bert.spec(
        c,
        layers=same(c, Layer(rope(c))),
        positions=0,
        names=NAMES,
        split=split,
        ignored=(*bert.NOT_BODY, r"\.lora_[AB]$"),
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """Wqkv holds q, k, v one upon the other; a tensor with adapters is kept as `parametrizations.weight.original`."""
    parts: Iterable[tuple[str, Any]] = ((name, tensor),)
    if ".Wqkv." in name:
        parts = stacked(name, tensor, "Wqkv", spec, qkv_rows(spec, "q", "k", "v"))
    return ((part.replace(".parametrizations.weight.original", ".weight"), piece) for part, piece in parts)
