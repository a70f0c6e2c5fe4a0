"""MiniCPM 1 and 2: Llama with the factors of its scaling experiments (Hu et al. 2024, arXiv:2404.06395)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.spec import Spec

ARCHITECTURES = ("MiniCPMForCausalLM",)


def spec(c: Mapping[str, Any]) -> Spec:
    """Branches shrink with the depth, logits with the width."""
    return llama.spec(
        c,
        embed_scale=float(c.get("scale_emb", 1.0)),
        residual_scale=c.get("scale_depth", 1.0) / c["num_hidden_layers"] ** 0.5,
        logit_scale=c.get("dim_model_base", c["hidden_size"]) / c["hidden_size"],
        tied=c.get("tie_word_embeddings", True),
    )
