"""The decoder equals transformers on small random checkpoints, however the rows are cut, batched and placed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-mha-gelu": ("Llama", {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    return load_decoder(folder, spec, dtype=dtype, device=CPU)


def in_chunks(
    decoder: Decoder, prompts: list[list[int]], ragged: Any, block_size: int, seed: int
) -> list[torch.Tensor]:
    """Logits of every row, computed in steps of random chunks of random sequences, in blocks in random order."""
    rng = random.Random(seed)
    per = [-(-len(p) // block_size) for p in prompts]
    blocks = rng.sample(range(sum(per) + 3), sum(per))
    tables = [[blocks.pop() for _ in range(n)] for n in per]
    cache = KVCache(decoder.spec, sum(per) + 3, block_size, decoder.dtype, CPU)
    cache.arena.fill_(255)  # NaN in every type: what was never written must have no effect
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        behind = [s for s, p in enumerate(prompts) if done[s] < len(p)]
        chosen = rng.sample(behind, rng.randint(1, len(behind)))
        counts = [min(rng.choice([1, 1, 2, 7, 30]), len(prompts[s]) - done[s]) for s in chosen]
        step = ragged([(tables[s], done[s], n) for s, n in zip(chosen, counts, strict=True)], block_size)
        tokens = torch.tensor(
            [t for s, n in zip(chosen, counts, strict=True) for t in prompts[s][done[s] : done[s] + n]]
        )
        rows = decoder(tokens, step, cache, torch.arange(len(tokens)))
        for s, n, out in zip(chosen, counts, rows.split(counts), strict=True):
            logits[s].append(out)
            done[s] += n
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, checkpoint: Callable[..., tuple[Path, Any]], ragged: Any) -> None:
    family, changes = CASES[case]
    folder, model = checkpoint(family, **changes)
    decoder = load(folder)
    rng = random.Random(case)
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (70, 1, 33, 16, 12)]
    for block_size in (16, 3):
        ours = in_chunks(decoder, prompts, ragged, block_size, seed=block_size)
        for prompt, got in zip(prompts, ours, strict=True):
            with torch.no_grad():
                want = model(torch.tensor([prompt])).logits[0]
            assert (got - want).abs().max() <= 2e-5


def test_bfloat16_is_close(checkpoint: Callable[..., tuple[Path, Any]], ragged: Any) -> None:
    folder, model = checkpoint("Qwen3", head_dim=32)
    prompts = [[random.Random(s).randrange(97) for _ in range(40)] for s in range(3)]
    ours = in_chunks(load(folder, torch.bfloat16), prompts, ragged, 16, seed=1)
    with torch.no_grad():
        want = model(torch.tensor(prompts)).logits
    assert (torch.stack(ours) - want).abs().mean() < 0.02 * want.std()


def test_only_wanted_rows(checkpoint: Callable[..., tuple[Path, Any]], ragged: Any) -> None:
    decoder = load(checkpoint("Llama")[0])
    cache = KVCache(decoder.spec, 8, 16, torch.float32, CPU)
    step = ragged([([1, 3], 0, 20), ([5], 0, 9)], 16)
    tokens = torch.arange(29)
    every = decoder(tokens, step, cache, torch.arange(29))
    some = decoder(tokens, step, cache, torch.tensor([28, 3]))
    torch.testing.assert_close(some, every[[28, 3]], atol=1e-5, rtol=0)
    assert decoder(tokens, step, cache, torch.tensor([], dtype=torch.int64)).shape == (0, 97)


def test_stories_greedy(data: Callable[[str], Path], ragged: Any) -> None:
    """A real model's documented greedy ids, one token per step over blocks in reverse order."""
    folder = data("model-stories260k/hf")
    want = json.loads(data("model-stories260k/greedy_256.json").read_text())["greedy_ids"]
    decoder = load(folder)
    cache = KVCache(decoder.spec, 16, 16, torch.float32, CPU)
    ids, done = want[:1], 0
    while len(ids) < len(want):
        step = ragged([(range(15, -1, -1), done, len(ids) - done)], 16)
        logits = decoder(torch.tensor(ids[done:]), step, cache, torch.tensor([len(ids) - done - 1]))
        done = len(ids)
        ids.append(int(logits.argmax()))
    assert ids == want
