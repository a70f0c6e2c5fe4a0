"""GGUF files of families that transformers has no class for, of older converters, and quantised ones: what was written
comes back."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fuzzing import examples
from gguf import GGMLQuantizationType as Q
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvasir.engine import gguf_checkpoint
from kvasir.engine.arch import load_spec
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import BlockType
from kvasir.engine.gguf_blocks import fill
from kvasir.engine.gguf_checkpoint import GGUFCheckpoint
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.rope import turning
from kvasir.engine.share import Cut, share_of
from kvasir.engine.spec import LongRope, Spec
from kvasir.engine.weights import random_decoder

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
Arrange = Callable[[Tensors, Spec], Tensors]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
OURS = {
    "embed": "token_embd",
    "embed_norm": "token_embd_norm",
    "norm": "output_norm",
    "head": "output",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "attn.q_a": "attn_q_a",
    "attn.q_a_norm": "attn_q_a_norm",
    "attn.q_b": "attn_q_b",
    "attn.kv_a": "attn_kv_a_mqa",
    "attn.kv_a_norm": "attn_kv_a_norm",
    "attn.kv_b": "attn_kv_b",
    "mlp.choice_bias": "exp_probs_b.bias",
}


def theirs(name: str) -> str:
    """llama.cpp's name for one of ours."""
    stem, _, suffix = name.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.(.*)", stem if suffix in ("weight", "bias") else name)
    part = block[2] if block else stem
    found = re.sub(r"mlp\.experts\.(\d+)\.(\w+)", r"ffn_\2.\1", part)
    found = re.sub(r"mlp\.shared\.(\w+)", r"ffn_\1_shexp", found)
    ending = f".{suffix}" if suffix in ("weight", "bias") else ""
    return (f"blk.{block[1]}." if block else "") + OURS.get(found, found) + ending


def permuted(tensors: Tensors, spec: Spec) -> Tensors:
    out = dict(tensors)
    for name, w in tensors.items():
        if found := re.search(r"attn_([qk])\.", name):
            heads = spec.heads if found[1] == "q" else spec.kv_heads
            out[name] = w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    return out


def fused(*parts: str, into: str) -> Arrange:
    """These tensors of each block, one upon the other."""

    def arrange(tensors: Tensors, spec: Spec) -> Tensors:
        out = {name: w for name, w in tensors.items() if not any(f".{part}." in name for part in parts)}
        for name in [name for name in tensors if f".{parts[0]}." in name]:
            out[name.replace(parts[0], into)] = torch.cat([tensors[name.replace(parts[0], p)] for p in parts])
        return out

    return arrange


def fused_permuted(tensors: Tensors, spec: Spec) -> Tensors:
    return fused("attn_q", "attn_k", "attn_v", into="attn_qkv")(permuted(tensors, spec), spec)


def fused_experts(tensors: Tensors, spec: Spec) -> Tensors:
    """All experts in one tensor, gate and up in one, too: what `--fuse-gate-up-exps` writes."""
    out = {name: w for name, w in tensors.items() if not re.search(r"ffn_\w+\.\d+\.weight", name)}
    for block in range(2):
        stacks = {
            part: torch.stack([tensors[f"blk.{block}.ffn_{part}.{e}.weight"] for e in range(4)])
            for part in ("gate", "up", "down")
        }
        out[f"blk.{block}.ffn_gate_up_exps.weight"] = torch.cat([stacks["gate"], stacks["up"]], 1)
        out[f"blk.{block}.ffn_down_exps.weight"] = stacks["down"]
    return permuted(out, spec)


def halved_latent(tensors: Tensors, spec: Spec) -> Tensors:
    """kv_b as its halves, that of the keys transposed: files since 2025."""
    assert spec.latent
    out = {name: w for name, w in tensors.items() if "attn_kv_b" not in name}
    for name in tensors.keys() - out.keys():
        heads = tensors[name].view(spec.heads, -1, spec.latent.kv_rank)
        out[name.replace("kv_b", "k_b")] = heads[:, : spec.latent.nope_dim].transpose(1, 2)
        out[name.replace("kv_b", "v_b")] = heads[:, spec.latent.nope_dim :]
    return out


