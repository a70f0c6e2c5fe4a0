"""benchmarks/simulated_fleet.py: a real gateway answers HTTP before simulated groups, and a group's end is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "simulated_fleet.py"


def test_a_real_gateway_before_simulated_groups() -> None:
    command = [sys.executable, str(SCRIPT), "--groups", "3", "--step", "0.001", "1e-6", "0", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None

            def cached() -> int:
                body = {"model": "simulated", "prompt": [5] * 100, "max_tokens": 4, "ignore_eos": True}
                headers = {"content-type": "application/json", "kvasir-session": "one"}
                asked = urllib.request.Request(f"{found.group()}/v1/completions", json.dumps(body).encode(), headers)
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    usage = json.load(answer)["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 4)
                return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

            assert [cached(), cached()] == [0, 96]
        finally:
            process.terminate()
