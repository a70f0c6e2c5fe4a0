"""What the command line changes in config.json, and models whose text part lies inside another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvasir.engine.arch import load_spec
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.llm import LLM
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.request import SamplingParams
from kvasir.engine.spec import Linear, QueryScale, Yarn
from kvasir.engine.weights import load_decoder

Make = Callable[..., tuple[Path, Any]]
PROMPTS = [[random.Random(n).randrange(97) for _ in range(n)] for n in (70, 33)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def test_yarn_by_flag(checkpoint: Make, in_chunks: Any) -> None:
    """The context grows by the factor, and the model is the one whose config.json says the same."""
    folder = checkpoint("Llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})[0]
    _, model = checkpoint("Llama", rope_parameters={**YARN, "rope_theta": 5e5}, max_position_embeddings=1024)
    spec = load_spec(ModelFiles(EngineConfig(model=str(folder), rope_scaling=YARN)).config)
    assert spec.max_len == 1024
    decoder = load_decoder(folder, spec, dtype=torch.float32, device=torch.device("cpu"))
    for prompt, got in zip(PROMPTS, in_chunks(decoder, PROMPTS, 16, seed=1), strict=True):
        with torch.no_grad():
            assert (got - model(torch.tensor([prompt])).logits[0]).abs().max() <= 1e-4


def test_other_changes(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2, "hidden_size": 64}, "x": {"a": 1, "b": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read(**options: Any) -> dict[str, Any]:
        return ModelFiles(EngineConfig(model=str(tmp_path), **options)).config

    assert read(hf_overrides={"x": {"b": 3}, "y": 4})["x"] == {"a": 1, "b": 3}
    assert read(rope_theta=1e6)["text_config"]["rope_theta"] == 1e6
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    rope = load_spec(read(rope_scaling=YARN, rope_theta=2e4)).layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, Yarn)
    assert rope.theta == 2e4


LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def test_several_ropes_can_t_be_scaled_by_one_flag(tmp_path: Path) -> None:
    ropes = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": ropes}))
    with pytest.raises(ConfigError, match="several ropes; use --hf-overrides"):
        _ = ModelFiles(EngineConfig(model=str(tmp_path), rope_theta=1e6)).config


def test_gemma_s_sliding_layers_keep_their_rope(tmp_path: Path) -> None:
    """In files that give the full layers' scaling alone, and the sliding ones' theta apart."""
    config = {**LLAMA, "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 8}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "layer_types": ["sliding_attention", "full_attention"]})
    )

    def ropes(**options: Any) -> list[Any]:
        layers = load_spec(ModelFiles(EngineConfig(model=str(tmp_path), **options)).config).layers
        return [layer.rope and (layer.rope.theta, layer.rope.scaling) for layer in layers]

    assert ropes() == [(1e4, None), (1e6, None)]
    assert ropes(rope_theta=5e5) == [(1e4, None), (5e5, None)]
    linear = {"rope_type": "linear", "factor": 8.0}
    assert ropes(rope_scaling=linear) == [(1e4, None), (1e6, Linear(8.0))]


@pytest.mark.parametrize("model_type", ["dbrx", "internlm", "qwen"])
def test_flags_win_over_ropes_of_another_spelling(model_type: str, tmp_path: Path) -> None:
    own = {
        "dbrx": {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "attn_config": {"rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
        },
        "internlm": {"rotary": {"base": 1e4, "type": "dynamic", "scaling_factor": 2.0}},
        "qwen": {"use_dynamic_ntk": True, "seq_length": 64, "rotary_emb_base": 1e4},
    }
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **own[model_type], "model_type": model_type}))
    linear = {"rope_type": "linear", "factor": 8.0}
    options: dict[str, Any] = {"model": str(tmp_path), "rope_theta": 3e4, "rope_scaling": linear}
    rope = load_spec(ModelFiles(EngineConfig(**options)).config).layers[0].rope
    assert rope is not None
    assert (rope.theta, rope.scaling) == (3e4, Linear(8.0))


@pytest.mark.parametrize("option", [{"rope_theta": 1e6}, {"rope_scaling": YARN}])
def test_a_model_without_rope_refuses_flags_of_it(option: dict[str, Any], tmp_path: Path) -> None:
    shape = {"vocab_size": 97, "n_embd": 64, "n_head": 4, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    with pytest.raises(ConfigError, match=r"--rope-.*no rotary positions"):
        LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **option)


def test_ministral_3_by_params_json(tmp_path: Path) -> None:
    """Mistral's own layout says it as config.json does."""
    shape = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "rope_theta": 1e6}
    scale = {"original_max_position_embeddings": 32, "beta": 0.1}
    (tmp_path / "params.json").write_text(json.dumps({**shape, "llama_4_scaling": scale}))
    (layer, _) = load_spec(ModelFiles(EngineConfig(model=str(tmp_path))).config).layers
    assert layer.query_scale == QueryScale("floor", 32, 0.1, first=0)
    yarn = {"factor": 16, "original_max_position_embeddings": 64}
    (tmp_path / "params.json").write_text(json.dumps({**shape, "llama_4_scaling": scale, "yarn": yarn}))
    with pytest.raises(ConfigError, match="same original_max_position_embeddings"):
        _ = ModelFiles(EngineConfig(model=str(tmp_path))).config


