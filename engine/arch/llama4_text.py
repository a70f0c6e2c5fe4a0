"""Llama 4: chunks in three of four layers, none of which but the fourth lacks positions; one expert of many (Meta 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.config_json import rope
from kvasir.engine.fused import expect, per_expert
from kvasir.engine.spec import Experts, Layer, QueryScale, Spec

ARCHITECTURES = ("Llama4ForCausalLM",)
NAMES = llama.NAMES | {
    ".feed_forward.router.": ".mlp.router.",
    ".feed_forward.experts.": ".mlp.experts.",
    ".feed_forward.shared_expert.": ".mlp.shared.",
    ".feed_forward.": ".mlp.",
    "gate_proj.": "gate.",
    "up_proj.": "up.",
    "down_proj.": "down.",
}
DEFAULTS = {"rope_theta": 500000.0, "head_dim": 128}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """The dense layers' MLP has a width of its own; queries without positions grow slowly with them."""
    c = {**DEFAULTS, **c}
    experts = Experts(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        scoring="sigmoid",
        renormalise=False,
        on_input=True,
        shared_ffn=c["intermediate_size"],
    )
    facts: dict[str, Any] = {
        "ffn": c.get("intermediate_size_mlp", c["intermediate_size"]),
        "layers": _layers(c),
        "experts": experts,
        "qk_norm": "l2" if c.get("use_qk_norm", True) else None,
        "names": NAMES,
        "split": split,
    }
    return llama.spec(c, **facts | changes)


def _layers(c: Mapping[str, Any]) -> tuple[Layer, ...]:
    depth, step = c["num_hidden_layers"], c.get("interleave_moe_layer_step", 1)
    mixed = c.get("moe_layers")
    mixed = range(step - 1, depth, step) if mixed is None else mixed
    every = c.get("no_rope_layer_interval") or 4
    rotates = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]
    tuned = c.get("attn_temperature_tuning", True)
    scale = QueryScale("floor", c.get("floor_scale", 8192), c.get("attn_scale", 0.1)) if tuned else None
    near, far = Layer(rope(c, interleaved=True), chunk=c.get("attention_chunk_size", 8192)), Layer(query_scale=scale)
    kinds = (near if turns else far for turns in rotates)
    return tuple(replace(kind, experts=i in mixed) for i, kind in enumerate(kinds))


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """All experts in one tensor, matrices [in, out], gate beside up."""
    stem, _, part = name.rpartition(".")
    facts = spec.experts
    if not stem.endswith(".feed_forward.experts") or facts is None:
        return ((name, tensor),)
    sides = (facts.ffn, spec.hidden) if part == "down_proj" else (spec.hidden, 2 * facts.ffn)
    expect(name, tensor, facts.count, *sides)
    tensor = tensor.transpose(1, 2)
    if part == "down_proj":
        return per_expert({f"{stem}.down_proj.weight": tensor}, "experts.{}")
    gate, up = tensor.chunk(2, 1)
    return per_expert({f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}, "experts.{}")
