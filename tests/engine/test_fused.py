"""Tensors that hold several are taken apart only where they have the shape that config.json gives them."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import open_checkpoint
from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Experts, Spec

SPEC = load_spec({
    "model_type": "llama", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
})  # fmt: skip
FUSED = {
    ("bert", "layer.0.mlp.gated_layers.weight"): (40, 24),
    ("dbrx", "blocks.0.Wqkv.weight"): (80, 24),
    ("dbrx", "blocks.0.ffn.experts.mlp.w1"): (48, 24),
    ("dbrx", "blocks.0.ffn.experts.mlp.w2"): (48, 24),
    ("falcon", "h.0.query_key_value.weight"): (80, 24),
    ("falcon", "h.0.query_key_value.bias"): (80,),
    ("gpt2", "h.0.attn.c_attn.weight"): (24, 80),
    ("gpt2", "h.0.attn.c_attn.bias"): (80,),
    ("internlm2", "layers.0.attention.wqkv.weight"): (80, 24),
    ("jina_embeddings_v3", "layers.0.mixer.Wqkv.parametrizations.weight.original"): (80, 24),
    ("llama4_text", "layers.0.feed_forward.experts.gate_up_proj"): (3, 24, 32),
    ("llama4_text", "layers.0.feed_forward.experts.down_proj"): (3, 16, 24),
    ("nomic_bert", "layers.0.attn.Wqkv.weight"): (80, 24),
    ("phi3", "layers.0.self_attn.qkv_proj.weight"): (80, 24),
    ("phi3", "layers.0.mlp.gate_up_proj.weight"): (40, 24),
    ("phi3small", "layers.0.self_attn.query_key_value.weight"): (80, 24),
    ("phi3small", "layers.0.mlp.up_proj.weight"): (40, 24),
    ("phi3small", "layers.0.mlp.up_proj.bias"): (40,),
    ("qwen", "h.0.attn.c_attn.weight"): (80, 24),
}


@pytest.mark.parametrize(("family", "name"), FUSED)
def test_a_fused_tensor_of_another_shape_is_refused(family: str, name: str, tmp_path: Path) -> None:
    """With the shape that the file has, not that of a part; a shape of as many numbers as well."""
    right = FUSED[family, name]
    spec = replace(SPEC, experts=Experts(3, 2, 16), split=import_module(f"kvasir.engine.arch.{family}").split)
    parts = opened(tmp_path, name, right, spec)
    assert sum(torch.Size(part).numel() for part in parts) == torch.Size(right).numel()
    wider = [tuple(n + (n // 2 if dim == at else 0) for at, n in enumerate(right)) for dim in range(len(right))]
    for wrong in (*wider, right[::-1], (1, *right)):
        if wrong == right:
            continue
        with pytest.raises(ConfigError) as refused:
            opened(tmp_path, name, wrong, spec)
        assert str(refused.value) == f"{name} has shape {list(wrong)}, config.json says {list(right)}"


def test_one_upon_the_other_with_a_single_kv_head(tmp_path: Path) -> None:
    """Falcon's other layout."""
    spec = replace(SPEC, kv_heads=1, split=import_module("kvasir.engine.arch.falcon").split)
    assert opened(tmp_path, "h.0.query_key_value.weight", (64, 24), spec) == [(48, 24), (8, 24), (8, 24)]
    with pytest.raises(ConfigError, match=r"has shape \[80, 24\], config.json says \[64, 24\]"):
        opened(tmp_path, "h.0.query_key_value.weight", (80, 24), spec)


def opened(folder: Path, name: str, shape: tuple[int, ...], spec: Spec) -> list[tuple[int, ...]]:
    """Shapes of the parts."""
    save_file({name: torch.zeros(shape)}, folder / "model.safetensors")
    return [filler.shape for filler in open_checkpoint(folder).tensors(spec)]
