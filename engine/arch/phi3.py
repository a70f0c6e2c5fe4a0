"""Phi-3 mini and medium, Phi-4: Llama with fused projections and longrope (Microsoft 2024, arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import mistral
from kvasir.engine.fused import qkv_rows, stacked
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Phi3ForCausalLM", "Phi3Model", "Phi3ForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """Mistral's facts. Early files call longrope "su" or "yarn"."""
    scaling = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    for key in ("type", "rope_type"):
        if scaling.get(key) == "yarn":
            scaling[key] = "longrope"
    return mistral.spec({**c, "rope_scaling": scaling, "rope_parameters": None}, split=split)


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """qkv_proj and gate_up_proj hold their parts one upon the other."""
    if ".qkv_proj." in name:
        return stacked(name, tensor, "qkv_proj", spec, qkv_rows(spec, "q_proj", "k_proj", "v_proj"))
    if ".gate_up_proj." in name:
        return stacked(name, tensor, "gate_up_proj", spec, {"gate_proj": spec.ffn, "up_proj": spec.ffn})
    return ((name, tensor),)
