"""RoBERTa: BERT whose positions begin behind the padding's row (Liu et al. 2019, arXiv:1907.11692)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import bert
from kvasir.engine.spec import Spec

ARCHITECTURES = ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """Position 0 is row pad_token_id + 1."""
    first = c.get("pad_token_id", 1) + 1
    return bert.spec(c, position_offset=first, max_len=c["max_position_embeddings"] - first)
