"""SmolLM 3: Llama without positions in every fourth layer (Hugging Face 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import rope
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("SmolLM3ForCausalLM", "SmolLM3Model", "SmolLM3ForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """no_rope_layers has a 1 for every layer that rotates; only the others may slide."""
    depth, every = c["num_hidden_layers"], c.get("no_rope_layer_interval") or 4
    rotates = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    types = c.get("layer_types") or ["full_attention" if turns else "sliding_attention" for turns in rotates]
    turning = rope(c)
    layers = (
        Layer(turning if turns else None, window if kind == "sliding_attention" else None)
        for turns, kind in zip(rotates, types, strict=True)
    )
    return llama.spec(c, layers=tuple(layers), tied=c.get("tie_word_embeddings", True))
