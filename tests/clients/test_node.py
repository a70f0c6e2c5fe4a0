"""Clients in JavaScript. Their packages are pinned in package-lock.json, and installed where the test runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One with the packages and our scripts."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("clients in JavaScript need node 20 or newer and npm on the PATH")
    place = tmp_path_factory.mktemp("node")
    for file in (*HERE.glob("package*.json"), *HERE.glob("*.mjs")):
        shutil.copy(file, place)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(install, cwd=place, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("name", ["openai", "ollama"])
def test_client(server, folder, name):
    def use() -> None:
        command = ["node", f"use_{name}.mjs", server.url, server.key]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.endswith("DONE\n")

    server.cancelled(use)
