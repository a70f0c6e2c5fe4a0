"""`kvasir models` and `kvasir show`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.cluster.cli import main
from kvasir.engine.arch import supported
from kvasir.engine.parallel_plan import Device

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def folder(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(capsys, "show", *arguments, "--json"))
    return found


def test_every_family_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "models", "--json"))
    assert [family["model_type"] for family in found["families"]] == supported()
    assert all(family["architectures"] and len(family["about"]) > 20 for family in found["families"])
    assert "skald" in found["bundled"]
    text = shown(capsys, "models")
    assert "DeepseekV3ForCausalLM" in text
    assert "transformers' own code" in text


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show")
    assert "3.25 M" in text
    assert "Qwen 3: Llama with RMS-normalised heads" in text
    assert "{%" in shown(capsys, "show", "skald", "--template")


def test_experts_count_once_per_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixtral 8x7B: 46.7 B parameters, 12.9 B of them for one token (arXiv:2401.04088)."""
    found = facts(capsys, folder(tmp_path, MIXTRAL), "--dtype", "bfloat16", "--max-model-len", "4k", "--batch", "3")
    assert round(found["parameters"] / 1e9, 1) == 46.7
    assert round(found["active_parameters"] / 1e9, 1) == 12.9
    assert "2 of 8 experts" in found["layers"]
    each = 4000 * 32 * 8 * 128 * 2 * 2
    assert found["memory"]["kv_cache_per_sequence"] == each
    assert found["memory"]["kv_cache"] == 3 * each
    assert found["memory"]["weights"] >= 2 * found["parameters"]
    assert found["tokenizer"].startswith("none (")


def test_layers_that_slide_take_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, folder(tmp_path, GEMMA), "--dtype", "bfloat16")
    assert found["layers"] == "26 (22 see 512 tokens, 4 see all)"
    everything = 32768 * 26 * 256 * 2 * 2
    assert found["memory"]["kv_cache_per_sequence"] < everything / 4
    assert "base 10000" in found["rope"]
    assert "base 1e+06" in found["rope"]


def test_a_gguf_file(data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, str(data("model-stories260k/stories260k.f32.gguf")))
    assert found["tensor_types"] == {"F32": 48}
    assert found["context"] == 512
    assert found["tasks"] == ["generate", "embed"]


def test_what_transformers_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    found = facts(capsys, folder(tmp_path, {**small, "model_type": "arcee", "architectures": ["ArceeForCausalLM"]}))
    assert found["family"] == "runs by transformers' own code"
    assert found["parameters"] > 0


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "isn't valid JSON"),
        ({"config.json": '{"model_type": "llamma"}'}, "nearest known is 'llama'"),
        ({"config.json": '{"model_type": "llama"}'}, "is missing"),
    ],
)
def test_what_is_no_model(files: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["show", str(tmp_path)])
    assert end.value.code == 1
    assert says in capsys.readouterr().err


def test_how_a_model_lies_on_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, MIXTRAL)
    text = shown(capsys, "plan", path, "--gpus", "4")
    assert f"kvasir serve {path} -tp " in text
    assert "bounds, not measurements" in text
    layouts = json.loads(shown(capsys, "plan", path, "--gpus", "4", "--json"))
    assert {one["tp"] * one["pp"] * one["dp"] for one in layouts} == {4}
    with pytest.raises(SystemExit) as end:
        main(["plan", path, "--gpu", "L4-24GB"])
    assert end.value.code == 1
    assert "use more or larger GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("plan", ["-tp", "2"]),
        ("plan", ["-dp", "2"]),
        ("show", ["--pipeline-parallel-size", "2"]),
        ("show", ["--enable-expert-parallel"]),
        ("show", ["--distributed-executor-backend", "mp"]),
    ],
)
def test_a_layout_is_refused_where_it_would_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, flag: list[str]
) -> None:
    more = ["--gpus", "4"] if command == "plan" else []
    with pytest.raises(SystemExit) as end:
        main([command, folder(tmp_path, MIXTRAL), *more, *flag])
    assert end.value.code == 1
    assert re.search("--[a-z-]+: kvasir (plan shows every layout|show is of a whole model)", capsys.readouterr().err)


def test_layouts_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", folder(tmp_path, MIXTRAL), "--gpus", "4", "--gpu", "H100-80GB", "--streams", "8"]
    found = json.loads(shown(capsys, *asked, "--json"))
    assert {(each["tp"], each["pp"], each["dp"]) for each in found} == {
        (1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1),
    }  # fmt: skip
    assert {(each["tp"], each["pp"]) for each in found if not each["sequences"]} == {(1, 1)}, "93 GB don't fit on one"
    best = found[0]
    assert f"-tp {best['tp']} -pp {best['pp']} -dp {best['dp']}" in shown(capsys, *asked).splitlines()[-1]


def test_what_was_said_of_the_model_is_in_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", folder(tmp_path, MIXTRAL), "--gpus", "16", "--gpus-per-node", "2", "--enable-expert-parallel"]
    *_, apart, command = shown(capsys, *asked, "--kv-cache-dtype", "fp8", "--max-model-len", "8192").splitlines()
    assert "--max-model-len 8192" in command
    assert "--kv-cache-dtype fp8" in command
    sizes = dict(re.findall(r"-(tp|pp) (\d+)", command))
    assert ("--enable-expert-parallel" in command) == (sizes["tp"] != "1")
    assert ("several nodes of 2 GPUs" in apart) == (int(sizes["tp"]) * int(sizes["pp"]) > 2)


def test_layouts_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speeds by which it is predicted are measured for as many ranks, rows and threads."""
    asked: list[Any] = []

    def measured(*given: Any) -> Device:
        asked.append(given)
        return Device(200 * 10**9, 1e10, 1e12, 1e9, kind="cpu", products=((1, 1e10), (64, 1e9)))

    monkeypatch.setattr("kvasir.engine.cpu_device.cpu_device", measured)
    words = ["plan", folder(tmp_path, MIXTRAL), "--gpus", "2", "--gpu", "CPU", "--streams", "8", "--num-threads", "1"]
    text = shown(capsys, *words)
    ((ranks, spec, *rest),) = asked
    assert (ranks, spec.heads, rest) == (2, 32, [8, torch.bfloat16, 1])
    assert "by what 2 of them were just measured to do" in text