def encoder(tensors: Tensors, spec: Spec) -> Tensors:
    names = {".attn_norm.": ".attn_output_norm.", ".ffn_norm.": ".layer_output_norm."}
    return {re.sub(r"\.attn_norm\.|\.ffn_norm\.", lambda m: names[m[0]], name): w for name, w in tensors.items()}


def encoder_fused(tensors: Tensors, spec: Spec) -> Tensors:
    return fused("ffn_gate", "ffn_up", into="ffn_up")(encoder(tensors, spec), spec)


def extra_blocks(tensors: Tensors, spec: Spec) -> Tensors:
    """A head that predicts further tokens, in the block after the last, and old files' tables of the rope."""
    return permuted(tensors, spec) | {
        "blk.2.nextn.eh_proj.weight": torch.zeros(64, 128),
        "blk.2.attn_norm.weight": torch.zeros(64),
    }


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "norm_topk_prob": False,
}
LATENT_KEYS = {
    **EXPERT_KEYS,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "rope.dimension_count": 8,
    "leading_dense_block_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
}
ENCODER_KEYS = {"attention.causal": False, "attention.layer_norm_epsilon": 1e-12, "attention.head_count_kv": 4}
JINA = {
    "model_type": "bert",
    "architectures": ["JinaBertModel"],
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
}
SCALES = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 32}
SCALE_KEYS = {"embedding_scale": 12.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 2.0}
QWEN = {"layer_norm_epsilon": 1e-6, "seq_length": 256, "intermediate_size": 256}
# name -> general.architecture, config.json, metadata, how the tensors lie
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Arrange]] = {
    "internlm2": ("internlm2", {"model_type": "internlm2", "bias": False}, {}, permuted),
    "internlm3": ("llama", {"model_type": "internlm3", "qkv_bias": True}, {}, permuted),
    "minicpm": ("minicpm", {"model_type": "minicpm", **SCALES, "tie_word_embeddings": False}, SCALE_KEYS, permuted),
    "minicpm-old": ("minicpm", {"model_type": "minicpm", **SCALES, "dim_model_base": 256}, {}, permuted),
    "qwen": (
        "qwen",
        {"model_type": "qwen", **QWEN, "num_key_value_heads": 4},
        {"feed_forward_length": 256, "attention.head_count_kv": 4},
        fused("attn_q", "attn_k", "attn_v", into="attn_qkv"),
    ),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 9}, {"attention.sliding_window": 9}, permuted),
    "mistral3": ("mistral3", {"model_type": "llama"}, {}, permuted),
    "ministral3-plain-rope": (
        "mistral3",
        {"model_type": "mistral", "rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0.125}},
        {"attention.temperature_scale": 0.125},
        permuted,
    ),
    "llama-fused": ("llama", {"model_type": "llama"}, {}, fused_permuted),
    "mixtral-2023": ("llama", {"model_type": "mixtral", **EXPERTS}, EXPERT_KEYS, permuted),
    "mixtral-fused": ("llama", {"model_type": "mixtral", **EXPERTS}, EXPERT_KEYS, fused_experts),
    "further-heads": ("llama", {"model_type": "llama"}, {"block_count": 3, "nextn_predict_layers": 1}, extra_blocks),
    "deepseek-2024": (
        "deepseek2",
        {"model_type": "deepseek_v2", **LATENT, "num_key_value_heads": 4},
        LATENT_KEYS,
        lambda tensors, spec: tensors,
    ),
    "deepseek-2025": (
        "deepseek2",
        {"model_type": "deepseek_v2", **LATENT, "qk_nope_head_dim": 32, "num_key_value_heads": 4},
        {**LATENT_KEYS, "attention.key_length": 40},
        halved_latent,
    ),
    "jina-v2": ("jina-bert-v2", JINA, ENCODER_KEYS, encoder_fused),
    "jina-v2-split": ("jina-bert-v2", JINA, ENCODER_KEYS, encoder),
}


