"""What config.json would say in each family, beyond what all have in common.

What a converter leaves out stands in the tensors (biases, widths), or is what all published models of the family have; where
that is assumed, it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvasir.engine.gguf_facts import Facts
from kvasir.engine.gguf_rope import rope_scaling

SIGMOID = 2
"""expert_gating_func."""


def _llama(f: Facts) -> dict[str, Any]:
    """Llama, Mistral, Mixtral, Yi, InternLM 3: all are called llama. Ministral 3's queries grow by its rope's original length,
    or by the model's."""
    window = f.get("attention.sliding_window")
    scale = f.get("attention.temperature_scale")
    if f.get("expert_count"):
        if scale:
            f.fail("attention.temperature_scale is not supported beside experts")
        return {"model_type": "mixtral", "class": "Mixtral"} | _experts(f)
    if scale:
        length = f.get("rope.scaling.original_context_length") or f.count("context_length")
        rope = {"original_max_position_embeddings": length, **(rope_scaling(f) or {}), "llama_4_scaling_beta": scale}
        return {"model_type": "mistral", "class": "Mistral", "sliding_window": window, "rope_scaling": rope}
    if f.has("blk.0.attn_q.bias") and not f.has("blk.0.attn_output.bias"):
        return {
            "model_type": "internlm3",
            "class": "InternLM3",
            "qkv_bias": True,
            "bias": False,
            "attention_bias": False,
        }
    if window:
        return {"model_type": "mistral", "class": "Mistral", "sliding_window": window}
    return {"model_type": "llama", "class": "Llama"}


def _experts(f: Facts) -> dict[str, Any]:
    return {"num_local_experts": f.experts, "num_experts_per_tok": f.count("expert_used_count")}


def _llama4(f: Facts) -> dict[str, Any]:
    """llama.cpp has the chunk of 8192 and the temperature of the published models built in, and Maverick's lack of norms."""
    if f.get("attention.sliding_window") == 0:
        f.fail("Llama 4 without chunks (MobileLLM) is not supported")
    return _experts(f) | {
        "model_type": "llama4_text",
        "class": "Llama4",
        "intermediate_size": f.count("expert_feed_forward_length"),
        "intermediate_size_mlp": f.count("feed_forward_length"),
        "interleave_moe_layer_step": f.count("interleave_moe_layer_step"),
        "use_qk_norm": f.experts != 128,
    }


