"""What every test may use: the shared data (KVASIR_DATA, or `shared/data` beside the checkout) and the bundled models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("KVASIR_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """`data("folder/file")`: its path in the shared data; skips the test that asks for what isn't there."""

    def find(path: str) -> Path:
        if not (DATA / path).exists():
            pytest.skip(f"shared data {path} is not at {DATA} (set KVASIR_DATA)")
        return DATA / path

    return find
