"""DBRX: LayerNorm without bias, clipped q, k and v, sixteen experts of which four are chosen (Databricks 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvasir.engine.config_json import activation, lm_head, rope
from kvasir.engine.errors import ConfigError
from kvasir.engine.fused import expect, per_expert, qkv_rows, stacked
from kvasir.engine.spec import Experts, Layer, Spec

ARCHITECTURES = ("DbrxForCausalLM", "DbrxModel")
NAMES = {
    "wte.": "embed.",
    "norm_f.": "norm.",
    "lm_head.": "head.",
    ".norm_attn_norm.attn.out_proj.": ".attn.o.",
    ".norm_attn_norm.attn.": ".attn.",
    ".norm_attn_norm.norm_1.": ".attn_norm.",
    ".norm_attn_norm.norm_2.": ".mlp_norm.",
    ".ffn.router.layer.": ".mlp.router.",
    ".ffn.experts.": ".mlp.experts.",
}
PARTS = {"w1": "gate", "v1": "up", "w2": "down"}


def spec(c: Mapping[str, Any]) -> Spec:
    """Attention's and the experts' facts stand in dictionaries of their own."""
    attn, ffn = c["attn_config"], c["ffn_config"]
    if ffn.get("moe_normalize_expert_weights", 1) not in (1, None):
        raise ConfigError("config.json: moe_normalize_expert_weights other than 1 is not supported")
    hidden, heads, width = c["d_model"], c["n_heads"], ffn["ffn_hidden_size"]
    common = {"hidden_size": hidden, "num_attention_heads": heads, "max_position_embeddings": c["max_seq_len"]}
    given = {key: c[key] for key in ("rope_parameters", "rope_scaling") if key in c}
    turning = rope({**common, **given, "rope_theta": attn.get("rope_theta", 10000.0)})
    return Spec(
        vocab=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=attn.get("kv_n_heads", 1),
        head_dim=hidden // heads,
        ffn=width,
        eps=1e-5,
        max_len=c["max_seq_len"],
        layers=(Layer(turning, experts=True),) * c["n_layers"],
        clip_qkv=attn.get("clip_qkv"),
        activation=activation(ffn.get("ffn_act_fn") or {}, "name"),
        experts=Experts(
            ffn["moe_num_experts"],
            ffn["moe_top_k"],
            width,
            renormalise=ffn.get("moe_normalize_expert_weights", 1) is not None,
        ),
        norm="layer",
        tied=bool(c.get("tie_word_embeddings", False)),
        lm_head=lm_head(c),
        prefixes=("transformer.",),
        names=NAMES,
        split=split,
    )


def split(name: str, tensor: Any, spec: Spec) -> Iterable[tuple[str, Any]]:
    """Wqkv holds q, k, v one upon the other; w1, v1 and w2 all experts', w2 transposed."""
    if ".Wqkv." in name:
        return stacked(name, tensor, "Wqkv", spec, qkv_rows(spec, "q", "k", "v"))
    if ".ffn.experts.mlp." in name and spec.experts:
        part = name.rpartition(".")[2]
        expect(name, tensor, spec.experts.count * spec.experts.ffn, spec.hidden)
        experts = tensor.view(spec.experts.count, -1, spec.hidden)
        if part == "w2":
            experts = experts.transpose(1, 2)
        return per_expert({name.replace(f".mlp.{part}", f".{PARTS[part]}.weight"): experts}, "experts.{}")
    return ((name, tensor),)
