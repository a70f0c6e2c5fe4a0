"""Sums and messages between processes of a node under sanitizers: nothing is read while it is written, or beside what is there."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvasir.kernels import compiled, native

PROGRAM = Path(__file__).with_name("shared_memory.cpp")
SOURCES = [native.HERE / name for name in ("board_cpu.cpp", "node_sums_cpu.cpp")]
FLAGS = ("-g1", "-std=c++17", "-w", "-fno-sanitize-recover=all", "-pthread")


@pytest.mark.parametrize(("sanitizer", "level"), [("thread", "-O1"), ("address,undefined", "-O0")])
def test_under_sanitizers(sanitizer: str, level: str, compiled_once: Callable[..., Path]) -> None:
    """Each at the level at which compiling and running together are quickest."""
    compiler = compiled.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    march = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
    flags = (*FLAGS, level, march, f"-fsanitize={sanitizer}")
    inputs = [PROGRAM, *SOURCES]

    def make(target: Path) -> None:
        made = subprocess.run([compiler, *flags, *inputs, "-o", target], capture_output=True, text=True)
        if "cannot find" in made.stderr or "unrecognized argument" in made.stderr:
            pytest.skip(f"{compiler} has no sanitizer for this: {made.stderr[:200]}")
        assert not made.returncode, made.stderr[-2000:]

    target = compiled_once("shared-memory", inputs, flags, make)
    run = subprocess.run([target], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout == "0 wrong\n"
