"""Granite 3: Llama with four constant factors (IBM 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.spec import Spec

ARCHITECTURES = ("GraniteForCausalLM", "GraniteModel")


def spec(c: Mapping[str, Any]) -> Spec:
    """Factors of embedding, scores, branches and logits."""
    return llama.spec(
        c,
        embed_scale=float(c.get("embedding_multiplier", 1.0)),
        attn_scale=float(c.get("attention_multiplier", 1.0)),
        residual_scale=float(c.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / c.get("logits_scaling", 1.0),
    )
