"""The wheel must hold every package: setuptools can't discover renamed ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "engine", "kernels", "proto")


def listed() -> set[str]:
    """Packages that pyproject.toml names. (Python 3.10 can't read TOML by itself.)"""
    found = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return set(re.findall(r'"(.*?)"', found[1]))


def test_every_package_is_listed() -> None:
    inits = [init for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")]
    there = {"kvasir." + ".".join(init.parent.relative_to(ROOT).parts) for init in inits}
    assert listed() == there | {"kvasir.models"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    sources = [
        path
        for folder in FOLDERS
        for pattern in ("*.py", "py.typed", "*.proto", "*.cpp", "*.h")
        for path in (ROOT / folder).rglob(pattern)
    ]
    missing = {f"kvasir/{path.relative_to(ROOT)}" for path in sources} - wheel
    assert not missing


def test_the_wheel_holds_the_bundled_models(wheel: set[str]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert f"kvasir/models/skald/{name}" in wheel
