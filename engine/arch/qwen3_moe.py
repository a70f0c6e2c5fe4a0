"""Qwen 3 MoE: Qwen 3 with many small experts and none that is shared (Qwen Team 2025, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama, qwen2_moe
from kvasir.engine.spec import Experts, Spec

ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """Files of transformers 5 call num_experts num_local_experts."""
    count = c.get("num_experts") or c["num_local_experts"]
    renormalise = bool(c.get("norm_topk_prob", False))
    experts = Experts(count, c["num_experts_per_tok"], c["moe_intermediate_size"], renormalise=renormalise)
    layers = qwen2_moe.layers({**c, "num_experts": count})
    return llama.spec(c, qk_norm="head", layers=layers, experts=experts, names=qwen2_moe.NAMES)
