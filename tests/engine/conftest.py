"""Fixtures of the engine's tests: small random checkpoints as transformers saves them, and ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvasir.kernels.ragged import Ragged

Part = tuple[Sequence[int], int, int]
"""(block table, start, count): `count` rows of a sequence from position `start`."""


@pytest.fixture(scope="session")
def ragged() -> Callable[[Sequence[Part], int], Ragged]:
    """`ragged(parts, block_size)`: a step over these rows."""

    def build(parts: Sequence[Part], block_size: int) -> Ragged:
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in parts])
        table = np.zeros((len(parts), max(len(blocks) for blocks, _, _ in parts)), np.int32)
        for line, (blocks, _, _) in zip(table, parts, strict=True):
            line[: len(blocks)] = blocks
        owner = np.repeat(np.arange(len(parts)), [count for _, _, count in parts])
        slots = torch.from_numpy(table).long()[owner, positions // block_size] * block_size + positions % block_size
        starts = np.cumsum([0, *(count for _, _, count in parts)]).astype(np.int32)
        lengths = np.array([start + count for _, start, count in parts], np.int32)
        tensors = (torch.from_numpy(a) for a in (starts, lengths, table))
        return Ragged(positions, slots, *tensors, starts, lengths)

    return build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """`checkpoint("Llama", **config)`: (folder saved by transformers, its float32 model), of random weights."""
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }

    def build(family: str, *, max_shard_size: str = "1GB", **changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**small, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
        model = model.float().eval()
        for name, p in model.named_parameters():
            p.data = torch.randn_like(p) * 0.2 + (1.0 if "norm" in name else 0.0)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder, model

    return build
