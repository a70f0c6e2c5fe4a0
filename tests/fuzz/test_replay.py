"""The corpus of the fuzzers, as it is and cut short: what was found once stays mended. `make fuzz` looks for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).parent
SEEDS = sorted(path.relative_to(HERE / "corpus") for path in (HERE / "corpus").rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_replay(seed):
    data = (HERE / "corpus" / seed).read_bytes()
    target = TARGETS[seed.parts[0]]
    for end in {0, len(data) // 4, len(data) // 2, len(data) * 3 // 4, max(0, len(data) - 1), len(data)}:
        target(data[:end])


def test_every_target_has_seeds():
    assert {seed.parts[0] for seed in SEEDS} == set(TARGETS)
