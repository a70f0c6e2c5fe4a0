"""Encoders equal transformers: every row sees its whole text, whoever else is in the step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine import rows
from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.mesh import Mesh
from kvasir.engine.share import share_of
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert-relu": ("Bert", {"hidden_act": "relu", "type_vocab_size": 1}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1}),
    "nomic-bert": ("NomicBert", {}),
    "jina-v3": ("JinaEmbeddingsV3", {}),
    "qwen2-bidirectional": ("Qwen2", {"is_causal": False}),
    "qwen3-bidirectional": ("Qwen3", {"is_causal": False, "head_dim": 16}),
    "llama-bidirectional": ("Llama", {"is_causal": False}),
    "mistral-bidirectional": ("Mistral", {"is_causal": False, "sliding_window": 9}),
    "gemma2-bidirectional": ("Gemma2", {"norm": 0.0, "is_causal": False, "sliding_window": 9, "head_dim": 16}),
    "mistral-embedder": ("Mistral", {"sliding_window": 9}),
    "embedding-gemma": (
        "Gemma3Text",
        {"norm": 0.0, "use_bidirectional_attention": True, "sliding_window": 9, "num_hidden_layers": 7, "head_dim": 16},
    ),
}


def hidden(
    decoder: Decoder, prompts: list[list[int]], ragged: Any, types: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Last hidden states of these prompts, all computed in one step."""
    blocks = iter(range(1, 100))
    tables = [[next(blocks) for _ in range(-(-len(p) // 16))] for p in prompts]
    cache = KVCache(decoder.share.spec, 100, 16, decoder.dtype, CPU, layers=decoder.share.layers)
    cache.arena.fill_(255)
    step = ragged([(table, 0, len(p)) for table, p in zip(tables, prompts, strict=True)], 16)
    x = decoder.hidden(torch.tensor([t for p in prompts for t in p]), step, cache, None, types)
    return list(x.split([len(p) for p in prompts])) if decoder.share.last else []


@pytest.fixture(scope="module")
def encoder(checkpoint: Callable[..., tuple[Path, Any]]) -> Callable[..., tuple[Decoder, Any]]:
    def build(family: str, **changes: Any) -> tuple[Decoder, Any]:
        folder, model = checkpoint(family, auto="AutoModel", **changes)
        config = json.loads((folder / "config.json").read_text())
        return load_decoder(folder, load_spec(config | changes), dtype=torch.float32, device=CPU), model

    return build


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal(case: str, encoder: Callable[..., tuple[Decoder, Any]], ragged: Any) -> None:
    family, changes = CASES[case]
    decoder, model = encoder(family, **changes)
    rng = random.Random(case)
    prompts = [[rng.randrange(3, 97) for _ in range(n)] for n in (70, 1, 33, 16, 12)]
    for prompt, got in zip(prompts, hidden(decoder, prompts, ragged), strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).last_hidden_state[0]
        assert (got - want).abs().max() <= 1e-4


OWN_LAYOUT = {"llama-bidirectional", "qwen2-bidirectional", "qwen3-bidirectional", "bert-relu"}
"""Which differ from another case by nothing that ranks would notice."""


@pytest.mark.parametrize(
    ("case", "tp", "pp", "dealt"),
    [
        *(("bert", *layout) for layout in [(2, 1, False), (1, 2, False), (2, 2, True)]),
        *((case, 2, 2, False) for case in CASES if case not in OWN_LAYOUT),
    ],
)
def test_hidden_states_equal_on_ranks(
    case: str,
    tp: int,
    pp: int,
    dealt: bool,
    checkpoint: Callable[..., tuple[Path, Any]],
    ragged: Any,
    on_ranks: Any,
    monkeypatch: Any,
) -> None:
    """Rows dealt out between the ranks of a stage, or not."""
    monkeypatch.setattr(rows, "dealing_wins", lambda mesh, *_: dealt)
    family, changes = CASES[case]
    folder, model = checkpoint(family, auto="AutoModel", **changes)
    spec = load_spec(json.loads((folder / "config.json").read_text()) | changes)
    prompts = [list(range(3, 3 + n)) for n in (30, 1, 12)]

    def work(mesh: Mesh) -> list[torch.Tensor]:
        return hidden(
            load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=share_of(spec, mesh)), prompts, ragged
        )

    for got, prompt in zip(on_ranks(tp, pp, work)[tp * (pp - 1)], prompts, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).last_hidden_state[0]
        assert (got - want).abs().max() <= 1e-4


def test_segments_of_a_pair(encoder: Callable[..., tuple[Decoder, Any]], ragged: Any) -> None:
    decoder, model = encoder("Bert")
    prompt, types = list(range(10, 30)), torch.tensor([0] * 8 + [1] * 12)
    with torch.no_grad():
        want = model(torch.tensor([prompt]), token_type_ids=types[None]).last_hidden_state[0]
    (got,) = hidden(decoder, [prompt], ragged, types)
    assert (got - want).abs().max() <= 1e-4
    assert (got - hidden(decoder, [prompt], ragged)[0]).abs().max() > 0.01
