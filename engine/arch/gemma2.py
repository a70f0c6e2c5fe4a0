"""Gemma 2: a norm on both sides of each branch, soft caps, every other layer slides (arXiv:2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import gemma, llama
from kvasir.engine.config_json import layer_kinds, rope
from kvasir.engine.spec import Layer, Spec

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2Model", "Gemma2ForSequenceClassification")
NAMES = llama.NAMES | {
    ".post_attention_layernorm.": ".post_attn_norm.",
    ".pre_feedforward_layernorm.": ".mlp_norm.",
    ".post_feedforward_layernorm.": ".post_mlp_norm.",
}


def spec(c: Mapping[str, Any], **changes: Any) -> Spec:
    """Gemma's facts; scores are scaled by query_pre_attn_scalar instead of the head's width."""
    facts: dict[str, Any] = {
        "placement": "sandwich",
        "attn_scale": c.get("query_pre_attn_scalar", 256) ** -0.5,
        "attn_softcap": c.get("attn_logit_softcapping", 50.0),
        "logit_softcap": c.get("final_logit_softcapping", 30.0),
        "names": NAMES,
    }
    if "layers" not in changes:
        facts["layers"] = layers(c, every=2)
    return gemma.spec(c, **facts | changes)


def layers(c: Mapping[str, Any], every: int) -> tuple[Layer, ...]:
    """Without layer_types every `every`-th layer sees all, the others `sliding_window` tokens."""
    names = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(c["num_hidden_layers"])]
    full = Layer(rope(c, kind="full_attention"))
    sliding = Layer(rope(c, kind="sliding_attention"), c.get("sliding_window", 4096))
    return layer_kinds(c, {"full_attention": full, "sliding_attention": sliding}, names)
