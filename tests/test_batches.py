"""/v1/batches of a real `kvasir serve`: low priority, two gateways of one file, and a restart in the middle."""

from __future__ import annotations

import contextlib
import itertools
import json

import openai
import pytest
from kvasir_server import LIMIT_S, start
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LINES, TOKENS = 16, 60


@contextlib.contextmanager
def served(folder):
    """A client of a `kvasir serve` whose state lies in `folder`."""
    flags = ["--max-num-seqs", "4", "--drain-timeout", "0", "--num-gateways", "2"]
    server = start(folder, *flags, "--state-path", str(folder / "state.db"))
    try:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=3, timeout=LIMIT_S) as client:
            yield client
    finally:
        status = server.stop()
    assert status == 0, "".join(server.log)


def begun(client, count):
    """Id of a batch of so many lines, of which one is wrong and some are answered."""
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/responses",
         "body": {"model": "skald", "input": f"What is {i} + 3?", "temperature": 0, "max_output_tokens": TOKENS,
                  "ignore_eos": True}}
        for i in range(count)
    ]  # fmt: skip
    lines[7]["body"]["temperature"] = -1
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={"why": "test"}
    )
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 3)
    return batch.id


def test_a_batch_survives_a_restart(tmp_path):
    with served(tmp_path) as client:
        for count in (LINES * 2**again for again in itertools.count()):
            batch = begun(client, count)
            answer = client.chat.completions.create(
                model="skald", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
            )
            assert answer.usage.completion_tokens == 1
            if client.batches.retrieve(batch).status == "in_progress":  # we weren't held up until it was over
                break
    with served(tmp_path) as client:
        until(lambda: client.batches.retrieve(batch).status not in ("validating", "in_progress", "finalizing"))
        found = client.batches.retrieve(batch)
        assert found.status == "completed"
        assert found.request_counts.to_dict() == {"total": count, "completed": count - 1, "failed": 1}
        assert found.metadata == {"why": "test"}
        answers = [json.loads(line) for line in client.files.content(found.output_file_id).text.splitlines()]
        assert sorted(int(one["custom_id"]) for one in answers) == [i for i in range(count) if i != 7]
        assert all(one["response"]["body"]["output"][0]["content"][0]["text"] for one in answers)
        assert found.usage.output_tokens == TOKENS * (count - 1)
        (wrong,) = [json.loads(line) for line in client.files.content(found.error_file_id).text.splitlines()]
        assert (wrong["custom_id"], wrong["error"]["param"]) == ("7", "temperature")
