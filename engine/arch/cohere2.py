"""Command R7B and A: Command R with three sliding layers to one that sees all and has no positions (Cohere 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import cohere
from kvasir.engine.config_json import layer_kinds, rope
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("Cohere2ForCausalLM", "Cohere2Model")


def spec(c: Mapping[str, Any]) -> Spec:
    """Files without layer_types say sliding_window_pattern."""
    c = {**cohere.DEFAULTS, **c}
    every = c.get("sliding_window_pattern") or 4
    names = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(c["num_hidden_layers"])]
    sliding = Layer(rope(c, interleaved=True), c.get("sliding_window", 4096))
    kinds = {"full_attention": Layer(), "sliding_attention": sliding}
    return cohere.spec(c, layers=layer_kinds(c, kinds, names))
