"""Command R and R+: attention and MLP side by side behind one norm, neighbours rotate (Cohere 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import max_len, rope, same
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("CohereForCausalLM", "CohereModel")
DEFAULTS = {"rope_theta": 500000.0, "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """R+ normalises each head of q and k with weights of its own."""
    c = {**DEFAULTS, **c}
    facts: dict[str, Any] = {
        "eps": c["layer_norm_eps"],
        "norm": "layer",
        "placement": "parallel",
        "logit_scale": c["logit_scale"],
        "qk_norm": "each_head" if c.get("use_qk_norm") else None,
        "mlp_bias": False,
        "max_len": int(c.get("model_max_length") or max_len(c)),
    }
    if "layers" not in changes:
        facts["layers"] = same(c, Layer(rope(c, interleaved=True)))
    return llama.spec(c, **facts | changes)
