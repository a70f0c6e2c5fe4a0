"""StarCoder 2: LayerNorm and biases everywhere, a plain MLP, windows (Lozhkov et al. 2024, arXiv:2402.19173)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama, mistral
from kvasir.engine.config_json import activation
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Starcoder2ForCausalLM", "Starcoder2Model", "Starcoder2ForSequenceClassification")
NAMES = llama.NAMES | {".mlp.c_fc.": ".mlp.up.", ".mlp.c_proj.": ".mlp.down."}


def spec(c: Mapping[str, Any]) -> Spec:
    """Llama's attention, windows in every layer."""
    bias = bool(c.get("use_bias", True))
    return mistral.spec(
        c,
        eps=c.get("norm_epsilon", 1e-5),
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=activation(c, default="gelu_pytorch_tanh"),
        tied=c.get("tie_word_embeddings", True),
        names=NAMES,
    )
