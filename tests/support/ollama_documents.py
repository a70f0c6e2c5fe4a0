"""Ollama's documentation: every request that it shows, and what an answer must look like by its own OpenAPI file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import yaml

BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
URL = re.compile(r"http://localhost:11434(/(?:api|v1/messages)[^\s\"']*)")
COUNTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}
ANSWERS: dict[str, tuple[str, set[str]]] = {
    "/api/generate": ("GenerateResponse", {"model", "created_at", "response", "done", "done_reason"}),
    "/api/chat": ("ChatResponse", {"model", "created_at", "message", "done", "done_reason"}),
    "/api/embed": (
        "EmbedResponse",
        {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"},
    ),
    "/api/embeddings": ("", {"embedding"}),
    "/api/tags": ("ListResponse", {"models"}),
    "/api/ps": ("PsResponse", {"models"}),
    "/api/version": ("VersionResponse", {"version"}),
    "/api/show": ("ShowResponse", {"modelfile", "parameters", "template", "details", "model_info", "capabilities"}),
    "/v1/messages": ("", {"id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage"}),
}
"""Path -> (schema of its answer, fields that the examples show)."""
EVENTS = {"/api/generate": "GenerateStreamEvent", "/api/chat": "ChatStreamEvent"}
UNMANAGED = ("/api/create", "/api/pull", "/api/push", "/api/copy", "/api/delete", "/api/blobs")


class OllamaDocuments:
    """`refused`: field of a request -> what the refusal says where the model can't do it."""

    def __init__(self, folder: Path, model: str, refused: dict[str, str]) -> None:
        self._folder, self._model, self._refused = folder, model, refused
        self._document = yaml.load((folder / "openapi.yaml").read_text(), yaml.CSafeLoader)

    def requests(self) -> Iterator[tuple[str, str, str | None]]:
        """(method, path, body) of each, for our model."""
        texts = [block for file in sorted(self._folder.rglob("*.md*")) for block in BLOCK.findall(file.read_text())]
        operations = [one for methods in self._document["paths"].values() for one in methods.values()]
        texts += [sample["source"] for one in operations for sample in one.get("x-codeSamples", ())]
        for command in (one for text in texts for one in re.split(r"(?m)^\s*(?=curl )", text)):
            if command.startswith("curl") and (url := URL.search(command)):
                words = [word.strip() for word in shlex.split(command)]  # a line's end that is escaped stays
                body = words[words.index("-d") + 1] if "-d" in words else None
                method = words[words.index("-X") + 1] if "-X" in words else "HEAD" if "-I" in words else None
                named = re.sub(r'"model": ?"[^"]*"', f'"model": "{self._model}"', body) if body else None
                yield method or ("POST" if body else "GET"), url[1], named

    def answered(self, url: str, method: str, path: str, body: str | None) -> bool:
        """Whether it was; else the refusal names what isn't supported. AssertionError says what isn't as documented."""
        json_type = {"Content-Type": "application/json"} if path.startswith("/v1/") else {}  # which those examples say
        reply = httpx.request(method, url + path, content=body, headers=json_type, timeout=60)
        place = (path, body, reply.text[:500])
        if reply.status_code == 200:
            self._check(path, reply, streamed='"stream": true' in str(body))
            return True
        if method == "HEAD":
            assert reply.status_code == 404, place
            return False
        assert reply.status_code == 400, place
        error = reply.json()["error"]
        text = error if path.startswith("/api/") else error["message"]
        if path.startswith(UNMANAGED):
            assert "supported" in text, place
        else:
            said = f"{path} {body}"
            named = [word for field, word in self._refused.items() if f'"{field}"' in said or said.startswith(field)]
            assert any(word in text for word in named) or not _is_json(str(body)), place
        return False

    def _check(self, path: str, reply: httpx.Response, *, streamed: bool) -> None:
        if path == "/v1/messages" and streamed:
            assert "event: message_stop" in reply.text
            return
        *events, last = [json.loads(line) for line in reply.text.splitlines()]
        schema, fields = ANSWERS[path]
        for event in events:
            assert event["done"] is False
            self._fits(EVENTS[path], event)
        assert last.keys() >= fields, (path, last)
        if schema:
            self._fits(schema, last)
        if path in EVENTS and last["done_reason"] not in ("load", "unload"):
            assert last.keys() >= COUNTS, (path, last)

    def _fits(self, schema: str, value: Any) -> None:
        found = {"$ref": f"#/components/schemas/{schema}", "components": self._document["components"]}
        jsonschema.Draft202012Validator(found).validate(value)


def _is_json(body: str) -> bool:
    """One example has a comma too many."""
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
