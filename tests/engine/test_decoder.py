"""The decoder: types, wanted rows, a real model's documented text. test_parity.py compares it with transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    return load_decoder(folder, spec, dtype=dtype, device=CPU)


def test_bfloat16_is_close(checkpoint: Callable[..., tuple[Path, Any]], in_chunks: Any) -> None:
    folder, model = checkpoint("Qwen3", head_dim=32)
    prompts = [[random.Random(s).randrange(97) for _ in range(40)] for s in range(3)]
    ours = in_chunks(load(folder, torch.bfloat16), prompts, 16, seed=1)
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