def write(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Tensors, kind: Q = Q.F32, **whole: Any
) -> GGUFCheckpoint:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in [*((f"{arch}.{key}", value) for key, value in metadata.items()), *whole.items()]:
        add: Mapping[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_int64,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        own = kind if tensor.dim() > 1 else Q.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFCheckpoint(path)


def stored(spec: Spec, arrange: Arrange) -> tuple[Tensors, Tensors]:
    """(random tensors by our names, the same as the file has them)."""
    places = dict(random_decoder(spec, torch.float32, CPU, pack=False).places())
    for name, place in places.items():
        place.copy_(torch.randn(place.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    named = {theirs(name): place for name, place in places.items()}
    return places, arrange(named, spec)


def loaded(checkpoint: GGUFCheckpoint, spec: Spec, dtype: torch.dtype = torch.float32) -> Tensors:
    places = dict(Decoder(spec, dtype, CPU).places())
    fillers = list(checkpoint.tensors(spec))
    assert sorted(filler.name for filler in fillers) == sorted(places)
    for filler in fillers:
        filler.copy_to(places[filler.name])
    return places


@pytest.mark.parametrize("case", CASES)
def test_what_was_written_comes_back(case: str, tmp_path: Path) -> None:
    arch, config, keys, arrange = CASES[case]
    expected_spec = load_spec({**SIZES, **config})
    expected, tensors = stored(expected_spec, arrange)
    checkpoint = write(tmp_path / "model.gguf", arch, {**KEYS, **keys}, tensors)
    spec = load_spec(checkpoint.config())
    for fact in (
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "latent",
        "qkv_bias",
        "o_bias",
        "alibi",
        "tied",
        "gated",
    ):
        assert getattr(spec, fact) == getattr(expected_spec, fact), fact
    for fact in ("embed_scale", "residual_scale", "logit_scale", "eps"):
        assert getattr(spec, fact) == pytest.approx(getattr(expected_spec, fact), rel=1e-6), fact
    for name, tensor in loaded(checkpoint, spec).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised(kind: Q, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows of q and k go back to their places whole, so that blocks stay as they are."""
    spec = load_spec({**SIZES, "model_type": "llama"})
    expected, tensors = stored(spec, permuted)
    checkpoint = write(tmp_path / "model.gguf", "llama", KEYS, tensors, kind)
    assert checkpoint.config()["torch_dtype"] == ("float16" if kind is Q.F16 else "bfloat16")
    assert checkpoint.total_bytes == sum(filler.nbytes for filler in checkpoint.tensors(spec))
    for name, tensor in loaded(checkpoint, spec, dtype).items():
        own = kind if tensor.dim() > 1 else Q.F32
        exact = gguf.quants.dequantize(gguf.quants.quantize(expected[name].numpy(), own), own)
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(exact)).to(dtype)), name


@pytest.mark.parametrize(
    ("case", "kind"),
    [("llama-fused", Q.Q8_0), ("internlm3", Q.F16), ("mixtral-fused", Q.Q4_0), ("deepseek-2025", Q.Q8_0)],
)
def test_any_cut(case: str, kind: Q, tmp_path: Path) -> None:
    """Within blocks and heads, too."""
    arch, config, keys, arrange = CASES[case]
    tensors = stored(load_spec({**SIZES, **config}), arrange)[1]
    checkpoint = write(tmp_path / "model.gguf", arch, {**KEYS, **keys}, tensors, kind)
    rng = random.Random(0)
    for filler in checkpoint.tensors(load_spec(checkpoint.config())):
        whole = torch.empty(filler.shape)
        filler.copy_to(whole)
        for dim, length in enumerate(filler.shape):
            start, stop = sorted(rng.sample(range(length + 1), 2))
            place = torch.empty_like(whole.narrow(dim, start, stop - start))
            filler.copy_to(place, Cut(dim, range(start, stop)))
            assert torch.equal(place, whole.narrow(dim, start, stop - start)), (filler.name, dim, start, stop)


@pytest.mark.parametrize("case", ["mistral", "mixtral-fused", "deepseek-2025"])
def test_no_number_is_dequantised_for_others(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, rows and columns of two ranks; all that they have both is each one's own."""
    arch, config, keys, arrange = CASES[case]
    tensors = stored(load_spec({**SIZES, **config}), arrange)[1]
    checkpoint = write(tmp_path / "model.gguf", arch, {**KEYS, **keys}, tensors, Q.Q8_0)
    spec = load_spec(checkpoint.config())
    made: list[int] = []

    def noted(place: Tensor, rows: Tensor, kind: BlockType) -> None:
        made.append(place.numel())
        fill(place, rows, kind)

    monkeypatch.setattr(gguf_checkpoint, "fill", noted)
    for rank in range(2):
        made.clear()
        places = dict(Decoder(spec, torch.float32, CPU, own := share_of(spec, Mesh(Place(2, 1, rank)))).places())
        for filler in checkpoint.tensors(spec):
            filler.copy_to(places[filler.name], own.cut(filler.name))
        assert sum(made) == sum(place.numel() for place in places.values())


def test_norm_offsets_are_taken_off_before_rounding(tmp_path: Path) -> None:
    """1 + w rounded to bfloat16 would have lost w's last bits."""
    spec = load_spec({**SIZES, "model_type": "gemma", "head_dim": 16})
    expected, tensors = stored(spec, lambda tensors, spec: dict(tensors))
    shifted = {name: w + 1 if "norm" in name else w for name, w in tensors.items()}
    shifted.pop("output.weight", None)
    checkpoint = write(tmp_path / "model.gguf", "gemma", KEYS, shifted)
    loaded_norm = loaded(checkpoint, load_spec(checkpoint.config()), torch.bfloat16)["norm.weight"]
    assert torch.equal(loaded_norm, (expected["norm.weight"] + 1 - 1).bfloat16())


def test_divisors_of_no_known_scaling(tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "llama"})
    divisors = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 7.0, 9.0])
    tensors = stored(spec, permuted)[1] | {"rope_freqs.weight": divisors}
    read = load_spec(write(tmp_path / "model.gguf", "llama", KEYS, tensors).config())
    plain, scaled = spec.layers[0].rope, read.layers[0].rope
    assert plain is not None
    assert scaled is not None
    assert isinstance(scaled.scaling, LongRope)
    assert turning(scaled).magnitude == 1
    torch.testing.assert_close(turning(scaled).frequencies, turning(plain).frequencies / divisors)


def test_what_llama_cpp_does_not_name_keeps_its_name(tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "llama"})
    tensors = stored(spec, permuted)[1] | {"blk.1.ssm_in.weight": torch.zeros(4, 4), "v.patch": torch.zeros(4)}
    names = {filler.name for filler in write(tmp_path / "model.gguf", "llama", KEYS, tensors).tensors(spec)}
    assert {"blk.1.ssm_in.weight", "v.patch"} < names


