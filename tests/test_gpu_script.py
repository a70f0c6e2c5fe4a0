"""benchmarks/gpu.sh says how every stage ended, whatever became of the stages; a script stands in for Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def started(folder: Path, cases: str) -> subprocess.Popen[str]:
    """The script with a Python that does what `cases` of a shell's `case` say of its arguments."""
    fake = folder / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in {cases} *) exit 0;; esac\n')
    fake.chmod(0o700)
    env = os.environ | {"DEVICE": "cpu", "OUT": str(folder / "out"), "PYTHON": str(fake)}
    return subprocess.Popen(["bash", str(SCRIPT)], env=env, stdout=subprocess.PIPE, text=True)


def stages(folder: Path) -> dict[str, str]:
    file = folder / "out" / "stages.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["stage"]: line["outcome"] for line in lines}


def test_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    run = started(tmp_path, "*kernels.py*) exit 3;;")
    said, _ = run.communicate(timeout=60)
    found = stages(tmp_path)
    assert run.returncode == 1
    assert found.pop("kernels") == "exit status 3"
    assert set(found.values()) == {"ok"}
    assert len(found) > 5
    assert "| kernels | 0 | exit status 3 |" in said
    assert "something failed" in said


def test_a_script_that_is_stopped_has_its_table(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    run = started(tmp_path, f"*kernels.py*) touch {begun}; exec sleep 600;;")
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert list(stages(tmp_path).values()) == ["ok", "stopped with the script"]
    assert "| kernels | 0 | stopped with the script |" in said