def _qwen(f: Facts) -> dict[str, Any]:
    """The length it was trained for isn't in the file, so nothing grows beyond it (llama.cpp does the same)."""
    return {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "kv_channels": f.head_dim,
        "rotary_emb_base": f.get("rope.freq_base", 10000.0),
        "layer_norm_epsilon": f.need("attention.layer_norm_rms_epsilon"),
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


def _qwen2(f: Facts) -> dict[str, Any]:
    return {"model_type": "qwen2", "class": "Qwen2"}


def _sparse(f: Facts) -> dict[str, Any]:
    """Qwen's mixtures; widths stand in the tensors where the metadata leaves them out."""
    mixed = [f.has(f"blk.{i}.ffn_gate_inp.weight") for i in range(f.depth)]
    first = mixed.index(True) if True in mixed else f.fail("no layer has a router (ffn_gate_inp)")
    width = f.get("expert_feed_forward_length") or f.tensor(f"blk.{first}.ffn_up_exps.weight").shape[1]
    return {
        "num_experts": f.experts,
        "num_experts_per_tok": f.count("expert_used_count"),
        "moe_intermediate_size": width,
        "mlp_only_layers": [i for i, sparse in enumerate(mixed) if not sparse],
    }


def _qwen2moe(f: Facts) -> dict[str, Any]:
    made = _sparse(f)
    shared = f.tensor(f"blk.{mixed_layer(made)}.ffn_up_shexp.weight").shape[0]
    own = {"model_type": "qwen2_moe", "class": "Qwen2Moe", "shared_expert_intermediate_size": shared}
    return made | own | {"norm_topk_prob": False, "qkv_bias": f.has("blk.0.attn_q.bias")}


def mixed_layer(made: Mapping[str, Any]) -> int:
    """The first layer that has experts."""
    return next(i for i in range(len(made["mlp_only_layers"]) + 1) if i not in made["mlp_only_layers"])


def _qwen3(f: Facts) -> dict[str, Any]:
    return {"model_type": "qwen3", "class": "Qwen3"}


def _qwen3moe(f: Facts) -> dict[str, Any]:
    return _sparse(f) | {"model_type": "qwen3_moe", "class": "Qwen3Moe", "norm_topk_prob": True}


def _gemma(f: Facts) -> dict[str, Any]:
    return {"model_type": "gemma", "class": "Gemma"}


def _gemma2(f: Facts) -> dict[str, Any]:
    """27B alone scales scores by the width that the heads divide the model's into."""
    return {
        "model_type": "gemma2",
        "class": "Gemma2",
        "query_pre_attn_scalar": f.hidden // f.heads if f.depth == 46 else f.head_dim,
        "attn_logit_softcapping": f.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": f.get("final_logit_softcapping", 30.0),
        "sliding_window": f.get("attention.sliding_window", 4096),
    }


def _gemma3(f: Facts) -> dict[str, Any]:
    """27B: as in Gemma 2. A missing window means that all layers see all."""
    window = f.get("attention.sliding_window")
    return {
        "model_type": "gemma3_text",
        "class": "Gemma3",
        "query_pre_attn_scalar": f.hidden // f.heads if f.depth == 62 else f.head_dim,
        "final_logit_softcapping": f.get("final_logit_softcapping"),
        "rope_theta": f.get("rope.freq_base", 1000000.0),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10000.0),
        "sliding_window": window or None,
        "layer_types": _layer_types(f) if window else ["full_attention"] * f.depth,
    }


def _layer_types(f: Facts) -> list[str] | None:
    """Where the file lists which layers slide."""
    slides = f.per_layer("attention.sliding_window_pattern")
    return ["sliding_attention" if each else "full_attention" for each in slides] if slides else None


def _deepseek2(f: Facts) -> dict[str, Any]:
    """V2, V2-Lite, V3, R1. Older files list an attention's lengths before absorption, and no groups of experts."""
    sigmoid = f.get("expert_gating_func") == SIGMOID or f.has(f"blk.{f.depth - 1}.exp_probs_b.bias")
    absorbed = "_mla" if f.get("attention.key_length_mla") else ""
    groups = f.get("expert_group_count") or {160: 8, 256: 8}.get(f.experts, 1)
    used = f.get("expert_group_used_count") or {160: 3, 256: 4}.get(f.experts, 1)
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "class": "DeepseekV3" if sigmoid else "DeepseekV2",
        "head_dim": None,
        "partial_rotary_factor": None,
        "num_key_value_heads": f.heads,
        "q_lora_rank": f.get("attention.q_lora_rank"),
        "kv_lora_rank": f.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": f.count("rope.dimension_count"),
        "qk_nope_head_dim": _without_rope(f, f"attention.key_length{absorbed}"),
        "v_head_dim": f.count(f"attention.value_length{absorbed}"),
        "n_routed_experts": f.experts,
        "num_experts_per_tok": f.count("expert_used_count"),
        "n_shared_experts": f.get("expert_shared_count", 0),
        "moe_intermediate_size": f.count("expert_feed_forward_length"),
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "routed_scaling_factor": f.get("expert_weights_scale", 1.0),
        "norm_topk_prob": f.get("expert_weights_norm", False),
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": used,
    }


def _without_rope(f: Facts, key: str) -> int:
    """Dimensions of a key that don't turn, given how many it has."""
    nope = f.count(key) - f.count("rope.dimension_count")
    return nope if nope > 0 else f.fail(f"{f.arch}.{key} must be more than rope.dimension_count")


