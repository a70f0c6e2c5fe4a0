"""InternLM 1: Llama with biased attention (Shanghai AI Laboratory 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.spec import Spec

ARCHITECTURES = ("InternLMForCausalLM",)


def spec(c: Mapping[str, Any]) -> Spec:
    """`bias` is attention's. Dynamic NTK scaling stands in `rotary`."""
    rotary = c.get("rotary") or {}
    scaled = c.get("rope_scaling") or {}
    if rotary.get("type") == "dynamic" and not {"type", "rope_type"} & scaled.keys():
        c = {**c, "rope_scaling": {**scaled, "type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}}
    if rotary.get("base"):
        c = {**c, "rope_theta": rotary["base"]}
    bias = bool(c.get("bias", True))
    return llama.spec(c, qkv_bias=bias, o_bias=bias)
