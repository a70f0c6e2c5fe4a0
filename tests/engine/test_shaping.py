"""Shaped draws in portions: what they take is bounded, and no row's token or state changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvasir.engine import shaping
from kvasir.engine.request import SamplingParams
from kvasir.engine.shaping import LOGIT_BYTES, Shaping, shaping_bytes

ROWS, VOCAB = 5, 60
ASKED = ({"mirostat": 2}, {"typical_p": 0.5, "tfs_z": 0.9}, {"mirostat": 1, "mirostat_tau": 2.0}, {"tfs_z": 0.8})


def draws(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> tuple[list[Tensor], Tensor | None, list[int]]:
    """(tokens of six steps, Mirostat's state then, how many rows were drawn at once)."""
    sizes = []

    def noted(x: Tensor, **facts: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        sizes.append(len(x))
        return truncated(x, **facts)

    truncated = shaping.truncated
    with monkeypatch.context() as patch:
        patch.setattr(shaping, "MOST_BYTES", most_bytes)
        patch.setattr(shaping, "truncated", noted)
        shaped, seats = Shaping(8, torch.device("cpu")), np.array([6, 0, 3, 1, 4])
        for number, seat in enumerate(seats.tolist()):
            shaped.enter(seat, SamplingParams(**ASKED[number % len(ASKED)]))
        random, tokens = torch.Generator().manual_seed(1), []
        for step in range(6):
            logits = torch.randn(ROWS, VOCAB, generator=random) * 3
            uniforms = np.random.default_rng(step).random(ROWS)
            temperature, min_p = torch.linspace(0.7, 1.3, ROWS), torch.linspace(0, 0.02, ROWS)
            tokens.append(shaped.draw(logits, seats, uniforms, temperature, min_p, np.array([0, 50, 9, 0, 30])))
    return tokens, shaped._most, sizes


@pytest.mark.parametrize(("rows", "sizes"), [(2, [2, 2, 1]), (0, [1] * 5), (5, [5])])
def test_portions_change_nothing(rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is drawn alone where not even one fits."""
    whole, state, at_once = draws(monkeypatch, 1 << 30)
    assert at_once == [ROWS] * 6
    tokens, got, at_once = draws(monkeypatch, rows * VOCAB * LOGIT_BYTES + 1)
    assert at_once == sizes * 6
    assert torch.equal(torch.stack(tokens), torch.stack(whole))
    assert got is not None
    assert state is not None
    assert torch.equal(got, state)
    assert len(torch.stack(whole).unique()) > 6


def test_what_they_take_is_bounded() -> None:
    assert shaping_bytes(256, 262_144) <= 1 << 28
    assert shaping_bytes(3, 1000) == 3 * 1000 * LOGIT_BYTES


@pytest.mark.parametrize("asked", [{"mirostat": 2}, {"typical_p": 0.5}, {"tfs_z": 0.9, "top_p": 0.5}], ids=str)
def test_only_what_is_asked_for_is_computed(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    truncated = shaping.truncated
    monkeypatch.setattr(shaping, "truncated", lambda x, **facts: (given.update(facts), truncated(x, **facts))[1])
    shaped, seats = Shaping(8, torch.device("cpu")), np.array([5])
    shaped.enter(5, SamplingParams(**asked))
    ones, none = torch.ones(1), np.zeros(1, np.int64)
    shaped.draw(torch.randn(1, VOCAB), seats, np.array([0.5]), ones, ones * 0, none)
    assert given.keys() == {"top_k", *({"most", "version"} if "mirostat" in asked else asked)}
