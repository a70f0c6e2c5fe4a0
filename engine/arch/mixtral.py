"""Mixtral: Mistral with eight MLPs, of which two are chosen (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama, mistral
from kvasir.engine.config_json import rope, same
from kvasir.engine.spec import Experts, Layer, Spec

ARCHITECTURES = ("MixtralForCausalLM", "MixtralModel", "MixtralForSequenceClassification")
NAMES = llama.NAMES | {
    ".block_sparse_moe.gate.": ".mlp.router.",
    ".block_sparse_moe.experts.": ".mlp.experts.",
    ".w1.": ".gate.",
    ".w3.": ".up.",
    ".w2.": ".down.",
}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """Softmax over the chosen two: the same as over all, divided by their sum."""
    facts: dict[str, Any] = {
        "layers": same(c, Layer(rope(c), c.get("sliding_window"), experts=True)),
        "experts": Experts(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"]),
        "names": NAMES,
    }
    return mistral.spec(c, **facts | changes)
