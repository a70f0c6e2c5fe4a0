"""Gemma 3: five sliding layers with a rope of their own to one that sees all, normalised heads (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import gemma2
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification")
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
"""What the published files leave out."""


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """Gemma 2's facts without soft caps. Hub files give the scaling of the full layers alone, and a second theta. A window
    that looks both ways (EmbeddingGemma) is as wide as they say in all."""
    c = {**DEFAULTS, **c}
    if c.get("use_bidirectional_attention"):
        c["sliding_window"] = c["sliding_window"] // 2 + 1
    if not c.get("rope_parameters"):
        full = {**(c.get("rope_scaling") or {}), "rope_theta": c["rope_theta"]}
        sliding = {"rope_theta": c["rope_local_base_freq"]}
        c["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    facts: dict[str, Any] = {
        "qk_norm": "head",
        "attn_softcap": c.get("attn_logit_softcapping"),
        "logit_softcap": c.get("final_logit_softcapping"),
        "layers": gemma2.layers(c, c.get("sliding_window_pattern") or 6),
        "causal": c.get("is_causal", True) and not c.get("use_bidirectional_attention"),
    }
    return gemma2.spec(c, **facts | changes)
