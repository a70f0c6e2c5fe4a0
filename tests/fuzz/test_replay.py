"""The corpus of the fuzzers, as it is and cut short: what was found once stays mended. `make fuzz` looks for more."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEEDS = sorted(path.relative_to(HERE / "corpus") for path in (HERE / "corpus").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def targets():
    return runpy.run_path(str(HERE / "targets.py"))["TARGETS"]


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_replay(targets, seed):
    data = (HERE / "corpus" / seed).read_bytes()
    target = targets[seed.parts[0]]
    for end in {0, len(data) // 4, len(data) // 2, len(data) * 3 // 4, max(0, len(data) - 1), len(data)}:
        target(data[:end])


def test_every_target_has_seeds_and_is_run(targets):
    assert {seed.parts[0] for seed in SEEDS} == set(targets)
    (names,) = re.findall(r"^NAMES = \((.*?)\)", (HERE / "run.py").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"(\w+)"', names)) == set(targets)
