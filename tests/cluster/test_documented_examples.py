"""Every curl example of Ollama's documentation gets the documented shape of answer, or a refusal by name."""

from __future__ import annotations

import json
import re
import shlex

import httpx

BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
URL = re.compile(r"http://localhost:11434(/(?:api|v1/messages)[^\s\"']*)")
COUNTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}
ANSWERS = {
    "/api/generate": {"model", "created_at", "response", "done", "done_reason"},
    "/api/chat": {"model", "created_at", "message", "done", "done_reason"},
    "/api/tags": {"models"},
    "/api/ps": {"models"},
    "/api/version": {"version"},
    "/api/show": {"modelfile", "parameters", "template", "details", "model_info", "capabilities"},
    "/v1/messages": {"id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage"},
}
REFUSED = {
    "suffix": "does not support insert",  # the model of these tests fills no gaps
    "images": "images",
    "think": "no thoughts",  # nor does it think
    "input": "can't embed",  # nor does it embed
    "thinking": "no thoughts",
    "image": "image",
}
"""Field -> what the refusal of an example says that has it."""
UNMANAGED = ("/api/create", "/api/pull", "/api/push", "/api/copy", "/api/delete")


def examples(folder):
    """(method, path, body as text or None)."""
    for file in sorted(folder.rglob("*.md*")):
        for block in BLOCK.findall(file.read_text()):
            for command in re.split(r"(?m)^\s*(?=curl )", block):
                if command.startswith("curl") and (url := URL.search(command)) and "blobs" not in url[1]:
                    words = [word.strip() for word in shlex.split(command)]  # a line's end that is escaped stays
                    body = words[words.index("-d") + 1] if "-d" in words else None
                    yield "DELETE" if "DELETE" in words else "POST" if body else "GET", url[1], body


def test_examples(gateway, data):
    found = [*examples(data("api-ollama/docs"))]
    assert len(found) >= 45
    answered = [_check(gateway, *example) for example in found]
    assert sum(answered) >= 20


def _check(gateway, method, path, body) -> bool:
    """Whether it was answered; else the refusal names what isn't supported."""
    content = re.sub(r'"model": ?"[^"]*"', '"model": "bytes"', body) if body else None
    json_type = {"Content-Type": "application/json"} if path.startswith("/v1/") else {}  # which those examples say
    reply = httpx.request(method, gateway.url + path, content=content, headers=json_type, timeout=60)
    place = (path, body, reply.text)
    streamed = body is not None and '"stream": true' in body
    if reply.status_code == 200:
        if path == "/v1/messages" and streamed:
            assert "event: message_stop" in reply.text, place
            return True
        answer = json.loads(reply.text.splitlines()[-1])
        assert answer.keys() >= ANSWERS[path], place
        if path in ("/api/generate", "/api/chat") and answer["done_reason"] not in ("load", "unload"):
            assert answer.keys() >= COUNTS, place
        return True
    assert reply.status_code == 400, place
    error = reply.json()["error"]
    text = error if path.startswith("/api/") else error["message"]
    if path in UNMANAGED:
        assert "isn't supported" in text, place
    elif path == "/api/embeddings":
        assert "can't embed" in text, place
    else:
        named = [word for field, word in REFUSED.items() if f'"{field}"' in str(body)]
        assert any(word in text for word in named) or not _is_json(body), place
    return False


def _is_json(body: str) -> bool:
    """One example has a comma too many."""
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
