"""The compiled kernels for other CPUs than this one: the same numbers as here, where they equal their definitions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvasir.kernels import compiled, native

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("same_everywhere.cpp")
FLAGS = ("-O0", "-std=c++17", "-fno-math-errno", "-w")
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""For sums of size 13; pairs of bfloat16 are added up in another order than single ones."""
Found = list[tuple[str, float]]
Build = Callable[..., list[str]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, compiled_once: Callable[..., Path]) -> Build:
    """`build(compiler, inputs, *flags)`: how to run the program over these kernels."""
    folder = tmp_path_factory.mktemp("programs")

    def make(compiler: str, inputs: list[Path], *flags: str) -> list[str]:
        def compile_to(target: Path) -> None:
            call = [compiler, *FLAGS, *flags, str(PROGRAM), *map(str, inputs), "-o", str(target)]
            made = subprocess.run(call, capture_output=True, text=True)
            assert not made.returncode, made.stderr[-2000:]

        if inputs == native.sources() and compiler == compiled.compiler():
            return [str(compiled_once("program", [PROGRAM, *inputs], (*FLAGS, *flags), compile_to))]
        compile_to(target := folder / "".join(c if c.isalnum() else "_" for c in compiler + "".join(flags)))
        return [str(target)]

    return make


def numbers(call: list[str]) -> Found:
    run = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert not run.returncode, run.stderr[-2000:]
    return [(name, float(value)) for name, _, value in (line.partition(" ") for line in run.stdout.splitlines())]


@pytest.fixture(scope="module")
def here(build: Build) -> Found:
    """By the library that is served from."""
    compiler = compiled.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library, _ = compiled.compiled("kernels", native.sources())
    return numbers(build(compiler, [library], "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"))


def check(found: Found, here: Found) -> None:
    assert len(found) == len(here) > 100_000
    for (kind, value), (_, other) in zip(found, here, strict=True):
        assert abs(value - other) <= CLOSE[kind], kind


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 CPU")
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64"])
def test_older_x86(level: str, here: Found, build: Build) -> None:
    """v3: AVX2 with FMA and F16C; the other is what every 64-bit CPU has."""
    if level == "x86-64-v3" and not {"avx2", "fma", "f16c"} <= flags():
        pytest.skip("this CPU has no AVX2")
    if level == "x86-64-v3" and "avx512f" not in flags():
        pytest.skip("what is served from here is compiled for no more")
    compiler = compiled.compiler()
    assert compiler is not None
    check(numbers(build(compiler, native.sources(), f"-march={level}")), here)


def flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def test_neon(here: Found, build: Build) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian's packages)")
    check(numbers([emulator, *build(compiler, native.sources(), "-static")]), here)
