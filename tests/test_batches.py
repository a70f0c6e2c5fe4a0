"""/v1/batches of a real `kvasir serve`: low priority, two gateways of one file, and a restart in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LINES, TOKENS = 16, 60


@contextlib.contextmanager
def served(folder):
    """An address of a `kvasir serve` whose state lies in `folder`."""
    flags = ["--port", "0", "--grpc-port", "-1", "--max-num-seqs", "4", "--drain-timeout", "0", "--num-gateways", "2"]
    command = [sys.executable, "-m", "kvasir.cluster.cli", "serve", *flags, "--state-path", str(folder / "state.db")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OTEL_"))}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        log = []
        reader = threading.Thread(target=lambda: log.extend(process.stdout), daemon=True)
        lines = iter(process.stdout.readline, "")
        url = None
        for line in lines:
            log.append(line)
            if (found := re.search(r"http://[\w.]+:\d+", line)) and url is None:
                url = found.group()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + "/health", timeout=60).close()
                    break
        assert url, "".join(log)
        reader.start()
        try:
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            reader.join()


def client_of(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=3, timeout=60)


def test_a_batch_survives_a_restart(tmp_path):
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/responses",
         "body": {"model": "skald", "input": f"What is {i} + 3?", "temperature": 0, "max_output_tokens": TOKENS,
                  "ignore_eos": True}}
        for i in range(LINES)
    ]  # fmt: skip
    lines[7]["body"]["temperature"] = -1
    data = "\n".join(map(json.dumps, lines)).encode()
    with served(tmp_path) as url, client_of(url) as client:
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={"why": "test"}
        )
        while (found := client.batches.retrieve(batch.id)).request_counts.completed < 3:
            assert found.status in ("validating", "in_progress")
            time.sleep(0.02)
        answer = client.chat.completions.create(
            model="skald", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
        assert answer.usage.completion_tokens == 1
        assert client.batches.retrieve(batch.id).status == "in_progress"
    with served(tmp_path) as url, client_of(url) as client:
        limit = time.monotonic() + 60
        while (found := client.batches.retrieve(batch.id)).status != "completed":
            assert time.monotonic() < limit, found
            time.sleep(0.05)
        assert found.request_counts.to_dict() == {"total": LINES, "completed": LINES - 1, "failed": 1}
        assert found.metadata == {"why": "test"}
        answers = [json.loads(line) for line in client.files.content(found.output_file_id).text.splitlines()]
        assert sorted(int(one["custom_id"]) for one in answers) == [i for i in range(LINES) if i != 7]
        assert all(one["response"]["body"]["output"][0]["content"][0]["text"] for one in answers)
        assert found.usage.output_tokens == TOKENS * (LINES - 1)
        (wrong,) = [json.loads(line) for line in client.files.content(found.error_file_id).text.splitlines()]
        assert (wrong["custom_id"], wrong["error"]["param"]) == ("7", "temperature")