def _phi3(f: Facts) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "class": "Phi3",
        "original_max_position_embeddings": f.get("rope.scaling.original_context_length"),
        "sliding_window": f.get("attention.sliding_window") or None,
    }


def _phimoe(f: Facts) -> dict[str, Any]:
    own = {"model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"], "lm_head_bias": f.has("output.bias")}
    return _phi3(f) | _experts(f) | own


def _internlm2(f: Facts) -> dict[str, Any]:
    return {"model_type": "internlm2", "class": "InternLM2", "bias": f.has("blk.0.attn_q.bias")}


def _command_r(f: Facts) -> dict[str, Any]:
    own = {"model_type": "cohere", "class": "Cohere", "use_qk_norm": f.has("blk.0.attn_q_norm.weight")}
    return own | {"logit_scale": f.get("logit_scale", 0.0625)}


def _cohere2(f: Facts) -> dict[str, Any]:
    return {
        "model_type": "cohere2",
        "class": "Cohere2",
        "logit_scale": f.get("logit_scale", 0.0625),
        "sliding_window": f.need("attention.sliding_window"),
        "layer_types": _layer_types(f),
    }


def _dbrx(f: Facts) -> dict[str, Any]:
    attention = {"kv_n_heads": f.count("attention.head_count_kv"), "clip_qkv": f.get("attention.clamp_kqv")}
    experts = {"moe_num_experts": f.experts, "moe_top_k": f.count("expert_used_count")}
    return {
        "model_type": "dbrx",
        "class": "Dbrx",
        "d_model": f.hidden,
        "n_heads": f.heads,
        "n_layers": f.depth,
        "max_seq_len": f.count("context_length"),
        "attn_config": attention | {"rope_theta": f.get("rope.freq_base", 10000.0)},
        "ffn_config": experts | {"ffn_hidden_size": f.count("feed_forward_length")},
    }


def _falcon(f: Facts) -> dict[str, Any]:
    """The converter has put q, k and v one upon the other, so that how they were grouped doesn't matter."""
    return {
        "model_type": "falcon",
        "class": "Falcon",
        "num_kv_heads": f.get("attention.head_count_kv", 1),
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2 if f.has("blk.0.attn_norm_2.weight") else 1,
        "ffn_hidden_size": f.count("feed_forward_length"),
        "layer_norm_epsilon": f.need("attention.layer_norm_epsilon"),
        "bias": f.has("blk.0.attn_qkv.bias"),
    }


def _starcoder2(f: Facts) -> dict[str, Any]:
    own = {"model_type": "starcoder2", "class": "Starcoder2", "use_bias": f.has("blk.0.attn_q.bias")}
    return own | {"norm_epsilon": f.need("attention.layer_norm_epsilon")}


def _gpt2(f: Facts) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": f.hidden,
        "n_head": f.heads,
        "n_layer": f.depth,
        "n_positions": f.tensor("position_embd.weight").shape[0],
        "n_inner": f.count("feed_forward_length"),
        "layer_norm_epsilon": f.need("attention.layer_norm_epsilon"),
    }


def _minicpm(f: Facts) -> dict[str, Any]:
    """Files of before 2025 leave the factors out: those of the published models."""
    return {
        "model_type": "minicpm",
        "class": "MiniCPM",
        "scale_emb": f.get("embedding_scale", 12.0),
        "scale_depth": f.get("residual_scale", 1.4 / f.depth**0.5) * f.depth**0.5,
        "dim_model_base": f.hidden / f.get("logit_scale", f.hidden / 256),
    }


