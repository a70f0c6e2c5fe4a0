"""Mistral 7B, Nemo, Small, Large: Llama with a window in the first release (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import rope, same
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification")


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """Llama's facts; `sliding_window` holds for every layer."""
    return llama.spec(c, **{"layers": same(c, Layer(rope(c), c.get("sliding_window")))} | changes)