def test_a_place_of_another_shape(tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "llama"})
    checkpoint = write(tmp_path / "model.gguf", "llama", KEYS, stored(spec, permuted)[1])
    filler = next(filler for filler in checkpoint.tensors(spec) if filler.name == "norm.weight")
    with pytest.raises(ConfigError, match=r"output_norm.weight has shape \[64\], the model needs \[32\]"):
        filler.copy_to(torch.empty(32))


@pytest.mark.parametrize(
    ("case", "name", "rows"),
    [("llama-fused", "attn_qkv", 128), ("qwen", "attn_qkv", 192), ("mixtral-fused", "ffn_gate_up_exps", 256)],
)
def test_a_fused_tensor_of_another_shape(case: str, name: str, rows: int, tmp_path: Path) -> None:
    """A row more than its parts have together, which none of them would miss."""
    arch, config, keys, arrange = CASES[case]
    name, (_, tensors) = f"blk.0.{name}.weight", stored(load_spec({**SIZES, **config}), arrange)
    tensors[name] = torch.cat((tensors[name], tensors[name][..., :1, :]), -2)
    checkpoint = write(tmp_path / "model.gguf", arch, {**KEYS, **keys}, tensors)
    said = rf"{name} has shape \[{rows + 1}, 64\], config.json says \[{rows}, 64\]"
    with pytest.raises(ConfigError, match=said):
        list(checkpoint.tensors(load_spec(checkpoint.config())))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count": None}, r"llama\.attention\.head_count is missing"),
        ({"context_length": None}, r"llama\.context_length is missing"),
        ({"rope.scaling.factor": 2.0, "rope.scaling.type": 7}, r"rope\.scaling\.type must be a text, it is 7"),
        ({"block_count": 2**31 - 1}, r"block_count says 2147483647 layers, there are \d+ tensors"),
        ({"embedding_length": 0}, r"embedding_length must be a positive integer, it is 0"),
        ({"rope.freq_base": float("nan")}, r"rope\.freq_base must be a number, it is nan"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"expert_count": 7}, "must be a positive integer|is missing"),
        ({"attention.temperature_scale": 0.5, "expert_count": 4}, "temperature_scale is not supported beside experts"),
    ],
)
def test_facts_that_are_missing_or_unknown(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "llama"})
    metadata = {key: value for key, value in {**KEYS, **keys}.items() if value is not None}
    checkpoint = write(tmp_path / "model.gguf", "llama", metadata, stored(spec, permuted)[1])
    with pytest.raises(ConfigError, match=message):
        checkpoint.config()