def _minicpm3(f: Facts) -> dict[str, Any]:
    """The factors are those of the one published model: the file leaves them out."""
    nope = _without_rope(f, "attention.key_length")
    return {
        "model_type": "minicpm3",
        "class": "MiniCPM3",
        "head_dim": None,
        "partial_rotary_factor": None,
        "q_lora_rank": f.get("attention.q_lora_rank"),
        "kv_lora_rank": f.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": f.count("rope.dimension_count"),
        "qk_nope_head_dim": nope,
        "v_head_dim": f.tensor("blk.0.attn_kv_b.weight").shape[0] // f.heads - nope,
        "scale_emb": 12.0,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    }


def _olmo2(f: Facts) -> dict[str, Any]:
    if f.get("attention.sliding_window"):
        f.fail("olmo2.attention.sliding_window (OLMo 3) is not supported")
    return {"model_type": "olmo2", "class": "Olmo2"}


def _granite(f: Facts) -> dict[str, Any]:
    if f.get("rope.scaling.finetuned") is False:
        f.fail("granite without rotary positions is not supported")
    return {
        "model_type": "granite",
        "class": "Granite",
        "embedding_multiplier": f.get("embedding_scale", 1.0),
        "attention_multiplier": f.get("attention.scale") or f.head_dim**-0.5,
        "residual_multiplier": f.get("residual_scale", 1.0),
        "logits_scaling": f.get("logit_scale", 1.0),
    }


def _smollm3(f: Facts) -> dict[str, Any]:
    return {"model_type": "smollm3", "class": "SmolLM3", "no_rope_layer_interval": 4}


def _gpt_oss(f: Facts) -> dict[str, Any]:
    return _experts(f) | {
        "model_type": "gpt_oss",
        "class": "GptOss",
        "intermediate_size": f.count("expert_feed_forward_length"),
        "sliding_window": f.need("attention.sliding_window"),
        "layer_types": _layer_types(f),
    }


def _bert(f: Facts) -> dict[str, Any]:
    """BERT, RoBERTa, XLM-R alike: the converter has cut off the rows before a text's first position."""
    return {
        "model_type": "bert",
        "class": "Bert",
        "type_vocab_size": _rows(f, "token_types.weight"),
        "max_position_embeddings": f.tensor("position_embd.weight").shape[0],
    }


def _rows(f: Facts, tensor: str) -> int:
    return f.file.tensors[tensor].shape[0] if f.has(tensor) else 0


def _nomic_bert(f: Facts) -> dict[str, Any]:
    own = {"model_type": "nomic_bert", "class": "NomicBert", "type_vocab_size": _rows(f, "token_types.weight")}
    return own | {"rotary_emb_base": f.get("rope.freq_base", 1000.0)}


def _jina_v2(f: Facts) -> dict[str, Any]:
    """llama.cpp's tensors tell the gated MLP by a gate, or by `up` of twice the width."""
    doubled = f.tensor("blk.0.ffn_up.weight").shape[0] == 2 * f.count("feed_forward_length")
    return {
        "model_type": "bert",
        "class": "JinaBert",
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu" if doubled or f.has("blk.0.ffn_gate.weight") else "original",
        "type_vocab_size": _rows(f, "token_types.weight"),
    }


def _jina_v3(f: Facts) -> dict[str, Any]:
    own = {"model_type": "jina_embeddings_v3", "class": "JinaEmbeddingsV3"}
    return own | {"type_vocab_size": _rows(f, "token_types.weight")}


FAMILIES: dict[str, Callable[[Facts], dict[str, Any]]] = {
    "llama": _llama,
    "mistral3": _llama,
    "llama4": _llama4,
    "qwen": _qwen,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "deepseek2": _deepseek2,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "internlm2": _internlm2,
    "command-r": _command_r,
    "cohere2": _cohere2,
    "dbrx": _dbrx,
    "falcon": _falcon,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
    "minicpm": _minicpm,
    "minicpm3": _minicpm3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
    "gpt-oss": _gpt_oss,
    "bert": _bert,
    "nomic-bert": _nomic_bert,
    "jina-bert-v2": _jina_v2,
    "jina-bert-v3": _jina_v3,
}
