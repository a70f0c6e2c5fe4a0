"""benchmarks/simulated_fleet.py: a real gateway answers HTTP before simulated groups, also such that have roles."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "simulated_fleet.py"


@contextlib.contextmanager
def fleet(*flags: str) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, str(SCRIPT), "--groups", "3", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            yield found.group()
        finally:
            process.terminate()


def opened(url: str, headers: dict[str, str], **body: Any) -> Any:
    body = {"model": "simulated", "ignore_eos": True} | body
    headers = {"content-type": "application/json"} | headers
    return urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers), timeout=60
    )


def test_a_real_gateway_before_simulated_groups() -> None:
    with fleet("--prefill", "1", "--step", "0.001", "1e-6", "0", "0") as url:

        def cached() -> int:
            with opened(url, {"kvasir-session": "one"}, prompt=[5] * 100, max_tokens=4) as answer:
                usage = json.load(answer)["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100, 4)
            return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

        assert [cached(), cached()] == [0, 96]

        streams = contextlib.ExitStack()
        for one in range(10):
            streams.enter_context(opened(url, {}, prompt=[one] * 20, max_tokens=10_000, stream=True))
        with streams, opened(url, {"kvasir-route": "1"}, prompt=[*range(2000)], max_tokens=20) as answer:
            told = json.load(answer)
        # the two that decode are busy: the third computes the prompt, and hands it over
        assert "why=split" in answer.headers["kvasir-route"]
        assert told["usage"]["completion_tokens"] == 20
