"""InternLM 2 and 2.5: Llama with one projection grouped by kv head (Cai et al. 2024, arXiv:2403.17297)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.arch import llama
from kvasir.engine.fused import grouped
from kvasir.engine.spec import Spec

ARCHITECTURES = ("InternLM2ForCausalLM", "InternLM2Model", "InternLM2ForRewardModel")
NAMES = {
    "tok_embeddings.": "embed.",
    "layers.": "blocks.",
    "output.": "head.",
    ".attention.wq.": ".attn.q.",
    ".attention.wk.": ".attn.k.",
    ".attention.wv.": ".attn.v.",
    ".attention.wo.": ".attn.o.",
    ".feed_forward.w1.": ".mlp.gate.",
    ".feed_forward.w3.": ".mlp.up.",
    ".feed_forward.w2.": ".mlp.down.",
    ".attention_norm.": ".attn_norm.",
    ".ffn_norm.": ".mlp_norm.",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's facts; `bias` is attention's."""
    bias = bool(c.get("bias", False))
    return llama.spec(c, qkv_bias=bias, o_bias=bias, names=NAMES, split=split)


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """wqkv: for each kv head its queries, its key and its value."""
    if ".wqkv." in name:
        return grouped(name, tensor, "wqkv", spec, "wq", "wk", "wv")
    return ((name, tensor),)
