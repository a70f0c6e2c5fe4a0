"""Who may import what (the table of the design), read off the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)
OURS = {
    "proto": {"proto"},
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "cluster": {"cluster", "engine", "proto"},
}
"""Folder -> folders of ours that it may import."""
OTHERS = {
    "proto": {"google", "grpc", "grpc_tools"},
    "kernels": {"torch", "numpy"},
    "engine": {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "llguidance", "tqdm"},
    "cluster": {
        "aiohttp", "fastapi", "google", "grpc", "grpc_health", "grpc_reflection", "httptools", "numpy", "opentelemetry",
        "orjson", "prometheus_client", "ray", "starlette", "tqdm", "uvicorn", "uvloop", "yaml",
    },
}  # fmt: skip
"""Folder -> packages of others that it may import at the top of a module."""
LAZY = {"engine": {"transformers", "huggingface_hub"}, "cluster": {"torch"}}
"""Only inside functions: slow to import, needed by few."""
PLAIN = (
    "errors",
    "request",
    "beam_search",
    "thoughts",
    "event",
    "step",
    "config",
    "info",
    "blocks",
    "sequence",
    "scheduler",
    "stats",
    "seats",
    "planning",
    "beams",
    "beam_search",
    "prompt_cut",
    "admission",
    "layout",
    "loads",
    "pulls",
    "lends",
    "parts",
    "peer_wire",
    "prices",
    "tables",
    "spec",
)
"""Modules of the engine that a gateway or a test imports without anything installed."""


def modules(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported at the top) of each import; what only type checkers read is left out."""
    tree = ast.parse(path.read_text())
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    typing = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
              for n in ast.walk(i)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) not in inner) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", id(node) not in inner


@pytest.mark.parametrize("folder", OURS)
def test_imports_go_down_the_table(folder: str) -> None:
    wrong = []
    for path in modules(folder):
        for module, at_top in imports(path):
            first, *rest = module.split(".")
            if first in STDLIB:
                continue
            if first == "kvasir":
                good = rest[0] in OURS[folder]
            elif first == "triton":
                good = folder == "kernels" and path.stem.endswith("_triton")
            else:
                good = first in OTHERS[folder] or (first in LAZY.get(folder, ()) and not at_top)
            if not good:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("name", PLAIN)
def test_the_border_needs_the_standard_library_alone(name: str) -> None:
    found = {module for module, _ in imports(ROOT / "engine" / f"{name}.py")}
    others = {module for module in found if module.split(".")[0] not in STDLIB}
    assert others <= {f"kvasir.engine.{plain}" for plain in PLAIN}


@pytest.mark.parametrize(
    "module",
    [
        "kvasir.engine",
        "kvasir.engine.spoke",
        "kvasir.engine.worker",
        "kvasir.cluster.rank_actor",
        "kvasir.cluster.application",
        "kvasir.cluster.gateway",
        "kvasir.cluster.cli",
        "kvasir.cluster.model_commands",
    ],
)
def test_what_starts_quickly_loads_no_torch(module: str, tmp_path: Path) -> None:
    code = f"import {module}, sys; print(*(m for m in ('torch', 'transformers', 'triton') if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("name", ["kernels", "engine", "cluster", "proto"])
def test_our_folders_are_not_importable_by_their_bare_names(name: str, tmp_path: Path) -> None:
    """`kernels` and `proto` are packages of others, which libraries look for."""
    code = f"import importlib.util as util; found = util.find_spec({name!r}); print(found and found.origin)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"{ROOT / name}/" not in run.stdout
