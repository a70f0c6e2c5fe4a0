"""Requests that schemathesis makes of documents: never a 5xx, and every answer as the document says, streams too.

A few of each operation here; `make fuzz` draws many (KVASIR_FUZZ_EXAMPLES).
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from kvasir.cluster.openapi import OPERATIONS, document

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="needs Python 3.11")

EXAMPLES = int(os.environ.get("KVASIR_FUZZ_EXAMPLES", "2"))
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
OPENAI = "api-openai/openapi.inference-only.yaml"


def operations(found: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(path, method) -> what schemathesis makes cases from."""
    schema = schemathesis.openapi.from_dict(found)
    return {(one.path, one.method): one for one in (result.ok() for result in schema.get_all_operations())}


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, str], Any]:
    return operations(document())


@pytest.fixture(scope="module")
def theirs(data: Any) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    found = yaml.load(data(OPENAI).read_text(), yaml.CSafeLoader)
    return found, operations(found)


def send(case: Any, url: str) -> httpx.Response:
    """As its client would: with the model that is served, and answers that end soon."""
    if isinstance(case.body, dict) and "model" in case.body and isinstance(case.body["model"], str):
        case.body["model"] = "bytes"
    reply = case.call(base_url=url, timeout=60)
    headers = {name: value[0] for name, value in reply.headers.items() if name != "content-encoding"}
    return httpx.Response(reply.status_code, headers=headers, content=reply.content)


def fuzzed(operation: Any, mode: Any, check: Any) -> None:
    """`check` of EXAMPLES cases."""
    if mode is MODES[1] and not (operation.body or operation.query):
        return  # nothing can be wrong about it

    @settings(
        max_examples=EXAMPLES, database=None, derandomize=EXAMPLES < 10,
        suppress_health_check=[*HealthCheck], phases=[Phase.generate],
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        check(case)

    run()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("key", OPERATIONS, ids=" ".join)
def test_our_document(gateway, judge, ours, key, mode):
    def check(case: Any) -> None:
        answer = send(case, gateway.url)
        if case.method != "HEAD" and answer.status_code != 405:  # an id may be such that the path is another one
            judge(key[0], key[1], answer)
        if mode is MODES[0] or not case.body or not isinstance(case.body, dict):
            return
        assert answer.status_code != 500

    fuzzed(ours[key], mode, check)


def without_nulls(answer: httpx.Response) -> httpx.Response:
    """OpenAI's own examples of batches have them, where its schema has none."""
    found = json.loads(answer.text, object_hook=lambda one: {k: v for k, v in one.items() if v is not None})
    return httpx.Response(answer.status_code, headers=answer.headers, json=found)


SERVED = (
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/models",
    "/responses",
    "/responses/input_tokens",
    "/batches",
    "/files",
)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", SERVED)
def test_openais_document(gateway, theirs, judge_of, path, mode):
    found, there = theirs
    judge = judge_of(found)

    def check(case: Any) -> None:
        answer = send(case, gateway.url + "/v1")
        assert answer.status_code < 500, answer.text
        assert answer.headers["content-type"].partition(";")[0] in ("application/json", "text/event-stream")
        if answer.status_code == 200:
            judge(path, case.method.lower(), without_nulls(answer) if path == "/batches" else answer)
        else:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, json.dumps(case.body)[:500]

    for (known, _), operation in there.items():
        if known == path:
            fuzzed(operation, mode, check)
