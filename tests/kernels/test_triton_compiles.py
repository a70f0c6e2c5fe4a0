"""Every Triton kernel compiles for GPUs that aren't there: nothing spills, and what a block shares fits.

Every kernel for each target, attention in one kind; whoever changes a kernel or its tiles compiles all kinds, which takes
minutes for each:
`TRITON_INTERPRET=0 python tests/kernels/compile_triton.py TARGET all`, TARGET being cuda:80, cuda:90, cuda:100 or hip:gfx942;
every line should say `"spilled": 0`.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_triton.py")
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}
"""KiB that a block may share."""


def said(*words: str) -> list[dict[str, Any]]:
    """Not in this process: its kernels are interpreted."""
    call = [sys.executable, str(SCRIPT), *words]
    run = subprocess.run(call, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_step_compiles_because_of_its_size() -> None:
    """Steps of 16 and more sequences or rows need what steps of 1 to 3 needed, and nothing else."""
    (found,) = said("cuda:90", "variants")
    assert found["kernels"] > 20
    assert not found["differ"], "\n".join(found["differ"])


def launched() -> set[str]:
    """Every kernel: other functions that Triton compiles don't ask which program they are."""
    files = (SCRIPT.parents[2] / "kernels").glob("*_triton.py")
    found = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in found if "tl.program_id" in ast.unparse(node)}


@pytest.fixture(scope="module")
def few() -> list[dict[str, Any]]:
    return said("few")


@pytest.mark.parametrize("target", SHARED)
def test_compiles_without_spills(target: str, few: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in few if kernel["target"] == target]
    assert {kernel["kernel"] for kernel in kernels} == launched()
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED[target] * 1024, kernel
