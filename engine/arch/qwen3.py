"""Qwen 3: Llama with RMS-normalised heads of q and k (Qwen Team 2025, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama, qwen2
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's facts, Qwen 2's windows."""
    return llama.spec(c, qk_norm="head", layers=qwen2.layers(c))
