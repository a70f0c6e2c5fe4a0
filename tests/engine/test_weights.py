"""Loading: sharded and single files, every error names its tensors, and peak memory is one tensor above the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SPEC

from kvasir.engine.arch import load_spec
from kvasir.engine.checkpoint import canonical
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Spec
from kvasir.engine.tensor_files import files_of
from kvasir.engine.weights import load_decoder, random_decoder, weight_bytes
from kvasir.kernels.linear import Packed, Weight

CPU = torch.device("cpu")
Checkpoint = Callable[..., tuple[Path, Any]]


def spec_of(folder: Path) -> Spec:
    return load_spec(json.loads((folder / "config.json").read_text()))


def load(folder: Path, **options: Any) -> Decoder:
    return load_decoder(folder, spec_of(folder), dtype=torch.float32, device=CPU, **options)


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def numbers(weight: Weight) -> torch.Tensor:
    if isinstance(weight, Packed):
        return weight.blocks
    return weight.to_dense() if weight.is_mkldnn else weight


def same(a: Decoder, b: Decoder) -> bool:
    return all(
        torch.equal(numbers(x), numbers(y))
        for m, n in zip(a.modules(), b.modules(), strict=True)
        for x, y in [(getattr(m, k), getattr(n, k)) for k in ("weight", "head", "embed") if hasattr(m, k)]
    )


def test_shards_equal_one_file(checkpoint: Checkpoint) -> None:
    one, many = checkpoint("Llama")[0], checkpoint("Llama", max_shard_size="50KB")[0]
    assert len(files_of(one, "model.safetensors")) == 1
    assert len(files_of(many, "model.safetensors")) > 2
    assert same(load(one), load(many))


def test_parts_lie_in_order(checkpoint: Checkpoint) -> None:
    """q, k, v and gate, up are stacked; `places` gives each its view under its canonical name."""
    decoder = Decoder(SPEC, torch.float32, CPU)
    places = dict(decoder.places())
    block = decoder.blocks["0"]
    assert places["blocks.0.attn.k.weight"].shape == (16, 32)
    assert places["blocks.0.attn.k.weight"].data_ptr() == block.attn.qkv.weight[32:].data_ptr()  # type: ignore[union-attr,operator]
    assert places["blocks.1.mlp.up.weight"].shape == (48, 32)
    assert {"embed.weight", "head.weight", "norm.weight", "blocks.1.attn_norm.weight"} <= set(places)


def test_missing_left_over_and_misshapen_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    good = checkpoint("Llama")[0]
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ConfigError, match=r"lacks blocks\.1\.attn\.k\.weight"):
        load(edited(good, tmp_path, lambda t: t.pop(name)))
    with pytest.raises(ConfigError, match=r"doesn't use, model\.layers\.0\.extra\.weight"):
        load(edited(good, tmp_path, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(1)})))
    with pytest.raises(ConfigError, match=r"k_proj.weight has shape \[3, 64\], config.json says \[32, 64\]"):
        load(edited(good, tmp_path, lambda t: t.update({name: torch.ones(3, 64)})))


def test_known_extras_are_tolerated(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tied = checkpoint("Llama", tie_word_embeddings=True)[0]
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(97, 64)}
    assert same(load(tied), load(edited(tied, tmp_path, lambda t: t.update(extras))))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        files_of(tmp_path, "model.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(ConfigError, match=r"lacks two.safetensors"):
        files_of(tmp_path, "model.safetensors")


def test_truncated_file_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    good = checkpoint("Llama")[0]
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(tmp_path)


def test_progress_reaches_the_end(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("Llama")[0]
    capsys.readouterr()
    load(folder)
    assert capsys.readouterr().err == ""
    load(folder, progress=True)
    assert "100%|██████████|" in capsys.readouterr().err


def test_names_are_replaced_in_one_pass() -> None:
    """One by one, `gate_proj` -> `gate` would then become a router."""
    spec = replace(SPEC, names={".gate_proj.": ".mlp.gate.", ".mlp.gate.": ".router."})
    assert canonical("model.x.mlp.gate_proj.w", spec) == "x.mlp.mlp.gate.w"
    assert canonical("x", SPEC) == "x"


def test_weight_bytes_counts_the_tied_copy() -> None:
    untied = weight_bytes(SPEC, torch.float16, CPU)
    parameters = 2 * 50 * 32 + 32 + 2 * (64 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32)
    assert untied == 2 * parameters
    assert weight_bytes(SPEC, torch.bfloat16, CPU) == 2 * parameters


def test_random_decoder_depends_on_its_seed() -> None:
    a, b, c = (random_decoder(SPEC, torch.float32, CPU, seed) for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)


PEAK = """
import json, resource, sys, torch
from pathlib import Path
from kvasir.engine.arch import load_spec
from kvasir.engine.weights import load_decoder, weight_bytes
from kvasir.kernels import huge_pages

huge_pages.HUGE, huge_pages.CHUNK = 1 << 60, 0  # the limit would count the addresses that these skip
torch.set_num_threads(1)
folder, spare = Path(sys.argv[1]), int(sys.argv[2])
spec, cpu = load_spec(json.loads((folder / "config.json").read_text())), torch.device("cpu")
torch.nn.functional.linear(torch.ones(1, 8), torch.ones(8, 8))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + weight_bytes(spec, torch.float32, cpu) + spare,) * 2)
load_decoder(folder, spec, dtype=torch.float32, device=cpu)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel holds the limit")
def test_peak_is_one_tensor_above_the_weights(checkpoint: Checkpoint) -> None:
    """Loaded with no more memory allowed than the weights (140 MB), the largest matrix (17 MB) and its new order.

    The kernel counts torch's mapping of the file too, of which nothing is ever written.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8000, "num_hidden_layers": 4}
    folder = checkpoint("Llama", **sizes)[0]
    mapping, largest = (folder / "model.safetensors").stat().st_size, 2 * 4096 * 512 * 4
    run = [sys.executable, "-c", PEAK, str(folder)]
    subprocess.run([*run, str(mapping + 2 * largest)], check=True)
    short = subprocess.run([*run, str(mapping - largest)], capture_output=True, text=True, check=False)
    assert "memory" in short.stderr, "the limit must be one"
