"""The stubs in `proto/` are those that the sources give."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import kvasir.proto

FOLDER = Path(kvasir.proto.__path__[0])


def test_stubs_are_fresh(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    made = {path.name: path.read_text() for path in generate.generate(tmp_path)}
    there = {path.name: path.read_text() for path in FOLDER.glob("*_pb2*.py*")}
    stale = [name for name in made.keys() | there.keys() if made.get(name) != there.get(name)]
    assert not stale, f"run `make proto`: {sorted(stale)}"
