"""What was said before reaches the model in every dialect, or is refused: the template knows three roles and tools."""

from __future__ import annotations

import httpx
import pytest
from fake_gateway import END, LiveGateway
from responses_calls import post, prompt_of

TEMPLATE = """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.role in ("system", "user", "assistant") %}{{ m.role[0] }}:{{ m.content }}
{%- for call in m.tool_calls or [] %}({{ call.id }} {{ call.function.name }}
{%- for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}){% endfor %}|
{%- elif m.role == "tool" %}{{ m.tool_call_id }}={{ m.content }}|
{%- endif %}{% endfor %}"""
USER = {"role": "user", "content": "Hi"}
DEVELOPER = {"role": "developer", "content": "In French."}


@pytest.fixture(scope="module")
def strict(byte_model):
    with LiveGateway(byte_model, chat_template=TEMPLATE) as live:
        yield live


def chat(gateway, *messages, path="/v1/chat/completions"):
    return httpx.post(gateway.url + path, json={"model": "bytes", "messages": messages, "stream": False}, timeout=60)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_what_a_developer_says(strict, path):
    assert chat(strict, DEVELOPER, USER, path=path).status_code == 200
    assert prompt_of(strict) == b"s:In French.|u:Hi|"


def test_what_a_developer_says_in_a_response(strict):
    assert post(strict, input=[DEVELOPER, USER]).status_code == 200
    assert prompt_of(strict) == b"s:In French.|u:Hi|"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_a_role_that_the_template_lacks(strict, path):
    reply = chat(strict, USER, {"role": "critic", "content": "Bad."}, path=path)
    assert reply.status_code == 400
    assert "messages[1].role: the chat template doesn't show a 'critic' message" in reply.text


def test_errors_name_what_the_client_sent(byte_model):
    with LiveGateway(
        byte_model, chat_template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    ) as live:
        error = post(live, instructions="Be brief.").json()["error"]
        assert (error["param"], error["message"][:16]) == ("input", "input.role: the ")
        body = {"model": "bytes", "prompt": "Hi", "system": "Be brief."}
        assert httpx.post(live.url + "/api/generate", json=body).json()["error"].startswith("system.role: the chat")


def test_functions_of_the_older_form(strict):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": "11"}
    assert chat(strict, USER, call, result, call, result).status_code == 200
    assert prompt_of(strict) == (b"u:Hi|a:(call00001 f x=1)|call00001=11|a:(call00003 f x=1)|call00003=11|")
    error = chat(strict, USER, {**call, "function_call": {"arguments": "{}"}}).json()["error"]
    assert error["message"].startswith("messages[1].function_call must be an object with a name")
    assert chat(strict, USER, {"role": "assistant", "content": "Ja.", "function_call": None}).status_code == 200


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"refusal": "No.", "content": None}, b"No."),
        ({"refusal": None, "content": "Yes."}, b"Yes."),
        ({"refusal": "No.", "content": "Well."}, b"Well.\nNo."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, b"No."),
    ],
)
def test_refusals_are_read(strict, message, text):
    assert chat(strict, USER, {"role": "assistant", **message}, USER).status_code == 200
    assert prompt_of(strict) == b"u:Hi|a:" + text + b"|u:Hi|"


@pytest.mark.parametrize("message", [{"refusal": 1}, {"content": [{"type": "refusal"}]}])
def test_refusals_that_are_none(strict, message):
    reply = chat(strict, USER, {"role": "assistant", **message})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


def test_a_call_that_was_cut_short_may_be_followed(strict, byte_model):
    """As the model began it; a client that sends no messages hears of its own fields."""
    cut = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os'
    with LiveGateway(byte_model, chat_template=TEMPLATE, tool_call_parser="hermes") as live:
        live.group.script = lambda request, index: [*cut.encode()]
        tools = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}]
        first = post(live, tools=tools, max_output_tokens=len(cut)).json()
        assert (first["status"], first["output"][0]["arguments"]) == ("incomplete", '{"city": "Os')
        live.group.script = lambda request, index: [*b"Yes", END]
        result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "11"}
        assert post(live, previous_response_id=first["id"], input=[result]).status_code == 200
        assert b'get_weather INVALID_JSON={"city": "Os)' in prompt_of(live)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Os'}}
    assert chat(strict, USER, {"role": "assistant", "tool_calls": [call]}, USER).status_code == 200
    assert prompt_of(strict) == b'u:Hi|a:(c1 f INVALID_JSON={"city": "Os)|u:Hi|'
