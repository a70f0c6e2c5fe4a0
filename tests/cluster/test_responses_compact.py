"""/v1/responses/compact: a conversation as a summary."""

from __future__ import annotations

import httpx
import pytest
from responses_calls import post, prompt_of


def compacted(gateway, **body):
    return httpx.post(gateway.url + "/v1/responses/compact", json={"model": "bytes"} | body, timeout=60)


def test_the_next_turn_reads_the_summary(gateway, monkeypatch):
    monkeypatch.setattr(gateway.group, "script", lambda request, index: [*b" Ann wants tea. ", 256])
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "I am Ann. Tea, please."}]
    small = compacted(gateway, input=said).json()
    assert prompt_of(gateway).decode().endswith("Write nothing but the summary.")
    post(gateway, input=[*small["output"], {"role": "user", "content": "What do I want?"}])
    summary = "Be brief.\n\nSummary of the conversation so far:\nAnn wants tea."
    assert prompt_of(gateway).decode() == f"{summary}What do I want?"


@pytest.mark.parametrize(
    ("answer", "why"), [([*b"  ", 256], "wrote no summary"), (b"Ann wants", "had no end after 1024 tokens")]
)
def test_a_summary_that_says_nothing_is_an_error(gateway, monkeypatch, answer, why):
    monkeypatch.setattr(gateway.group, "script", lambda request, index: answer)
    answered = compacted(gateway, input="Tea, please.")
    assert answered.status_code == 500
    assert why in answered.json()["error"]["message"]


def test_a_summary_is_written_without_thoughts(gateway, monkeypatch):
    model, rendered = type(gateway.model), []
    render = model._render

    def seen(self, conversation):
        rendered.append(conversation)
        return render(self, conversation)

    monkeypatch.setattr(model, "_render", seen)
    assert compacted(gateway, input="Tea").status_code == 200
    assert rendered
    assert all(one.variables["enable_thinking"] is False for one in rendered)


def test_a_compaction_has_its_id_and_takes_what_says_nothing(gateway):
    neutral = {
        "stream": False,
        "store": False,
        "background": False,
        "tools": [],
        "include": [],
        "metadata": {},
        "unknown": 1,
    }
    neutral |= {
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {},
        "reasoning": {},
    }
    reply = compacted(gateway, input="Tea", request_id="mine", **neutral)
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, "mine"), reply.text
    assert gateway.group.requests[-1].request_id.startswith("mine")
    assert reply.headers["x-kvasir-warning"] == "ignored: unknown"


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"tools": [{"type": "function", "name": "f"}]}, {"temperature": 1}]
)
def test_a_compaction_refuses_what_it_doesnt_read(gateway, fields):
    reply = compacted(gateway, input="Tea", **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, *fields)


@pytest.mark.parametrize("field", ["id", "status", "phase"])
def test_facts_of_items_are_texts(gateway, field):
    answer = post(gateway, input=[{"role": "user", "content": "Hi", field: 5}])
    assert answer.status_code == 400
    assert f"input[0].{field} must be a string" in answer.json()["error"]["message"]
