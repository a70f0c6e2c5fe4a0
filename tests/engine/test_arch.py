"""config.json -> Spec: both spellings of the hub, neutral defaults, and errors that name what isn't supported."""

from __future__ import annotations

from typing import Any

import pytest

from kvasir.engine.arch import load_spec, supported
from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Linear, Llama3, Rope

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def test_defaults_are_llama_s() -> None:
    spec = load_spec(LLAMA)
    assert (spec.kv_heads, spec.head_dim, spec.max_len, spec.activation) == (8, 8, 512, "silu")
    assert not any((spec.tied, spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm))
    assert {layer.rope for layer in spec.layers} == {Rope(10000.0, 8)}
    assert {layer.window for layer in spec.layers} == {None}


@pytest.mark.parametrize(
    ("spelling", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5, 8)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5, 8)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(5e5, 8)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, 8, scaling=Linear(2.0))),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}},
            Rope(1e4, 8, scaling=Linear(2.0)),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
            Rope(5e5, 8, scaling=Llama3(8.0, 1.0, 4.0, 8192)),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
            Rope(5e5, 8, scaling=Llama3(8.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def test_rope_in_both_spellings(spelling: dict[str, Any], rope: Rope) -> None:
    assert load_spec({**LLAMA, **spelling}).layers[0].rope == rope


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported are .*llama, .*qwen2, .*qwen3"),
        ({"model_type": None}, "model_type 'None'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2}}, "rope_type 'proportional'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type 'longrope' needs 'long_factor'"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"num_key_value_heads": 3}, "8 heads can't share 3 kv heads"),
        ({"num_hidden_layers": 0}, "layers must be a positive integer"),
        ({"vocab_size": "512"}, "vocab must be a positive integer"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .quant_method 'gptq'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "quantization_config.format 'pack-quantized' is not supported; it must be 'float-quantized'",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
                }
            },
            "quantization_config.transform_config.config_groups",
        ),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "quant_algo 'NVFP4' is not"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "layer_types .'chunked_attention'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differ by kind of layer .full_attention"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob True is not supported; .*be False"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method 'noaux_tc' .*'greedy' or 'group"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "qwen", "is_causal": False}, "is_causal false is not supported for model_type 'qwen'"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder True"),
        ({"model_type": "nomic_bert", "activation_function": "geglu"}, "activation_function 'geglu'"),
        ({"model_type": "nomic_bert", "rotary_emb_fraction": 0.5}, "rotary_emb_fraction 0.5"),
        ({"model_type": "nomic_bert", "parallel_block": True}, "parallel_block is not supported"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "swiglu_alpha 1.0"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "text_config.model_type 'mistral4'"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_spec({**LLAMA, **changes})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gemma2", "gemma3_text", "granite", "cohere"])
def test_null_says_what_leaving_a_field_out_does(kind: str) -> None:
    """`"is_causal": null` isn't false."""
    fields = (
        "is_causal",
        "rms_norm_eps",
        "layer_norm_eps",
        "head_dim",
        "hidden_act",
        "tie_word_embeddings",
        "rope_theta",
    )
    factors = ("query_pre_attn_scalar", "residual_multiplier", "logits_scaling", "logit_scale", "rope_local_base_freq")
    config = {**LLAMA, "model_type": kind, "head_dim": 8, "sliding_window": 32}
    for field in (*fields, *factors):
        without = {key: value for key, value in config.items() if key != field}
        assert load_spec({**config, field: None}) == load_spec(without), field


def test_null_in_a_text_model_within_another() -> None:
    inner = {key: value for key, value in LLAMA.items() if key != "model_type"}
    spec = load_spec({"model_type": "mistral3", "text_config": {**inner, "model_type": "mistral", "is_causal": None}})
    assert spec.causal


def test_null_switches_windows_and_caps_off() -> None:
    gemma = {**LLAMA, "model_type": "gemma2", "head_dim": 8}
    off = {"sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = load_spec({**gemma, **off})
    assert (spec.attn_softcap, spec.logit_softcap, spec.layers[0].window) == (None, None, None)
    spec = load_spec(gemma)
    assert (spec.attn_softcap, spec.logit_softcap, spec.layers[0].window) == (50.0, 30.0, 4096)


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="intermediate_size is missing"):
        load_spec({k: v for k, v in LLAMA.items() if k != "intermediate_size"})


def test_qwen2_biases_and_windows() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 3}
    spec = load_spec(qwen)
    assert (spec.qkv_bias, spec.o_bias) == (True, False)
    assert [layer.window for layer in spec.layers] == [None] * 4
    spec = load_spec({**qwen, "use_sliding_window": True})
    assert [layer.window for layer in spec.layers] == [None, None, None, 32]
    kinds = ["sliding_attention", "full_attention"] * 2
    spec = load_spec({**qwen, "use_sliding_window": True, "layer_types": kinds})
    assert [layer.window for layer in spec.layers] == [32, None, 32, None]


def test_supported_lists_every_file() -> None:
    assert {"llama", "qwen2", "qwen3", "deepseek_v3"} <= set(supported())


def test_command_r_says_its_length_elsewhere() -> None:
    cohere = {**LLAMA, "model_type": "cohere", "architectures": ["CohereForCausalLM"]}
    assert load_spec({**cohere, "max_position_embeddings": 8192, "model_max_length": 131072}).max_len == 131072
    assert load_spec(cohere).max_len == 512


def test_minicpm3_has_values_as_wide_as_its_heads() -> None:
    """Its published file doesn't say."""
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8}
    spec = load_spec({**LLAMA, **latent, "model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]})
    assert spec.latent is not None
    assert spec.latent.v_dim == 8


def test_what_needs_dual_chunk_attention_ends_where_that_begins() -> None:
    dual = {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 128}}
    spec = load_spec({**LLAMA, **dual, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    assert spec.max_len == 128
