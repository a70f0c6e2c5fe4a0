"""DeepSeek V2, V2-Lite and Coder-V2: latent attention, many small experts (arXiv:2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama, qwen2_moe
from kvasir.engine.config_json import only, rope, rope_fields, stretch
from kvasir.engine.spec import Experts, Latent, Layer, Spec

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV2Model", "DeepseekV2ForSequenceClassification")
NAMES = qwen2_moe.NAMES | {
    ".self_attn.q_a_proj.": ".attn.q_a.",
    ".self_attn.q_a_layernorm.": ".attn.q_a_norm.",
    ".self_attn.q_b_proj.": ".attn.q_b.",
    ".self_attn.kv_a_proj_with_mqa.": ".attn.kv_a.",
    ".self_attn.kv_a_layernorm.": ".attn.kv_a_norm.",
    ".self_attn.kv_b_proj.": ".attn.kv_b.",
    ".mlp.shared_experts.": ".mlp.shared.",
    ".mlp.gate.e_score_correction_bias": ".mlp.choice_bias",
}


def spec(c: Mapping[str, Any]) -> Spec:
    """Experts of the best groups alone are chosen, where topk_method says so."""
    only(c, "topk_method", "greedy", "group_limited_greedy")
    only(c, "scoring_func", "softmax")
    only(c, "norm_topk_prob", False)
    limited = c.get("topk_method") == "group_limited_greedy"
    return build(
        c,
        groups=(c.get("n_group") or 1) if limited else 1,
        groups_used=(c.get("topk_group") or 1) if limited else 1,
        renormalise=False,
    )


def build(c: Mapping[str, Any], **routing: Any) -> Spec:
    """V2's facts with this way to choose experts."""
    width, count = c["moe_intermediate_size"], c["n_routed_experts"]
    experts = Experts(
        count,
        c["num_experts_per_tok"],
        width,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        shared_ffn=width * (c.get("n_shared_experts") or 0),
        **routing,
    )
    first, every = c.get("first_k_dense_replace", 0), c.get("moe_layer_freq", 1)
    turning = rope(c, dim=c["qk_rope_head_dim"], interleaved=c.get("rope_interleave", True))
    depth = c["num_hidden_layers"]
    layers = (Layer(turning, experts=i >= first and i % every == 0) for i in range(depth))
    further = range(depth, depth + (c.get("num_nextn_predict_layers") or 0))
    return llama.spec(
        c,
        **latent(c),
        layers=tuple(layers),
        experts=experts,
        names=NAMES,
        ignored=tuple(rf"layers\.{i}\." for i in further),  # heads that predict the tokens after the next
    )


def latent(c: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of latent attention; YaRN's mscale_all_dim counts for scores, twice."""
    p = rope_fields(c)
    nope, turning = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    scale = (nope + turning) ** -0.5
    if p.get("rope_type", p.get("type", "default")) != "default" and p.get("mscale_all_dim"):
        scale *= stretch(p["factor"], p["mscale_all_dim"]) ** 2
    return {
        "kv_heads": c["num_attention_heads"],
        "head_dim": nope + turning,
        "latent": Latent(c["kv_lora_rank"], nope, turning, c["v_head_dim"], c.get("q_lora_rank")),
        "attn_scale": scale,
    }
