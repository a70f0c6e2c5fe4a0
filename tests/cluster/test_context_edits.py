"""Anthropic's context_management, by its own client where that knows it."""

from __future__ import annotations

import asyncio
import json

import anthropic
import httpx
import pytest

from kvasir.cluster.anthropic_schema import parse_messages
from kvasir.cluster.context_edits import CLEARED, edited

RESULT = "It rains and rains and rains and rains and rains and rains in Bergen."


def use(number, tool="weather"):
    """A turn of the model's and the result that it was given."""
    called = {"type": "tool_use", "id": f"toolu_{number}", "name": tool, "input": {"city": f"Town{number}"}}
    thought = {"type": "thinking", "thinking": f"Thought{number}.", "signature": "x"}
    result = {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": f"{number}: {RESULT}"}
    return [{"role": "assistant", "content": [thought, called]}, {"role": "user", "content": [result]}]


MESSAGES = [{"role": "user", "content": "Rain?"}, *use(0), *use(1, "news"), *use(2), *use(3)]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "news")]
ASK = {"model": "bytes", "max_tokens": 9, "messages": MESSAGES, "tools": TOOLS}


def edit(kind, **fields):
    return {"edits": [{"type": kind, **fields}]}


def uses(value=1, **fields):
    given = {"trigger": {"type": "input_tokens", "value": 50}, "keep": {"type": "tool_uses", "value": value}, **fields}
    return edit("clear_tool_uses_20250919", **given)


@pytest.fixture
def client(thinker):
    with anthropic.Anthropic(base_url=thinker.url, api_key="any", max_retries=0) as client:
        yield client


def prompt(gateway):
    return bytes(i for i in gateway.group.requests[-1].prompt_token_ids if i < 256).decode()


def kept(gateway):
    """Numbers of the results that the model read."""
    return [number for number in range(4) if f"{number}: {RESULT}" in prompt(gateway)]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (uses(), [3]), (uses(0), []), (uses(4), [0, 1, 2, 3]), (uses(2, exclude_tools=["weather"]), [0, 2, 3]),
        (uses(trigger={"type": "tool_uses", "value": 3}), [3]),
        (uses(trigger={"type": "tool_uses", "value": 4}), [0, 1, 2, 3]),
        (uses(trigger={"type": "input_tokens", "value": 10000}), [0, 1, 2, 3]),
        (uses(clear_at_least={"type": "input_tokens", "value": 80}), [3]),
        (uses(clear_at_least={"type": "input_tokens", "value": 4000}), [0, 1, 2, 3]),
        (edit("clear_tool_uses_20250919"), [0, 1, 2, 3]), ({"edits": []}, [0, 1, 2, 3]), ({}, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_old_results_are_cleared(thinker, client, given, left):
    client.beta.messages.create(**ASK)
    whole = len(thinker.group.requests[-1].prompt_token_ids)
    found = client.beta.messages.create(**ASK, context_management=given)
    assert kept(thinker) == left
    assert prompt(thinker).count(CLEARED) == 4 - len(left)
    freed = whole - len(thinker.group.requests[-1].prompt_token_ids)
    applied = {"type": "clear_tool_uses_20250919", "cleared_tool_uses": 4 - len(left), "cleared_input_tokens": freed}
    told = found.context_management.to_dict()
    assert told == {"applied_edits": [applied] if freed else []}
    with client.beta.messages.stream(**ASK, context_management=given) as stream:
        ends = [event for event in stream if event.type == "message_delta"]
    assert [end.context_management.to_dict() for end in ends] == [told]
    fields = {name: value for name, value in ASK.items() if name != "max_tokens"}
    counted = client.beta.messages.count_tokens(**fields, context_management=given)
    assert counted.context_management.original_input_tokens - counted.input_tokens == freed


class AllShown:
    """A model whose template shows everything."""

    async def encode(self, conversation):
        return [*json.dumps(conversation.messages).encode()]


def shown(management):
    """(what such a model reads of the conversation, the edits that were applied)."""
    ask = parse_messages({**ASK, "context_management": management})
    found, applied = asyncio.run(edited(AllShown(), ask.conversation, ask.edits))
    return json.dumps(found.messages), applied


@pytest.mark.parametrize(("inputs", "gone"), [(False, []), (True, [0, 1]), (["news"], [1]), (["zz"], []), (None, [])])
def test_inputs_go_with_their_results(inputs, gone):
    text, applied = shown(uses(2, clear_tool_inputs=inputs))
    assert [number for number in range(4) if f"Town{number}" not in text] == gone
    assert (text.count(CLEARED), applied[0]["cleared_tool_uses"]) == (2, 2)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"type": "thinking_turns", "value": 2}, [2, 3]), (None, [3]), ("all", [0, 1, 2, 3]),
        ({"type": "all"}, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_old_thoughts_are_cleared(keep, left):
    text, applied = shown(edit("clear_thinking_20251015", keep=keep))
    assert [number for number in range(4) if f"Thought{number}." in text] == left
    assert [one["cleared_thinking_turns"] for one in applied] == ([4 - len(left)] if len(left) < 4 else [])


def test_edits_follow_each_other():
    both = [*edit("clear_thinking_20251015")["edits"], *uses()["edits"]]
    whole, _ = shown({"edits": []})
    text, applied = shown({"edits": both})
    assert [one["type"] for one in applied] == [one["type"] for one in both]
    assert sum(one["cleared_input_tokens"] for one in applied) == len(whole) - len(text)


def test_nobody_who_didnt_ask_is_told(thinker):
    assert "context_management" not in httpx.post(thinker.url + "/v1/messages", json=ASK, timeout=60).json()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (edit("compact_20260112"), "'compact_20260112'"),
        (edit("clear_thinking_20251015", keep="some"), "edits[0].keep"),
        (edit("clear_thinking_20251015", keep={"type": "thinking_turns", "value": 0}), "edits[0].keep"),
        (edit("clear_thinking_20251015", trigger={}), "edits[0].trigger"),
        (uses(-1), "edits[0].keep"), (uses(True), "edits[0].keep"),
        (uses(trigger={"type": "days", "value": 1}), "edits[0].trigger"), (uses(exclude_tools="weather"), "exclude_tools"),
        (uses(clear_tool_inputs=[1]), "clear_tool_inputs"), (uses(mood=1), "edits[0].mood"),
        ({"edits": {}}, "list of edits"), ({"edits": [1]}, "edits[0]"), ([], "an object"), ({"more": 1}, "an object"),
    ],
)  # fmt: skip
def test_refused_by_name(thinker, given, word):
    reply = httpx.post(thinker.url + "/v1/messages", json={**ASK, "context_management": given}, timeout=60)
    assert (reply.status_code, word in reply.json()["error"]["message"]) == (400, True), reply.text
