"""Mistral 7B, Nemo, Small, Large: Llama with a window in the first release (Jiang et al. 2023, arXiv:2310.06825); Ministral 3,
whose queries grow slowly with their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import original_len, rope, rope_fields, same
from kvasir.engine.spec import Layer, QueryScale, Spec

ARCHITECTURES = ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification", "Ministral3ForCausalLM")


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """Llama's facts; `sliding_window` holds for every layer."""
    layer = Layer(rope(c), c.get("sliding_window"), query_scale=_query_scale(c))
    return llama.spec(c, **{"layers": same(c, layer)} | changes)


def _query_scale(c: Mapping[str, Any]) -> QueryScale | None:
    p = rope_fields(c)
    factor = p.get("llama_4_scaling_beta")
    return QueryScale("floor", original_len(c, p), float(factor), first=0) if factor else None
