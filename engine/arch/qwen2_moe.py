"""Qwen 1.5 and 2 MoE: many small experts and a gated one that all rows share (arXiv:2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvasir.engine.arch import llama, qwen2
from kvasir.engine.spec import Experts, Layer, Spec

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen2MoeModel")
NAMES = llama.NAMES | {
    ".mlp.gate.": ".mlp.router.",
    "gate_proj.": "gate.",
    "up_proj.": "up.",
    "down_proj.": "down.",
    ".mlp.shared_expert.": ".mlp.shared.",
    ".mlp.shared_expert_gate.": ".mlp.shared_gate.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """Qwen 2's attention."""
    experts = Experts(
        c["num_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        renormalise=bool(c.get("norm_topk_prob", False)),
        shared_ffn=c.get("shared_expert_intermediate_size", 0),
        shared_gate=True,
    )
    bias = bool(c.get("qkv_bias", True))
    return llama.spec(c, qkv_bias=bias, o_bias=False, layers=layers(c), experts=experts, names=NAMES)


def layers(c: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Every decoder_sparse_step-th layer has experts, but for those in mlp_only_layers."""
    every, dense = c.get("decoder_sparse_step") or 1, c.get("mlp_only_layers") or ()
    mixed = (i not in dense and c["num_experts"] > 0 and (i + 1) % every == 0 for i in range(c["num_hidden_layers"]))
    return tuple(replace(layer, experts=sparse) for layer, sparse in zip(qwen2.layers(c), mixed, strict=True))
