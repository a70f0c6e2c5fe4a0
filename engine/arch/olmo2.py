"""OLMo 2: norms behind the branches, whole rows of q and k are normalised (OLMo Team 2024, arXiv:2501.00656)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import gemma2, llama
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo2Model")


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's facts otherwise."""
    return llama.spec(c, placement="post", qk_norm="row", names=gemma2.NAMES)
