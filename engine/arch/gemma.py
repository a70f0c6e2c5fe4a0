"""Gemma 1: norms store weight - 1, the embedding is scaled, GeGLU (Gemma Team 2024, arXiv:2403.08295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import activation, only
from kvasir.engine.spec import Spec

ARCHITECTURES = ("GemmaForCausalLM", "GemmaModel", "GemmaForSequenceClassification")


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """The first configurations say hidden_act "gelu", but the models were trained with the tanh approximation."""
    if "causal" not in changes:
        only(c, "use_bidirectional_attention", False)
    facts: dict[str, Any] = {
        "activation": activation(c, "hidden_activation", default="gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "embed_scale": c["hidden_size"] ** 0.5,
        "tied": c.get("tie_word_embeddings", True),
    }
    return llama.spec(c, **facts | changes)
