"""Families that transformers has no class of its own for. Where one is a relative of another family, the relative's
checkpoint is renamed and fused as the family stores it, and the relative's logits are the truth; otherwise the truth is
a reference of a few lines, from the paper and the published configuration."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.mesh import Mesh
from kvasir.engine.rope import stretched_turning, turning
from kvasir.engine.share import share_of
from kvasir.engine.spec import Rope, Spec
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")
PROMPTS = [[random.Random(n).randrange(3, 97) for _ in range(n)] for n in (70, 1, 33, 16)]
Tensors = dict[str, Tensor]


def written(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Spec:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return load_spec(config)


def loaded(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Decoder:
    return load_decoder(folder, written(folder, config, tensors), dtype=torch.float32, device=CPU)


def config_of(folder: Path, model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {**read, "model_type": model_type, "architectures": [architecture], **changes}


def internlm(folder: Path) -> tuple[dict[str, Any], Tensors]:
    changes = {"bias": True, "rotary": {"base": 10000, "type": "dynamic"}}
    return config_of(folder, "internlm", "InternLMForCausalLM", **changes), load_file(folder / "model.safetensors")


def internlm2(folder: Path) -> tuple[dict[str, Any], Tensors]:
    renamed = {
        "model.embed_tokens.": "model.tok_embeddings.",
        "lm_head.": "output.",
        ".self_attn.o_proj.": ".attention.wo.",
        ".mlp.gate_proj.": ".feed_forward.w1.",
        ".mlp.up_proj.": ".feed_forward.w3.",
        ".mlp.down_proj.": ".feed_forward.w2.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
    }
    tensors = load_file(folder / "model.safetensors")
    out: Tensors = {}
    for layer in range(3):
        q, k, v = (tensors.pop(f"model.layers.{layer}.self_attn.{p}_proj.weight") for p in "qkv")
        groups = (q.view(2, 2, 16, 64), k.view(2, 1, 16, 64), v.view(2, 1, 16, 64))
        out[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(groups, 1).reshape(128, 64)
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = tensor
    return config_of(folder, "internlm2", "InternLM2ForCausalLM", bias=False), out


def qwen(folder: Path) -> tuple[dict[str, Any], Tensors]:
    renamed = {
        "model.embed_tokens.": "transformer.wte.",
        "model.layers.": "transformer.h.",
        "model.norm.": "transformer.ln_f.",
        ".self_attn.o_proj.": ".attn.c_proj.",
        ".mlp.gate_proj.": ".mlp.w2.",
        ".mlp.up_proj.": ".mlp.w1.",
        ".mlp.down_proj.": ".mlp.c_proj.",
        ".input_layernorm.": ".ln_1.",
        ".post_attention_layernorm.": ".ln_2.",
    }
    tensors = load_file(folder / "model.safetensors")
    out: Tensors = {}
    for layer in range(3):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"model.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            out[f"transformer.h.{layer}.attn.c_attn.{kind}"] = torch.cat(parts)
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = tensor
    return QWEN, out


QWEN = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 256,
    "max_position_embeddings": 1024,
    "kv_channels": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
}


def minicpm(folder: Path) -> tuple[dict[str, Any], Tensors]:
    scales = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 32, "tie_word_embeddings": False}
    return config_of(folder, "minicpm", "MiniCPMForCausalLM", **scales), load_file(folder / "model.safetensors")


MINICPM = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 1.4 / math.sqrt(3),
    "attention_multiplier": 16**-0.5,
    "logits_scaling": 2.0,
}
RELATIVES: dict[str, tuple[Callable[[Path], tuple[dict[str, Any], Tensors]], str, dict[str, Any]]] = {
    "internlm": (internlm, "Llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "internlm2": (internlm2, "Llama", {}),
    "qwen": (qwen, "Qwen2", {"num_key_value_heads": 4}),
    "minicpm": (minicpm, "Granite", MINICPM),
}


@pytest.mark.parametrize("family", RELATIVES)
def test_equals_its_relative(
    family: str, checkpoint: Callable[..., tuple[Path, Any]], tmp_path: Path, in_chunks: Any
) -> None:
    rename, relative, changes = RELATIVES[family]
    folder, model = checkpoint(relative, **changes)
    decoder = loaded(tmp_path, *rename(folder))
    for prompt, got in zip(PROMPTS, in_chunks(decoder, PROMPTS, 3, seed=1), strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).logits[0]
        assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("family", RELATIVES)
def test_equals_its_relative_on_ranks(
    family: str, checkpoint: Callable[..., tuple[Path, Any]], tmp_path: Path, in_chunks: Any, on_ranks: Any
) -> None:
    rename, relative, changes = RELATIVES[family]
    folder, model = checkpoint(relative, **changes)
    with torch.no_grad():
        wanted = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    compare(on_ranks(3, 2, shares(tmp_path, written(tmp_path, *rename(folder)), in_chunks))[3], wanted)


def shares(folder: Path, spec: Spec, in_chunks: Any) -> Callable[[Mesh], list[Tensor]]:
    """What a rank of a mesh computes of the prompts."""

    def work(mesh: Mesh) -> list[Tensor]:
        decoder = load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=share_of(spec, mesh))
        found: list[Tensor] = in_chunks(decoder, PROMPTS, 3, seed=1)
        return found

    return work


def compare(found: list[Tensor], wanted: list[Tensor]) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-4


def test_qwen_beyond_its_training(tmp_path: Path, in_chunks: Any, checkpoint: Callable[..., tuple[Path, Any]]) -> None:
    """From position `seq_length` on queries grow as log_seq_length(position + 1): sharper scores, nothing else."""
    folder, model = checkpoint("Qwen2", num_key_value_heads=4)
    config, tensors = qwen(folder)
    decoder = loaded(tmp_path, {**config, "seq_length": 20, "use_dynamic_ntk": False}, tensors)
    factors = torch.tensor([max(1.0, math.log(p + 1, 20)) for p in range(70)])
    for layer in model.model.layers:
        old = layer.self_attn.q_proj.forward
        layer.self_attn.q_proj.forward = lambda x, old=old: old(x) * factors[None, : x.shape[1], None]
    with torch.no_grad():
        want = model(torch.tensor(PROMPTS[:1])).logits[0]
    assert (in_chunks(decoder, PROMPTS[:1], 16, seed=2)[0] - want).abs().max() <= 1e-4


@pytest.mark.parametrize("longest", [300, 512, 700, 1024])
def test_qwens_theta_grows_by_doublings(longest: int) -> None:
    """As its own code has it: by 2 ** ceil(log2(length / seq_length) + 1) - 1."""
    rope = load_spec({**QWEN, "use_dynamic_ntk": True}).layers[0].rope
    assert rope is not None
    alpha = 2 ** math.ceil(math.log2(longest / 256) + 1) - 1
    plain = turning(Rope(1e4 * alpha ** (16 / 14), 16))
    assert torch.equal(stretched_turning(rope, longest).frequencies, plain.frequencies)


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    torch.manual_seed(0)
    norms = ("norm", "LayerNorm")
    return {
        name: torch.randn(shape) * 0.2 + (any(n in name for n in norms) and name.endswith("weight"))
        for name, shape in shapes.items()
    }


PHI = {
    "model_type": "phi3small",
    "architectures": ["Phi3SmallForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "ff_intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "rope_embedding_base": 1e6,
    "gegelu_limit": 2.0,
    "dense_attention_every_n_layers": 2,
    "blocksparse_block_size": 4,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 8,
}


def phi_small(w: Tensors, ids: list[int]) -> Tensor:
    """Phi-3-small (arXiv:2404.14219, 2): muP factors, clamped GEGLU, block-sparse attention in the odd layers."""
    n, heads, kv, dim = len(ids), 8, 4, 8
    x = w["model.embed_tokens.weight"][ids] * 10.0
    position = torch.arange(n)
    turns = position[:, None] * 1e6 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = torch.cat((turns, turns), -1).cos(), torch.cat((turns, turns), -1).sin()
    block = position // 4
    for i in range(4):

        def norm(x: Tensor, name: str, i: int = i) -> Tensor:
            stem = f"model.layers.{i}.{name}"
            return F.layer_norm(x, (64,), w[f"{stem}.weight"], w[f"{stem}.bias"], 1e-5)

        def linear(x: Tensor, name: str, i: int = i) -> Tensor:
            stem = f"model.layers.{i}.{name}"
            return F.linear(x, w[f"{stem}.weight"], w[f"{stem}.bias"])

        qkv = linear(norm(x, "input_layernorm"), "self_attn.query_key_value").view(n, kv, heads // kv + 2, dim)
        q, k, v = qkv[:, :, :-2].reshape(n, heads, dim), qkv[:, :, -2], qkv[:, :, -1]
        half = dim // 2
        q, k = (t * cos[:, None] + torch.cat((-t[..., half:], t[..., :half]), -1) * sin[:, None] for t in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim
        seen = (position[:, None] >= position).expand(heads, n, n)
        if (i + 1) % 2:
            near = block[:, None] - block < 2
            stride = (block + torch.arange(heads)[:, None, None] + 1) % 8 == 0
            seen = seen & (near | stride)
        y = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).reshape(n, -1)
        x = x + linear(y, "self_attn.dense")
        both = linear(norm(x, "post_attention_layernorm"), "mlp.up_proj")
        gate, up = both[:, ::2].clamp(max=2.0), both[:, 1::2].clamp(-2.0, 2.0)
        x = x + linear(gate * torch.sigmoid(1.702 * gate) * (up + 1), "mlp.down_proj")
    x = F.layer_norm(x, (64,), w["model.final_layernorm.weight"], w["model.final_layernorm.bias"], 1e-5)
    return x @ w["model.embed_tokens.weight"].T / 8.0


def test_phi3_small(tmp_path: Path, in_chunks: Any, on_ranks: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (97, 64)}
    for i in range(4):
        linears = {"self_attn.query_key_value": (128, 64), "self_attn.dense": (64, 64), "mlp.up_proj": (96, 64)}
        for name, shape in {**linears, "mlp.down_proj": (64, 48)}.items():
            shapes |= {f"model.layers.{i}.{name}.weight": shape, f"model.layers.{i}.{name}.bias": shape[:1]}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"model.layers.{i}.{name}.{kind}": (64,) for kind in ("weight", "bias")}
    shapes |= {f"model.final_layernorm.{kind}": (64,) for kind in ("weight", "bias")}
    tensors = random_tensors(shapes)
    wanted = [phi_small(tensors, prompt) for prompt in PROMPTS]
    compare(in_chunks(loaded(tmp_path, PHI, tensors), PROMPTS, 3, seed=1), wanted)
    compare(on_ranks(3, 2, shares(tmp_path, load_spec(PHI), in_chunks))[3], wanted)


JINA = {
    "model_type": "bert",
    "architectures": ["JinaBertForMaskedLM"],
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def jina(w: Tensors, ids: list[int]) -> Tensor:
    """Jina Embeddings 2 (arXiv:2310.19923, 3): BERT with distances instead of positions, to both sides, and GEGLU."""
    n, heads, dim = len(ids), 6, 8

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (48,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    for i in range(2):
        stem = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{stem}.attention.self.{p}").view(n, heads, dim) for p in ("query", "key", "value"))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim) - slopes[:, None, None] * distance
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)
        x = norm(x + linear(y, f"{stem}.attention.output.dense"), f"{stem}.attention.output.LayerNorm")
        gate, up = F.linear(x, w[f"{stem}.mlp.gated_layers.weight"]).chunk(2, -1)
        x = norm(x + linear(F.gelu(gate) * up, f"{stem}.mlp.wo"), f"{stem}.mlp.layernorm")
    return x


def test_jina_v2(tmp_path: Path, ragged: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (97, 48),
        "embeddings.token_type_embeddings.weight": (2, 48),
        "pooler.dense.weight": (48, 48),
        "cls.predictions.bias": (97,),
    }
    for i in range(2):
        stem = f"encoder.layer.{i}"
        linears = {f"attention.self.{p}": (48, 48) for p in ("query", "key", "value")}
        for name, shape in {**linears, "attention.output.dense": (48, 48), "mlp.wo": (48, 40)}.items():
            shapes |= {f"{stem}.{name}.weight": shape, f"{stem}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{stem}.{name}.{kind}": (48,) for kind in ("weight", "bias")}
        shapes[f"{stem}.mlp.gated_layers.weight"] = (80, 48)
    shapes |= {f"embeddings.LayerNorm.{kind}": (48,) for kind in ("weight", "bias")}
    tensors = random_tensors(shapes)
    decoder = loaded(tmp_path, JINA, tensors)
    cache = KVCache(decoder.spec, 10, 16, torch.float32, CPU)
    step = ragged([([1, 2, 3, 4, 5], 0, 70), ([6, 7, 8], 0, 33)], 16)
    got = decoder.hidden(torch.tensor(PROMPTS[0] + PROMPTS[2]), step, cache)
    want = torch.cat((jina(tensors, PROMPTS[0]), jina(tensors, PROMPTS[2])))
    assert (got - want).abs().max() <= 1e-4
