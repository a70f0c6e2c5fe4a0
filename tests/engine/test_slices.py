"""A rank reads its own part of a checkpoint: nothing of other stages and experts, of its own tensors no more than the cut."""

from __future__ import annotations

import ctypes
import json
import mmap
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvasir.engine import stored
from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import Part, open_checkpoint
from kvasir.engine.dequantise import mxfp4
from kvasir.engine.errors import ConfigError
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.share import Cut, share_of
from kvasir.engine.stored import Mapped, Mxfp4, Stored, fp8_tensor, halved_tensor
from kvasir.engine.weights import load_decoder, weight_bytes

CPU = torch.device("cpu")
Checkpoint = Callable[..., tuple[Path, Any]]
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def fp8_cases() -> list[tuple[Stored, torch.Tensor]]:
    """With a scale for squares, large and small, for rows, for columns, and for all, of several matrices as well."""
    weight, cases = torch.randn(300, 200).to(torch.float8_e4m3fn), []
    for shape, high, wide in (
        ((3, 2), 128, 128),
        ((19, 13), 16, 16),
        ((300, 1), 1, 200),
        ((1, 200), 300, 1),
        ((1, 1), 300, 200),
    ):
        scale = torch.rand(shape) + 0.5
        factors = scale[torch.arange(300) // high][:, torch.arange(200) // wide]
        cases.append((fp8_tensor("w", weight, scale), (weight.float() * factors).bfloat16()))
    three, scale = weight.view(3, 100, 200), torch.tensor([0.7])
    return [*cases, (fp8_tensor("w", three, scale), (three.float() * scale).bfloat16())]


def mxfp4_case() -> tuple[Stored, torch.Tensor]:
    blocks = torch.randint(0, 256, (5, 7, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (5, 7, 2), dtype=torch.uint8)
    return Mxfp4("w", blocks, scales), mxfp4(blocks, scales).transpose(-1, -2)


def halved_case() -> tuple[Stored, torch.Tensor]:
    rows = torch.randn(40, 6)
    order = [head * 10 + 2 * at + half for head in range(4) for half in range(2) for at in range(5)]
    return halved_tensor(Mapped(rows), 10), rows[order]


@pytest.mark.parametrize(("one", "whole"), [*fp8_cases(), mxfp4_case(), halved_case()])
def test_any_cut_of_what_is_made(one: Stored, whole: torch.Tensor) -> None:
    assert tuple(one.like.shape) == tuple(whole.shape)
    rng = random.Random(0)
    for number in range(60):
        view, wanted = [
            (one.like, whole),
            (one.like[1::2], whole[1::2]),
            (one.like.transpose(0, -1), whole.transpose(0, -1)),
        ][number % 3]
        dim = rng.randrange(whole.dim())
        start, stop = sorted(rng.sample(range(wanted.shape[dim] + 1), 2))
        cut = Cut(dim, range(start, stop))
        place = torch.empty_like(wanted.narrow(dim, start, stop - start))
        part = Part("w", "w", one, view, 0)
        part.fetch(cut)
        part.copy_to(place, cut)
        assert torch.equal(place, wanted.narrow(dim, start, stop - start))


@pytest.mark.parametrize(
    ("tp", "pp", "dealt"),
    [(1, 2, False), (2, 1, True), (2, 1, False), (2, 2, True)],
    ids=["stages", "whole experts", "slices", "both"],
)
def test_nothing_is_dequantised_for_others(
    tp: int, pp: int, dealt: bool, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: Any
) -> None:
    """Of experts in FP8: a slice of rows or columns is made alone."""
    source = checkpoint("Mixtral", **MIXTURE)[0]
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and tensors[name].dim() == 2]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    asked: list[int] = []
    plain = stored.fp8

    def noted(weight: torch.Tensor, scale: torch.Tensor, block: Any, rows: range, columns: range) -> torch.Tensor:
        asked.append(len(rows) * len(columns))
        return plain(weight, scale, block, rows, columns)

    monkeypatch.setattr(stored, "fp8", noted)
    spec = load_spec(config)
    everything = sum(t.numel() for t in tensors.values() if t.dtype == torch.float8_e4m3fn)
    for rank in range(tp * pp):
        asked.clear()
        own = share_of(spec, Mesh(Place(tp, pp, rank)), expert_parallel=dealt)
        load_decoder(tmp_path, spec, dtype=torch.float32, device=CPU, share=own)
        assert sum(asked) == everything / (tp * pp)


@pytest.mark.parametrize("tp", [1, 2])
def test_no_number_of_mxfp4_is_made_twice_or_for_others(tp: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Gate and up take turns in the rows of one tensor, whose parts of an expert come one behind the other."""
    spec = load_spec(GPT_OSS)
    blocks = {"gate_up_proj": (3, 128, 2, 16), "down_proj": (3, 64, 2, 16)}
    tensors = {
        f"model.layers.0.mlp.experts.{name}_{part}": torch.zeros(shape[:size], dtype=torch.uint8)
        for name, shape in blocks.items()
        for part, size in (("blocks", 4), ("scales", 3))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    made: list[int] = []
    plain = stored.mxfp4

    def noted(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        made.append(2 * packed.numel())
        return plain(packed, scales)

    monkeypatch.setattr(stored, "mxfp4", noted)
    names: list[str] = []
    own = share_of(spec, Mesh(Place(tp, 1, tp - 1)))
    for filler in open_checkpoint(tmp_path).tensors(spec):
        cut = own.cut(filler.name)
        size = [len(cut.part) if cut and cut.dim == dim else length for dim, length in enumerate(filler.shape)]
        filler.copy_to(torch.empty(size), cut)
        names.append(filler.name)
    assert sum(made) == 3 * 3 * 64 * 64 // tp
    expected = [f"blocks.0.mlp.experts.{expert}.{part}.weight" for expert in range(3) for part in ("gate", "up")]
    assert [name for name in names if ".down." not in name] == expected


@pytest.mark.parametrize(
    ("blocks", "scales", "says"),
    [
        (
            (3, 128, 2, 16),
            (3, 128, 3),
            r"gate_up_proj_scales is uint8 of shape \[3, 128, 3\].* of shape \[3, 128, 2\]$",
        ),
        ((3, 128, 2, 8), (3, 128, 2), r"gate_up_proj_blocks is uint8 of shape \[3, 128, 2, 8\]; .* groups, 16\]$"),
        ((3, 130, 2, 16), (3, 130, 2), r"gate_up_proj has shape \[3, 64, 130\], config.json says \[3, 64, 128\]"),
        ((2, 128, 2, 16), (2, 128, 2), r"gate_up_proj has shape \[2, 64, 128\], config.json says \[3, 64, 128\]"),
        ((3, 128, 3, 16), (3, 128, 3), r"gate_up_proj has shape \[3, 96, 128\], config.json says \[3, 64, 128\]"),
        ((128, 2, 16), (128, 2), r"gate_up_proj has shape \[64, 128\], config.json says \[3, 64, 128\]"),
    ],
)
def test_mxfp4_of_other_shapes_is_refused(
    blocks: tuple[int, ...], scales: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    """By what is stored, where its parts don't fit each other; by the matrices, where config.json has others."""
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
    save_file({k: torch.zeros(v, dtype=torch.uint8) for k, v in shapes.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=says):
        list(open_checkpoint(tmp_path).tensors(load_spec(GPT_OSS)))


@pytest.mark.parametrize("case", ["Llama", "Phi3", "GPT2"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2)])
def test_no_more_is_read_than_a_rank_holds(
    case: str, tp: int, pp: int, checkpoint: Checkpoint, monkeypatch: Any
) -> None:
    """And asked of the disk before."""
    changes = {"Phi3": {"pad_token_id": 0}, "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256}}
    folder, _ = checkpoint(case, **changes.get(case, {}))
    read: list[int] = []
    asked: list[int] = []
    plain = Mapped.read

    def noted(self: Mapped, view: torch.Tensor) -> torch.Tensor:
        read.append(view.nbytes)
        return plain(self, view)

    monkeypatch.setattr(Mapped, "fetch", lambda self, view: asked.append(view.nbytes))
    monkeypatch.setattr(Mapped, "read", noted)
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    for rank in range(tp * pp):
        read.clear()
        asked.clear()
        own = share_of(spec, Mesh(Place(tp, pp, rank)))
        load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=own)
        held = weight_bytes(spec, torch.float32, torch.device("meta"), own)
        assert sum(read) == sum(asked) == held


def test_what_is_asked_for_is_what_lies_there(monkeypatch: Any, request: pytest.FixtureRequest) -> None:
    """Whole pages around it; the system's library is opened once."""
    calls: list[tuple[int, int, int]] = []

    class System:
        def madvise(self, begin: Any, size: Any, what: int) -> int:
            calls.append((begin.value, size.value, what))
            return 0

    opened: list[None] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or System())
    stored._madvise.cache_clear()
    request.addfinalizer(stored._madvise.cache_clear)
    memory = torch.zeros(100, 1000)
    mapped = Mapped(memory)
    mapped.fetch(mapped.like[20:50, 10:20])
    ((begin, size, what),) = calls
    first, last = memory[20, 10].data_ptr(), memory[49, 19].data_ptr() + 4
    assert (what, begin % mmap.PAGESIZE, begin + size) == (stored.WILL_NEED, 0, last)
    assert first - mmap.PAGESIZE < begin <= first
    mapped.fetch(mapped.like[:0])
    assert len(calls) == 1
    mapped.fetch(mapped.like)
    assert (len(calls), len(opened)) == (2, 1)