@pytest.mark.parametrize(
    ("inner", "outer", "prefix"),
    [
        ("Gemma3Text", "gemma3", "language_model.model."),
        ("Gemma3Text", "gemma3", "model.language_model."),
        ("Mistral", "mistral3", "language_model.model."),
        ("Llama4Text", "llama4", "language_model.model."),
    ],
)
def test_the_text_model_of_one_that_also_sees(
    inner: str, outer: str, prefix: str, checkpoint: Make, tmp_path: Path, in_chunks: Any
) -> None:
    shape = {"head_dim": 16, "pad_token_id": 0} if inner != "Mistral" else {"sliding_window": None}
    folder, model = checkpoint(inner, norm=0.0 if inner == "Gemma3Text" else 1.0, **shape)
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": outer, "architectures": ["X"], "text_config": config, "vision_config": {}}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[prefix + name.removeprefix("model.") if name.startswith("model.") else f"language_model.{name}"] = (
            tensor
        )
    tensors |= {"vision_tower.x.weight": torch.ones(1), "multi_modal_projector.y": torch.ones(1)}
    tensors |= {"vision_model.z": torch.ones(1)} if outer == "llama4" else {}
    if outer == "llama4":
        del tensors["vision_tower.x.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    decoder = load_decoder(tmp_path, load_spec(whole), dtype=torch.float32, device=torch.device("cpu"))
    for prompt, got in zip(PROMPTS, in_chunks(decoder, PROMPTS, 16, seed=1), strict=True):
        with torch.no_grad():
            assert (got - model(torch.tensor([prompt])).logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_queue": 0}, "--max-queue must be at least 1"),
        ({"max_num_seqs": 1.5}, "--max-num-seqs must be a whole number"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32"),
        ({"load_format": "tensorizer"}, "--load-format must be one of auto"),
        ({"rope_scaling": "yarn"}, "--rope-scaling must be a JSON object"),
        ({"gpu_memory_utilization": 0}, "--gpu-memory-utilization must be above 0"),
    ],
)
def test_options_are_checked_in_process_too(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM("skald", **options)


def test_dummy_weights(tmp_path: Path) -> None:
    """Random ones by the seed, without a file of weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 22}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def said(seed: int) -> list[int]:
        with LLM(str(tmp_path), seed=seed, **options) as llm:
            return list(llm.generate([[1, 2, 3]], sampling, use_tqdm=False)[0].outputs[0].token_ids)

    assert said(1) == said(1)


def test_the_token_is_never_shown() -> None:
    assert "hf_secret" not in repr(EngineConfig(hf_token="hf_secret"))
