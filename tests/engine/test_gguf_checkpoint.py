"""GGUF equals its origin: checkpoints of transformers, converted here as llama.cpp's converter does it, give the same facts
and the same tensors. Names come from gguf-py's own table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file
from torch import Tensor

from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import Checkpoint, open_checkpoint
from kvasir.engine.decoder import Decoder
from kvasir.engine.gguf_checkpoint import GGUFCheckpoint
from kvasir.engine.rope import turning
from kvasir.engine.spec import Rope, Spec

CPU = torch.device("cpu")
Config = Mapping[str, Any]
Tensors = dict[str, Tensor]
ARCHS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
PERMUTED = ("llama", "mistral3", "granite", "smollm3", "internlm2", "minicpm")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0 + i / 20 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "original_max_position_embeddings": 128}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
MANY = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2}
DEEP = {**MLA, **MANY, "first_k_dense_replace": 1}
MSCALES = {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
MINISTRAL = {**YARN, "beta_fast": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.125}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
GEMMA = {"norm": 0.0, "head_dim": 32, "num_key_value_heads": 1}
# name -> general.architecture, transformers' class, its configuration
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}),
    "llama-yarn": ("llama", "Llama", {"rope_parameters": {**YARN, "beta_fast": 16.0, "attention_factor": 1.25}}),
    "mistral-nemo": ("llama", "Mistral", {"sliding_window": None, "head_dim": 24}),
    "ministral3": ("mistral3", "Ministral3", {"rope_parameters": MINISTRAL}),
    "mixtral": ("llama", "Mixtral", MOE),
    "llama4": (
        "llama4",
        "Llama4Text",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 5,
            "pad_token_id": 0,
        },
    ),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "gte-qwen2": ("qwen2", "Qwen2", {"is_causal": False}),
    "qwen2-moe": (
        "qwen2moe",
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}),
    "qwen3-moe": (
        "qwen3moe",
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("gemma", "Gemma", GEMMA),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {**GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 32, "num_hidden_layers": 4},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        {**GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    ),
    "gemma3-linear": (
        "gemma3",
        "Gemma3Text",
        {
            **GEMMA,
            "sliding_window": 9,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9, "pad_token_id": 0, "original_max_position_embeddings": 256}),
    "phi3-longrope": ("phi3", "Phi3", {"rope_parameters": LONGROPE, "pad_token_id": 0, "tie_word_embeddings": True}),
    "phi4-mini": (
        "phi3",
        "Phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
            "pad_token_id": 0,
            "original_max_position_embeddings": 256,
        },
    ),
    "phimoe": ("phimoe", "Phimoe", {**MOE, "attention_bias": True, "lm_head_bias": True}),
    "cohere": ("command-r", "Cohere", {"logit_scale": 0.25, "pad_token_id": 0}),
    "cohere-plus": ("command-r", "Cohere", {"use_qk_norm": True, "pad_token_id": 0}),
    "cohere2": ("cohere2", "Cohere2", {"sliding_window": 9, "num_hidden_layers": 5, "pad_token_id": 0}),
    "falcon-7b": ("falcon", "Falcon", {"tie_word_embeddings": False, "max_position_embeddings": 2048}),
    "falcon-40b": (
        "falcon",
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "max_position_embeddings": 2048},
    ),
    "falcon-11b": (
        "falcon",
        "Falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "max_position_embeddings": 2048,
        },
    ),
    "starcoder2": ("starcoder2", "Starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", "GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "granite": (
        "granite",
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0}),
    "dbrx": (
        "dbrx",
        "Dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
        },
    ),
    "gpt-oss": (
        "gpt-oss",
        "GptOss",
        {**MOE, "head_dim": 16, "sliding_window": 9, "rope_parameters": {**YARN, "truncate": False}},
    ),
    "deepseek-v2-lite": ("deepseek2", "DeepseekV2", {**DEEP, "q_lora_rank": None}),
    "deepseek-v2": (
        "deepseek2",
        "DeepseekV2",
        {
            **DEEP,
            **MSCALES,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v3": ("deepseek2", "DeepseekV3", {**DEEP, **MSCALES, "n_group": 4, "topk_group": 2}),
    "minicpm3": (
        "minicpm3",
        "MiniCPM3",
        {**MLA, "v_head_dim": 16, "dim_model_base": 256, "scale_emb": 12.0, "scale_depth": 1.4},
    ),
    "bert": ("bert", "Bert", {}),
    "xlm-roberta": ("bert", "XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "nomic-bert": ("nomic-bert", "NomicBert", {}),
    "jina-v3": ("jina-bert-v3", "JinaEmbeddingsV3", {}),
}
ENCODERS = ("Bert", "XLMRoberta", "NomicBert", "JinaEmbeddingsV3")


def first(c: Config, *names: str) -> Any:
    return next((c[name] for name in names if c.get(name) is not None), None)


def common(c: Config) -> dict[str, Any]:
    """What the converter's base class writes."""
    rope = c.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {}).get("rope_theta")
    rope = rope.get("full_attention", rope)
    stretched = {"linear": ("factor",), "yarn": ("factor",), "longrope": ()}.get(rope.get("rope_type", ""))
    made = {
        "context_length": first(c, "max_position_embeddings", "n_positions"),
        "embedding_length": first(c, "hidden_size", "n_embd"),
        "feed_forward_length": first(c, "intermediate_size", "n_inner"),
        "block_count": first(c, "num_hidden_layers", "n_layer", "n_layers"),
        "attention.head_count": first(c, "num_attention_heads", "n_head"),
        "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.causal": False if c.get("is_causal") is False else None,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local,
        "rope.scaling.type": None if stretched is None else rope["rope_type"],
        "rope.scaling.factor": rope["factor"] if stretched else None,
        "attention.layer_norm_rms_epsilon": first(c, "rms_norm_eps"),
        "attention.layer_norm_epsilon": first(c, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "expert_count": first(c, "num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_group_count": c.get("n_group"),
        "expert_group_used_count": c.get("topk_group"),
        "attention.key_length": c.get("head_dim"),
        "attention.value_length": c.get("head_dim"),
    }
    if rope.get("rope_type") == "yarn":
        made["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for theirs, ours in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
        ):
            made[f"rope.scaling.yarn_{ours}"] = rope.get(theirs)
    return made


def phi3(c: Config) -> dict[str, Any]:
    rope = c["rope_parameters"]
    original = rope.get("original_max_position_embeddings") or c["max_position_embeddings"]
    turning = int(rope.get("partial_rotary_factor", 1.0) * c["hidden_size"]) // c["num_attention_heads"]
    return {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": turning,
        "attention.sliding_window": c.get("sliding_window") or 0,
    }


def deepseek(c: Config) -> dict[str, Any]:
    turning, nope, rank = c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["kv_lora_rank"]
    every = (c.get("rope_parameters") or {}).get("mscale_all_dim")
    return {
        "attention.head_count_kv": 1,
        "leading_dense_block_count": c["first_k_dense_replace"],
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turning,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + turning,
        "attention.value_length_mla": c["v_head_dim"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_weights_scale": c["routed_scaling_factor"],
        "expert_weights_norm": c["norm_topk_prob"] or None,
        "rope.dimension_count": turning,
        "expert_gating_func": 2 if c["model_type"] == "deepseek_v3" else 1,
        "rope.scaling.yarn_log_multiplier": every and 0.1 * every,
    }


def dbrx(c: Config) -> dict[str, Any]:
    attention, experts = c["attn_config"], c["ffn_config"]
    return {
        "block_count": c["n_layers"],
        "context_length": c["max_seq_len"],
        "embedding_length": c["d_model"],
        "feed_forward_length": experts["ffn_hidden_size"],
        "attention.head_count": c["n_heads"],
        "attention.head_count_kv": attention["kv_n_heads"],
        "attention.clamp_kqv": attention["clip_qkv"],
        "rope.freq_base": attention["rope_theta"],
        "expert_count": experts["moe_num_experts"],
        "expert_used_count": experts["moe_top_k"],
        "attention.layer_norm_epsilon": 1e-5,
    }


def falcon(c: Config) -> dict[str, Any]:
    grouped = c["new_decoder_architecture"]
    return {
        "context_length": 2048,
        "feed_forward_length": 4 * c["hidden_size"],
        "attention.head_count_kv": c["num_kv_heads"] if grouped else 1,
        "attention.key_length": None,
        "rope.freq_base": None,
    }


def minicpm3(c: Config) -> dict[str, Any]:
    return {
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.kv_lora_rank": c["kv_lora_rank"],
        "attention.key_length": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        "attention.value_length": None,
        "rope.dimension_count": c["qk_rope_head_dim"],
    }


def granite(c: Config) -> dict[str, Any]:
    return {
        "attention.scale": c["attention_multiplier"],
        "embedding_scale": c["embedding_multiplier"],
        "residual_scale": c["residual_multiplier"],
        "logit_scale": c["logits_scaling"],
    }


def positions(c: Config) -> dict[str, Any]:
    return {"context_length": c["max_position_embeddings"] - 2} if "roberta" in c["model_type"] else {}


OWN: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama4": lambda c: {
        "feed_forward_length": c["intermediate_size_mlp"],
        "expert_feed_forward_length": c["intermediate_size"],
        "interleave_moe_layer_step": c["interleave_moe_layer_step"],
    },
    "qwen2moe": lambda c: {
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_feed_forward_length": c["shared_expert_intermediate_size"],
    },
    "qwen3moe": lambda c: {"expert_feed_forward_length": c["moe_intermediate_size"]},
    "gemma2": lambda c: {
        "attn_logit_softcapping": c["attn_logit_softcapping"],
        "final_logit_softcapping": c["final_logit_softcapping"],
        "attention.sliding_window": c["sliding_window"],
        "rope.freq_base": None,
    },
    "gemma3": lambda c: {"attention.sliding_window": c["sliding_window"]},
    "mistral3": lambda c: {
        "attention.temperature_scale": c["rope_parameters"]["llama_4_scaling_beta"],
        "rope.scaling.yarn_log_multiplier": c["rope_parameters"]["mscale_all_dim"],
    },
    "phi3": phi3,
    "phimoe": lambda c: phi3({**c, "sliding_window": None}),
    "command-r": lambda c: {"logit_scale": c["logit_scale"], "rope.scaling.type": "none"},
    "cohere2": lambda c: {"logit_scale": c["logit_scale"], "attention.sliding_window": c["sliding_window"]},
    "falcon": falcon,
    "gpt2": lambda c: {"feed_forward_length": 4 * c["n_embd"]},
    "granite": granite,
    "dbrx": dbrx,
    "gpt-oss": lambda c: {
        "attention.sliding_window": c["sliding_window"],
        "expert_feed_forward_length": c["intermediate_size"],
    },
    "deepseek2": deepseek,
    "minicpm3": minicpm3,
    "bert": lambda c: {"attention.causal": False} | positions(c),
    "nomic-bert": lambda c: {"attention.causal": False, "attention.key_length": None, "rope.freq_base": 1000.0},
    "jina-bert-v3": lambda c: {"attention.causal": False, "attention.key_length": None},
}


def permute(w: Tensor, heads: int) -> Tensor:
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def falcon_rows(c: Config, w: Tensor) -> Tensor:
    heads, size = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]
    kv = c["num_kv_heads"] if c["new_decoder_architecture"] else 1
    groups = w.view(kv, heads // kv + 2, size, -1)
    return torch.cat(
        [groups[:, :-2].reshape(-1, w.shape[1]), *(groups[:, i].reshape(-1, w.shape[1]) for i in (-2, -1))]
    )


def converted(arch: str, c: Config, name: str, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor as the converter's modify_tensors gives it, under a name that gguf-py's table knows."""
    if arch in PERMUTED and re.search(r"[qk]_proj\.", name):
        w = permute(w, c["num_attention_heads"] if "q_proj" in name else c["num_key_value_heads"])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        w = w + 1
    if "query_key_value.weight" in name:
        w = falcon_rows(c, w)
    if arch == "gpt2" and w.dim() == 2 and ".c_" in name:
        w = w.t()
    if arch == "deepseek2" and name.endswith("kv_b_proj.weight"):
        both = w.view(c["num_attention_heads"], -1, c["kv_lora_rank"])
        yield name.replace("kv_b", "k_b"), both[:, : c["qk_nope_head_dim"]].transpose(1, 2)
        yield name.replace("kv_b", "v_b"), both[:, c["qk_nope_head_dim"] :]
    elif arch in ("llama4", "gpt-oss") and ".experts." in name and "gate_up" in name:
        bias, middle = name.endswith("_bias"), (slice(0, None, 2), slice(1, None, 2))
        w = w if bias else w.transpose(1, 2)
        half = w.shape[1] // 2
        parts = middle if arch == "gpt-oss" else (slice(0, half), slice(half, None))
        for each, part in zip(("gate_proj", "up_proj"), parts, strict=True):
            yield re.sub("gate_up_proj(_bias)?", each, name) + (".bias" if bias else ".weight"), w[:, part]
    elif arch in ("llama4", "gpt-oss") and "experts.down_proj" in name:
        bias = name.endswith("_bias")
        yield name.replace("_bias", "") + (".bias" if bias else ".weight"), w if bias else w.transpose(1, 2)
    elif arch == "dbrx" and ".experts.mlp." in name:
        w = w.view(c["ffn_config"]["moe_num_experts"], -1, c["d_model"])
        yield f"{name}.weight", w.transpose(1, 2) if name.endswith("w2") else w
    elif name.endswith("position_embeddings.weight") and "roberta" in c["model_type"]:
        yield name, w[2:]
    else:
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        yield name + (".weight" if name.endswith("sinks") else ""), w


def gguf_tensors(arch: str, c: Config, hf: Tensors, depth: int) -> Tensors:
    table = gguf.get_tensor_name_map(ARCHS[arch], depth)
    out: Tensors = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in hf.items():
        if expert := re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+\.weight)", name):
            prefix = expert[1].replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
            merged = expert[1] if arch != "llama" else prefix
            experts.setdefault(merged + expert[3], {})[int(expert[2])] = tensor
            continue
        for other, w in converted(arch, c, name, tensor):
            if "pooler" in other or "embeddings.position_ids" in other:
                continue
            out[named(table, other)] = w
    for name, each in experts.items():
        out[named(table, name)] = torch.stack([each[i] for i in range(len(each))])
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        plain = turning(Rope(rope["rope_theta"], 16))
        scaled = turning(load_spec(c).layers[0].rope)  # type: ignore[arg-type]
        out["rope_freqs.weight"] = plain.frequencies / scaled.frequencies
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            out[f"rope_factors_{kind}.weight"] = torch.tensor(rope[f"{kind}_factor"])
    return out


def named(table: gguf.TensorNameMap, name: str) -> str:
    for candidate in (name, name.removeprefix("bert."), name.removeprefix("roberta."), f"model.{name}"):
        if found := table.get_name(candidate, try_suffixes=(".weight", ".bias")):
            return str(found)
    raise AssertionError(f"gguf-py's table has no {name}")


def write(path: Path, arch: str, metadata: Config, tensors: Tensors, types: Callable[[str], Q]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(f"{arch}.{key}", value)
            case int():
                writer.add_uint32(f"{arch}.{key}", value)
            case float():
                writer.add_float32(f"{arch}.{key}", value)
            case str():
                writer.add_string(f"{arch}.{key}", value)
            case list():
                writer.add_array(f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        kind = types(name) if tensor.dim() > 1 else Q.F32
        kind = kind if kind in (Q.F32, Q.F16, Q.BF16) or tensor.shape[-1] % 32 == 0 else Q.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def origin(checkpoint: Callable[..., tuple[Path, Any]]) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """`origin(case)`: transformers' folder and its config.json."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def build(case: str) -> tuple[Path, dict[str, Any]]:
        if case not in made:
            _, family, changes = CASES[case]
            folder = checkpoint(family, auto="AutoModel" if family in ENCODERS else "AutoModelForCausalLM", **changes)[
                0
            ]
            made[case] = folder, {**json.loads((folder / "config.json").read_text()), **causality(changes)}
        return made[case]

    return build


def causality(changes: Config) -> dict[str, Any]:
    """transformers doesn't save it, GTE's own files have it."""
    return {key: value for key, value in changes.items() if key == "is_causal"}


def in_gguf(path: Path, arch: str, c: Config, folder: Path, types: Callable[[str], Q] = lambda name: Q.F32) -> Path:
    metadata = common(c) | (OWN[arch](c) if arch in OWN else {})
    tensors = gguf_tensors(arch, c, load_file(folder / "model.safetensors"), metadata["block_count"])
    write(path, arch, metadata, tensors, types)
    return path


def facts(spec: Spec) -> Any:
    """Without what only reading the other kind of checkpoint needs."""
    return dataclasses.asdict(dataclasses.replace(spec, names={}, prefixes=(), split=None, ignored=()))


def close(ours: Any, theirs: Any, path: str = "") -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            close(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            close(a, b, f"{path}[{i}]")
    elif isinstance(ours, float) or isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6), path
    else:
        assert ours == theirs, path


def filled(checkpoint: Checkpoint, spec: Spec) -> Tensors:
    """Every place of the model, filled; nothing left over, nothing missing."""
    places = dict(Decoder(spec, torch.float32, CPU).places())
    unfilled = set(places)
    for filler in checkpoint.tensors(spec):
        assert filler.name in unfilled, f"{filler.original} -> {filler.name}"
        unfilled.remove(filler.name)
        filler.copy_to(places[filler.name])
    assert not unfilled
    return places


@pytest.mark.parametrize("case", CASES)
def test_the_same_facts_and_tensors(case: str, origin: Any, tmp_path: Path) -> None:
    arch = CASES[case][0]
    folder, c = origin(case)
    checkpoint = GGUFCheckpoint(in_gguf(tmp_path / "model.gguf", arch, c, folder))
    spec, theirs = load_spec(checkpoint.config()), load_spec(c)
    places = filled(checkpoint, spec)
    expected = filled(open_checkpoint(folder), theirs)
    if skipped := theirs.position_offset:  # the converter drops the rows before the first position
        expected["positions.weight"] = expected["positions.weight"][skipped:]
        left = theirs.positions - skipped
        theirs = dataclasses.replace(theirs, positions=left, position_offset=0, max_len=left)
    close(facts(spec), facts(theirs))
    assert places.keys() == expected.keys()
    for name, tensor in places.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6 if spec.norm_offset else 0, msg=name)
