"""MiniCPM 3: MiniCPM with latent attention and longrope (OpenBMB 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import deepseek_v2, llama
from kvasir.engine.config_json import rope, same
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("MiniCPM3ForCausalLM", "MiniCPM3Model")


def spec(c: Mapping[str, Any]) -> Spec:
    """Halves of the rotating part pair, unlike in DeepSeek; values are as wide as the heads divide the model."""
    c = {"v_head_dim": c["hidden_size"] // c["num_attention_heads"], **c}
    return llama.spec(
        c,
        **deepseek_v2.latent(c),
        layers=same(c, Layer(rope(c, dim=c["qk_rope_head_dim"]))),
        embed_scale=float(c.get("scale_emb", 1.0)),
        residual_scale=c.get("scale_depth", 1.0) / c["num_hidden_layers"] ** 0.5,
        logit_scale=c.get("dim_model_base", c["hidden_size"]) / c["hidden_size"],
        tied=c.get("tie_word_embeddings", True),
        names=deepseek_v2.NAMES,
    )
