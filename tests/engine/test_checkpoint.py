"""Every kind of file gives the same tensors; broken and hostile ones give a clear error at once."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import open_checkpoint
from kvasir.engine.config import EngineConfig
from kvasir.engine.decoder import Decoder
from kvasir.engine.dequantise import mxfp4
from kvasir.engine.errors import ConfigError
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.stored import fp8_tensor
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")
Make = Callable[..., tuple[Path, Any]]


def filled(folder: Path, load_format: str = "auto") -> dict[str, Tensor]:
    """The decoder's tensors before they are packed."""
    files = ModelFiles(EngineConfig(model=str(folder), load_format=load_format))  # type: ignore[arg-type]
    spec = load_spec(files.config)
    places = dict(Decoder(spec, torch.float32, CPU).places())
    left = set(places)
    for filler in files.checkpoint().tensors(spec):
        left.remove(filler.name)
        filler.copy_to(places[filler.name])
    assert not left
    return places


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(source: Path, target: Path) -> dict[str, Tensor]:
    (target / "config.json").write_text((source / "config.json").read_text())
    return load_file(source / "model.safetensors")


def test_pytorch_s_own_files(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("Llama")[0]
    tensors = copied(source, tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert equal(filled(tmp_path), filled(source))
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    torch.save({name: tensors[name] for name in names[::2]}, tmp_path / "a.bin")
    torch.save({"state_dict": {name: tensors[name] for name in names[1::2]}}, tmp_path / "b.bin")
    weights = {name: "ab"[i % 2] + ".bin" for i, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    assert equal(filled(tmp_path, "pt"), filled(source))


def test_npcache_is_made_and_read(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("Llama")[0]
    tensors = {name: tensor.bfloat16() for name, tensor in copied(source, tmp_path).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected = filled(tmp_path, "pt")
    assert equal(filled(tmp_path, "npcache"), expected)
    (tmp_path / "pytorch_model.bin").unlink()
    assert equal(filled(tmp_path, "npcache"), expected)
    (tmp_path / "np" / "weight_names.json").write_text('["../../etc/passwd"]')
    with pytest.raises(ConfigError, match="must hold a list of tensor names"):
        filled(tmp_path, "npcache")


def mistral(source: Path, target: Path) -> None:
    """A Mistral as its makers store it: other names, and neighbours of q and k turn together."""
    config = json.loads((source / "config.json").read_text())
    renamed = {
        "model.embed_tokens.": "tok_embeddings.",
        "lm_head.": "output.",
        "model.norm.": "norm.",
        "model.layers.": "layers.",
        ".self_attn.q_proj.": ".attention.wq.",
        ".self_attn.k_proj.": ".attention.wk.",
        ".self_attn.v_proj.": ".attention.wv.",
        ".self_attn.o_proj.": ".attention.wo.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".mlp.gate_proj.": ".feed_forward.w1.",
        ".mlp.up_proj.": ".feed_forward.w3.",
        ".mlp.down_proj.": ".feed_forward.w2.",
        ".block_sparse_moe.experts.": ".feed_forward.experts.",
        ".block_sparse_moe.gate.": ".feed_forward.gate.",
    }
    out = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.view(-1, 2, 8, 64).transpose(1, 2).reshape(tensor.shape)
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = tensor.contiguous()
    save_file(out, target / "consolidated.safetensors")
    params = {
        "dim": 64, "n_layers": 3, "head_dim": 16, "hidden_dim": config["intermediate_size"], "n_heads": 4, "n_kv_heads": 2,
        "norm_eps": config["rms_norm_eps"], "vocab_size": 97, "rope_theta": config["rope_parameters"]["rope_theta"],
        "max_seq_len": 256,
    }  # fmt: skip
    if config["model_type"] == "mixtral":
        params["moe"] = {"num_experts": 5, "num_experts_per_tok": 2}
    (target / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("family", ["Mistral", "Mixtral"])
def test_mistral_s_own_layout(checkpoint: Make, tmp_path: Path, family: str) -> None:
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2} if family == "Mixtral" else {"sliding_window": None}
    source = checkpoint(family, **experts)[0]
    mistral(source, tmp_path)
    assert equal(filled(tmp_path), filled(source))
    ours = load_spec(ModelFiles(EngineConfig(model=str(tmp_path))).config)
    theirs = load_spec(json.loads((source / "config.json").read_text()))
    assert ours == theirs


def test_mistral_s_own_layout_in_fp8(checkpoint: Make, tmp_path: Path) -> None:
    """Queries and keys change their order whatever they are stored as."""
    mistral(checkpoint("Mistral", sliding_window=None)[0], tmp_path)
    file = tmp_path / "consolidated.safetensors"
    tensors = load_file(file)
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if ".wq." in name}
    save_file({**tensors, **{name: tensor.float() for name, tensor in quantised.items()}}, file)
    plain = filled(tmp_path)
    save_file({**tensors, **quantised, **{f"{name}_scale": torch.ones(1) for name in quantised}}, file)
    assert equal(filled(tmp_path), plain)


def test_a_head_of_its_own_in_a_tied_model_is_told(
    checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A merged adapter may hold one, while config.json still says that there is none."""
    tensors = copied(checkpoint("Llama", tie_word_embeddings=True)[0], tmp_path)
    embed = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embed.clone()}, tmp_path / "model.safetensors")
    filled(tmp_path)
    assert not caplog.records
    save_file({**tensors, "lm_head.weight": (embed + 1).bfloat16()}, tmp_path / "model.safetensors")
    assert "head.weight" not in filled(tmp_path)
    assert "lm_head.weight isn't read: config.json ties it to model.embed_tokens.weight" in caplog.text


def test_a_head_that_is_a_copy_is_compared_as_well(
    checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = copied(checkpoint("Llama", tie_word_embeddings=True)[0], tmp_path)
    embed = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embed.flip(0)}, tmp_path / "model.safetensors")

    def split(name: str, tensor: Tensor, spec: Any) -> Any:
        return ((name, tensor.flip(0) if name == "lm_head.weight" else tensor),)

    spec = replace(load_spec(json.loads((tmp_path / "config.json").read_text())), split=split)
    list(open_checkpoint(tmp_path).tensors(spec))
    assert not caplog.records


def test_a_head_in_fp8_is_compared_with_its_scales(
    checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And so are the embeddings."""
    tensors = copied(checkpoint("Llama", tie_word_embeddings=True)[0], tmp_path)
    embed, scale = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn), torch.full((1, 1), 0.5)
    own = {"model.embed_tokens.weight": embed, "model.embed_tokens.weight_scale_inv": scale}
    plain = {"lm_head.weight": (embed.float() * 0.5).bfloat16()}
    scaled = {"lm_head.weight": embed.clone(), "lm_head.weight_scale_inv": scale.clone()}
    for head in (plain, scaled):
        save_file(tensors | own | head, tmp_path / "model.safetensors")
        filled(tmp_path)
        assert not caplog.records
    save_file(tensors | own | scaled | {"lm_head.weight_scale_inv": 2 * scale}, tmp_path / "model.safetensors")
    filled(tmp_path)
    assert "lm_head.weight isn't read" in caplog.text


def test_weights_quantised_otherwise_are_refused(checkpoint: Make, tmp_path: Path) -> None:
    """Where config.json doesn't say so: as plain numbers they would be wrong."""
    folder, name = checkpoint("Llama")[0], "model.layers.0.mlp.up_proj.weight"
    spec, tensors = load_spec(json.loads((folder / "config.json").read_text())), load_file(folder / "model.safetensors")
    small = (tensors[name] * 100).to(torch.int8)
    for changed, says in (
        ({name: small}, "up_proj.weight is int8: .*not supported"),
        ({name: small, f"{name}_scale": torch.ones(112, 1)}, "int8 with scales"),
        ({f"{name}_scale": torch.ones(112, 1)}, "float32 with scales"),
    ):
        save_file(tensors | changed, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=says):
            load_decoder(tmp_path, spec, dtype=torch.float32, device=CPU)


def test_fp8_with_block_scales(checkpoint: Make, tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: squares of 128 numbers share a scale."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    squares = torch.rand(3, 2) + 0.5
    spread = squares.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    one = fp8_tensor("w", (weight / spread).to(torch.float8_e4m3fn), squares)
    assert (one.read(one.like).float() - weight).abs().max() < 0.3
    seven = fp8_tensor("w", weight.to(torch.float8_e4m3fn), torch.rand(7, 2))
    with pytest.raises(ConfigError, match="w: 300 numbers don't divide into 7 blocks"):
        seven.read(seven.like)
    deep = fp8_tensor("w", weight.to(torch.float8_e4m3fn).view(3, 100, 200), torch.rand(3, 200))
    with pytest.raises(ConfigError, match=r"w has shape \[3, 100, 200\], its scales have \[3, 200\]"):
        deep.read(deep.like)

    source = checkpoint("Llama", tie_word_embeddings=True)[0]
    tensors = copied(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    got_places = filled(tmp_path)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(got_places["blocks.1.attn.q.weight"], q.float() * 0.5)
    del tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"q_proj.weight is FP8, but the checkpoint lacks its scales"):
        filled(tmp_path)


@pytest.mark.parametrize(
    ("said", "by_row"),
    [
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": None}, True),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, False),
    ],
)
def test_fp8_by_any_maker(said: dict[str, Any], by_row: bool, checkpoint: Make, tmp_path: Path) -> None:
    """A scale for each row or one for all, and scales for activations, which aren't rounded here."""
    tensors = copied(checkpoint("Llama")[0], tmp_path)
    expected = dict(tensors)
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) / 448 if by_row else weight.abs().max() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}_scale": scale, name.replace(".weight", ".input_scale"): torch.ones(())}
        expected[name] = (tensors[name].float() * scale).bfloat16().float()
    save_file(expected, tmp_path / "model.safetensors")
    wanted = filled(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    assert equal(filled(tmp_path), wanted)


def test_mxfp4() -> None:
    numbers = torch.tensor([0.0, 0.5, -0.5, 6.0, -6.0, 1.5, 4.0, -3.0] * 4)
    codes = torch.tensor([0, 1, 9, 7, 15, 3, 6, 13] * 4, dtype=torch.uint8)
    blocks = (codes[::2] | (codes[1::2] << 4)).view(1, 1, 1, 16).expand(2, 3, 2, 16).contiguous()
    scales = torch.tensor([127, 130], dtype=torch.uint8).expand(2, 3, 2).contiguous()
    got = mxfp4(blocks, scales)
    assert got.shape == (2, 3, 64)
    assert torch.equal(got[1, 2].float(), torch.cat((numbers, numbers * 8)))


def test_gpt_oss_as_it_is_published(checkpoint: Make, tmp_path: Path) -> None:
    """Experts in MXFP4: the same model as with what they stand for."""
    moe = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64}
    source = checkpoint("GptOss", **moe, hidden_size=64)[0]
    tensors = copied(source, tmp_path)
    plain = dict(tensors)
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(rng.integers(120, 126, (experts, outputs, inputs // 32), dtype=np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = mxfp4(blocks, scales).transpose(1, 2).float().contiguous()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    save_file(tensors, tmp_path / "model.safetensors")
    got = filled(tmp_path)
    save_file(plain, tmp_path / "model.safetensors")
    assert equal(got, filled(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/kvasir-was-here").touch, ())


def test_a_pickle_that_runs_code_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    copied(checkpoint("Llama")[0], tmp_path)
    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="can't be read as a file of tensors"):
        filled(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="can't be read as a file of tensors"):
        filled(tmp_path)
    assert not Path("/tmp/kvasir-was-here").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b"])
def test_an_index_does_not_lead_out_of_its_folder(checkpoint: Make, tmp_path: Path, name: str) -> None:
    copied(checkpoint("Llama")[0], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="is not a file beside it"):
        filled(tmp_path)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "cut in the header": lambda whole: whole[:50],
    "cut in a tensor": lambda whole: whole[:-100],
    "more than the tensors": lambda whole: whole + b"x",
    "absurd header": lambda whole: struct.pack("<Q", 10**10) + whole[8:],
    "larger than anything": lambda whole: struct.pack("<Q", 2**64 - 1) + whole[8:],
    "no JSON": lambda whole: whole[:8] + b"\xff" * 40 + whole[48:],
    "past the end": lambda whole: header(whole, lambda h: h["model.norm.weight"].update(data_offsets=[0, 10**15])),
    "shape and size differ": lambda whole: header(whole, lambda h: h["model.norm.weight"].update(shape=[10**9])),
    "unknown type": lambda whole: header(whole, lambda h: h["model.norm.weight"].update(dtype="Q7")),
    "negative": lambda whole: header(whole, lambda h: h["model.norm.weight"].update(shape=[-64])),
    "overlapping": lambda whole: header(
        whole, lambda h: h["model.norm.weight"].update(data_offsets=h["lm_head.weight"]["data_offsets"])
    ),
}


def header(whole: bytes, change: Callable[[Any], Any]) -> bytes:
    size = struct.unpack("<Q", whole[:8])[0]
    found = json.loads(whole[8 : 8 + size])
    change(found)
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


@pytest.mark.parametrize("how", BROKEN)
def test_broken_safetensors_are_an_error_at_once(checkpoint: Make, tmp_path: Path, how: str) -> None:
    source = checkpoint("Llama")[0]
    copied(source, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(BROKEN[how]((source / "model.safetensors").read_bytes()))
    start = time.thread_time()
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        filled(tmp_path)
    assert time.thread_time() - start < 5


@pytest.fixture(scope="module")
def small(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 5,
    }
    source = checkpoint("Llama", **sizes)[0]
    folder = tmp_path_factory.mktemp("fuzz")
    copied(source, folder)
    return folder, (source / "model.safetensors").read_bytes()


@settings(max_examples=examples(80))
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6))
def test_fuzzed_safetensors(small: tuple[Path, bytes], cut: int, flips: list[tuple[int, int]]) -> None:
    """Any damage gives the model or a ConfigError, never anything else."""
    folder, whole = small
    damaged = bytearray(whole if cut > 2000 else whole[: len(whole) - cut])
    for at, value in flips:
        if at < len(damaged):
            damaged[at] = value
    (folder / "model.safetensors").write_bytes(bytes(damaged))
    with contextlib.suppress(ConfigError, KeyError):  # KeyError: `filled` itself, of a tensor that is left over
        filled(folder)


def test_what_a_folder_holds_is_said(checkpoint: Make, tmp_path: Path) -> None:
    copied(checkpoint("Llama")[0], tmp_path)
    with pytest.raises(ConfigError, match=r"holds no weights: .* it holds config.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"--load-format gguf: .* is no GGUF file"):
        open_checkpoint(tmp_path, "gguf")


def test_left_over_tensors_of_a_tied_head_and_heads_of_classifiers(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("Llama", tie_word_embeddings=True)[0]
    tensors = copied(source, tmp_path)
    tensors |= {"lm_head.weight": torch.ones(97, 64), "score.weight": torch.ones(2, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    spec = load_spec(json.loads((tmp_path / "config.json").read_text()))
    load_decoder(tmp_path, spec, dtype=torch.float32, device=CPU)
    assert open_checkpoint(tmp_path).head()["score.weight"].shape == (2, 64)
