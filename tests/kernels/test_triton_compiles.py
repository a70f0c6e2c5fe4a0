"""Every Triton kernel compiles for GPUs that aren't there: nothing spills, and what a block shares fits.

All cases for all targets take minutes: `TRITON_INTERPRET=0 python tests/kernels/compile_triton.py cuda:90 all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_triton.py")
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}
"""KiB that a block may share."""


@pytest.mark.parametrize("target", SHARED)
def test_compiles_without_spills(target: str) -> None:
    # not in this process: its kernels are interpreted
    run = subprocess.run(
        [sys.executable, str(SCRIPT), target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) >= 3
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED[target] * 1024, kernel
