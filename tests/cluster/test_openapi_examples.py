"""Each body that the OpenAPI document gives as an example is one by its schema, and is answered."""

from __future__ import annotations

import dataclasses
import json

import httpx
import jsonschema
import pytest

from kvasir.cluster.groups_api import Groups
from kvasir.cluster.openapi import OPERATIONS, document
from kvasir.cluster.openapi_bodies import BODIES
from kvasir.cluster.openapi_examples import EXAMPLES

POSTS = [path for (path, method), one in OPERATIONS.items() if method == "post" and not one.refused]
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": EXAMPLES["CountTokensRequest"]}


def test_examples_are_bodies():
    assert set(EXAMPLES) == set(BODIES)
    found = document()
    for name, example in EXAMPLES.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
        jsonschema.validate(example, schema, cls=jsonschema.Draft202012Validator)
    shown = [
        one["content"]["application/json"]["example"]
        for item in found["paths"].values()
        for operation in item.values()
        if "application/json"
        in (one := operation.get("requestBody", {}) if isinstance(operation, dict) else {}).get("content", {})
    ]
    assert len(shown) == sum(bool(one.body) for one in OPERATIONS.values())


@pytest.fixture
def there(gateway, monkeypatch):
    """`there(path)`: the URL of a route whose parameters name what is there."""
    info = gateway.group.info
    every = ("generate", "embed", "classify", "score")
    monkeypatch.setattr(gateway.group, "info", dataclasses.replace(info, tasks=every, labels=("a", "b")))
    route = next(one for one in gateway.app.router.routes if getattr(one, "path", "") == "/v1/groups/{name}")
    assert isinstance(route.endpoint.__self__, Groups)

    async def set_role(*_):
        return True

    monkeypatch.setattr(route.endpoint.__self__, "_set_role", set_role)

    def post(path, **fields):
        return httpx.post(gateway.url + path, json=fields, timeout=60).raise_for_status().json()["id"]

    def upload():
        line = json.dumps(LINE).replace("skald", "bytes").encode()
        form = {"files": {"file": ("in.jsonl", line + b"\n")}, "data": {"purpose": "batch"}}
        return httpx.post(gateway.url + "/v1/files", timeout=60, **form).raise_for_status().json()["id"]

    def batch():
        """One that doesn't end by itself."""
        monkeypatch.setattr(gateway.group, "script", lambda request, index: b"x" * 4000)
        monkeypatch.setattr(gateway.group, "step_s", 0.02)
        return post("/v1/batches", **{**EXAMPLES["BatchRequest"], "input_file_id": upload()})

    make = {
        "/v1/chat/completions": lambda: post(
            "/v1/chat/completions", store=True, **EXAMPLES["ChatRequest"] | {"model": "bytes"}
        ),
        "/v1/responses": lambda: post("/v1/responses", input="Hi", background=True),
        "/v1/conversations": lambda: post("/v1/conversations"),
        "/v1/batches": batch,
        "/v1/groups": lambda: "group-1",
    }

    def found(path):
        whole, _, rest = path.partition("/{")
        return gateway.url + (f"{whole}/{make[whole]()}{rest.partition('}')[2]}" if rest else whole)

    found.upload = upload
    return found


@pytest.mark.parametrize("path", POSTS)
def test_examples_are_answered(there, judge, path):
    operation = OPERATIONS[path, "post"]
    url = there(path)
    if operation.upload:
        assert there.upload()
        return
    body = EXAMPLES[operation.body] if operation.body else None
    if body and "model" in body:
        body = {**body, "model": "bytes"}
    if body and "input_file_id" in body:
        body = {**body, "input_file_id": there.upload()}
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.is_success, answer.text
    judge(path, "post", answer)
