"""InternLM 3: Llama with biases of its own choosing (Shanghai AI Laboratory 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.spec import Spec

ARCHITECTURES = ("InternLM3ForCausalLM",)


def spec(c: Mapping[str, Any]) -> Spec:
    """`qkv_bias` for the projections into attention, `bias` for all others; transformers 5 writes Llama's fields."""
    bias = bool(c.get("bias", c.get("attention_bias", False)))
    return llama.spec(c, qkv_bias=bool(c.get("qkv_bias", bias)), o_bias=bias, mlp_bias=bool(c.get("mlp_bias", bias)))