def test_an_architecture_without_a_family(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "model.gguf", "mamba2", {}, {"token_embd.weight": torch.zeros(4, 4)})
    with pytest.raises(ConfigError, match=r"'mamba2' is not supported; supported are bert, .*qwen3moe"):
        checkpoint.config()


def test_pooling_makes_an_embedder(tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "qwen3", "head_dim": 16})
    tensors = stored(spec, lambda tensors, spec: tensors)[1]
    tensors = {name.replace("attn.", "attn_"): w for name, w in tensors.items()}
    keys = {**KEYS, "pooling_type": 3, "attention.key_length": 16}
    checkpoint = write(tmp_path / "model.gguf", "qwen3", keys, tensors)
    config = checkpoint.config()
    assert (config["architectures"], config["pooling_type"]) == (["Qwen3Model"], "lasttoken")
    loaded(checkpoint, load_spec(config))


def test_a_classifiers_head(tmp_path: Path) -> None:
    spec = load_spec({**SIZES, "model_type": "llama"})
    tensors = stored(spec, permuted)[1]
    dense, out, bias = torch.randn(64, 64), torch.randn(3, 64), torch.randn(3)
    both = {"cls.weight": dense, "cls.output.weight": out, "cls.output.bias": bias}
    head = write(tmp_path / "two.gguf", "llama", KEYS, tensors | both).head()
    assert torch.equal(head["classifier.dense.weight"], dense)
    assert torch.equal(head["classifier.out_proj.bias"], bias)
    one = write(tmp_path / "one.gguf", "llama", KEYS, tensors | {"cls.weight": out})
    assert list(one.head()) == ["classifier.weight"]
    assert not any("cls" in filler.name for filler in one.tensors(spec))
    score = write(tmp_path / "score.gguf", "llama", KEYS, tensors | {"cls.output.weight": out}).head()
    assert torch.equal(score["score.weight"], out)


VALUES = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2, 7, 2**31, 2**62, 0.0, -1.0, 1e38, float("nan"), float("inf"), True, False, "", "yarn"]
    ),
    st.lists(st.integers(-3, 9), min_size=1, max_size=3),
    st.lists(st.just("word"), min_size=1, max_size=3),
)
SOURCES = [("llama", KEYS), ("deepseek2", {**KEYS, **LATENT_KEYS}), ("gemma3", {**KEYS, "attention.sliding_window": 4})]
FURTHER = ("rope.scaling.type", "rope.scaling.factor", "attention.key_length", "nextn_predict_layers", "pooling_type")


@settings(max_examples=examples(50))
@given(st.sampled_from(SOURCES), st.data())
def test_any_metadata_is_read_or_refused(
    tmp_path: Path, source: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    arch, keys = source
    changed = data.draw(st.dictionaries(st.sampled_from([*keys, *FURTHER]), VALUES, min_size=1, max_size=3))
    tensors = {"token_embd.weight": torch.zeros(4, 64), "blk.0.attn_norm.weight": torch.zeros(64)}
    checkpoint = write(tmp_path / "model.gguf", arch, {**keys, **changed}, tensors)
    try:
        load_spec(checkpoint.config())
    except ConfigError:
        return
