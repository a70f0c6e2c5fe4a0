"""XLM-R: RoBERTa for a hundred languages (arXiv:1911.02116); or Jina's third version of it, which rotates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import jina_embeddings_v3, roberta
from kvasir.engine.spec import Spec

ARCHITECTURES = ("XLMRobertaModel", "XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """position_embedding_type tells the two apart."""
    return jina_embeddings_v3.spec(c) if c.get("position_embedding_type") == "rotary" else roberta.spec(c)
