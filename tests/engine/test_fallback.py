"""Architectures that only transformers knows run by its code, with our cache: the same logits and tokens."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine import memory
from kvasir.engine.arch import supported
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.fallback import fallback_spec, load_fallback, tp_plan
from kvasir.engine.llm import LLM
from kvasir.engine.load import load
from kvasir.engine.model_facts import model_facts
from kvasir.engine.request import SamplingParams

CPU = torch.device("cpu")
Make = Callable[..., tuple[Path, Any]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {"pad_token_id": 0}),
    "glm4": ("Glm4", {"head_dim": 16, "pad_token_id": 0}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": 4, "pad_token_id": 0}),
    "nemotron": ("Nemotron", {"head_dim": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 16, "pad_token_id": 0}),
    "olmo3-windows": ("Olmo3", {"sliding_window": 9, "num_hidden_layers": 4, "pad_token_id": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal(case: str, checkpoint: Make, in_chunks: Any, caplog: pytest.LogCaptureFixture) -> None:
    family, changes = CASES[case]
    folder, model = checkpoint(family, **changes)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] not in supported()
    spec = fallback_spec(config, folder)
    with caplog.at_level(logging.WARNING):
        decoder = load_fallback(folder, spec, config, dtype=torch.float32, device=CPU, trust_remote_code=False)
    assert "transformers' own code runs it" in caplog.text
    rng = random.Random(case)
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (70, 1, 33)]
    for prompt, got in zip(prompts, in_chunks(decoder, prompts, 3, seed=1), strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).logits[0]
        assert (got - want).abs().max() <= 1e-4


def test_bfloat16_needs_instructions_for_it(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are torch's, however fast ours are."""
    folder, _ = checkpoint("Arcee", pad_token_id=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr(memory, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(memory, "multiplied_by", lambda dtype, device: ("native", "because"))
    monkeypatch.setattr(memory, "vector_bytes", lambda: 32)
    given = EngineConfig(model=str(folder), skip_tokenizer_init=True, num_threads=1, kv_cache_memory_bytes=1 << 22)
    assert load(given).info.dtype == model_facts(given).dtype == "float32"


@pytest.mark.parametrize("case", ["arcee", "olmo3-windows"])
def test_greedy_tokens_equal(case: str, checkpoint: Make) -> None:
    family, changes = CASES[case]
    folder, model = checkpoint(family, **changes)
    rng = random.Random(case)
    common = [rng.randrange(97) for _ in range(21)]
    prompts = [[*common, 5], [*common, 7, 8, 9]]
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", block_size=4, max_num_batched_tokens=7, num_threads=1,
        kv_cache_memory_bytes=1 << 22,
    )  # fmt: skip
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 12:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    for _ in range(2):
        found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in found] == wanted
    assert (found[0].num_cached_tokens or 0) > 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llamma"}, "model_type 'llamma' is not supported; the nearest known is 'llama'"),
        ({"model_type": "zzz", "auto_map": {"AutoConfig": "x.Y"}}, "comes with code of its own: --trust-remote-code"),
        ({"model_type": "mamba"}, "'mamba'.*can't run here"),
        ({"model_type": "stablelm"}, "'stablelm': its attention can't be replaced"),
        (
            {"model_type": "olmo", "quantization_config": {"quant_method": "gptq"}},
            "'gptq'. is not supported for models",
        ),
        ({"model_type": "t5"}, "'t5' is an encoder with a decoder"),
        ({"model_type": "vit"}, "transformers has no model of it that generates"),
        ({"model_type": "qwen3_next"}, r"qwen3_next' \(linear_attention\)"),
    ],
)
def test_what_neither_can_run_is_refused_by_name(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        fallback_spec(config, tmp_path)


def test_a_plan_for_tensor_parallelism(tmp_path: Path) -> None:
    plan = tp_plan({"model_type": "glm4"}, tmp_path)
    assert plan["layers.*.self_attn.q_proj"] == "colwise"
    with pytest.raises(ConfigError, match="has no plan"):
        tp_plan({"model_type": "stablelm"}, tmp_path)
