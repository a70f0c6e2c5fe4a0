"""gpt-oss: sinks in attention, every other layer slides, clamped experts with biases (OpenAI 2025, arXiv:2508.10925)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import layer_kinds, only, rope
from kvasir.engine.fused import expect, per_expert
from kvasir.engine.spec import Experts, Layer, Spec

ARCHITECTURES = ("GptOssForCausalLM", "GptOssModel")
NAMES = llama.NAMES | {".self_attn.sinks": ".attn.sinks"}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
DEFAULTS = {"rope_theta": 150000.0, "rope_scaling": {**YARN, "original_max_position_embeddings": 4096}, "head_dim": 64}


def spec(c: Mapping[str, Any]) -> Spec:
    """The router's softmax is over the chosen experts alone."""
    only(c, "swiglu_alpha", 1.702)
    c = {**DEFAULTS, **c}
    turning = rope(c)
    names = ["full_attention" if i % 2 else "sliding_attention" for i in range(c["num_hidden_layers"])]
    sliding = Layer(turning, c.get("sliding_window", 128), experts=True)
    return llama.spec(
        c,
        qkv_bias=bool(c.get("attention_bias", True)),
        o_bias=bool(c.get("attention_bias", True)),
        sinks=True,
        layers=layer_kinds(c, {"full_attention": Layer(turning, experts=True), "sliding_attention": sliding}, names),
        activation="clamped",
        activation_limit=float(c.get("swiglu_limit", 7.0)),
        experts=Experts(
            c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], router_bias=True, bias=True
        ),
        names=NAMES,
        split=split,
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """All experts in one tensor, matrices [in, out], gate and up in turns."""
    facts = spec.experts
    if ".mlp.experts." not in name or facts is None:
        return ((name, tensor),)
    kind = "bias" if name.endswith("_bias") else "weight"
    stem, _, part = name.removesuffix("_bias").rpartition(".")
    sides = (facts.ffn, spec.hidden) if part == "down_proj" else (spec.hidden, 2 * facts.ffn)
    expect(name, tensor, facts.count, *(sides if kind == "weight" else sides[1:]))
    if kind == "weight":
        tensor = tensor.transpose(1, 2)
    if part == "down_proj":
        return per_expert({f"{stem}.down.{kind}": tensor}, "experts.{}")
    return per_expert({f"{stem}.gate.{kind}": tensor[:, ::2], f"{stem}.up.{kind}": tensor[:, 1::2]}, "experts.{}")
