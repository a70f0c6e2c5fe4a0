"""Phi-3.5-MoE: Mixtral with LayerNorm, biases and a router without softmax over all (arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import mixtral
from kvasir.engine.spec import Experts, Spec

ARCHITECTURES = ("PhiMoEForCausalLM", "PhimoeForCausalLM")


def spec(c: Mapping[str, Any]) -> Spec:
    """SparseMixer's threshold is the jitter that the router was trained with."""
    experts = Experts(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        scoring="sparsemixer",
        renormalise=False,
        jitter=c.get("router_jitter_noise", 0.01),
    )
    head_bias = bool(c.get("lm_head_bias", False))
    return mixtral.spec(c, experts=experts, norm="layer", norm_bias=True, head_bias=head_bias)
