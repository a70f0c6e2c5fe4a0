"""schemathesis against a real server, by the document that it serves itself."""

from __future__ import annotations

import os
import warnings
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="needs Python 3.11")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
EXAMPLES = int(os.environ.get("KVASIR_FUZZ_EXAMPLES", "6"))
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/api/chat", "/api/generate", "/v1/embeddings", "/tokenize"),
)
SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def document(server: Any) -> Any:
    return httpx.get(server.url + "/openapi.json", timeout=60).json()


@pytest.mark.parametrize("path", PATHS)
def test_answers_of_a_real_server(server, judge_of, document, path):
    judge = judge_of(document)
    schema = schemathesis.openapi.from_dict(document)

    @settings(
        max_examples=EXAMPLES, database=None, derandomize=True,
        suppress_health_check=[*HealthCheck], phases=[Phase.generate],
    )  # fmt: skip
    @given(case=schema[path]["POST"].as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.update({name: min(case.body[name], 9) for name in SHORT if isinstance(case.body.get(name), int)})
            if "model" in case.body:
                case.body["model"] = "skald"
        reply = case.call(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=120)
        headers = {name: value[0] for name, value in reply.headers.items() if name != "content-encoding"}
        judge(path, "post", httpx.Response(reply.status_code, headers=headers, content=reply.content))

    check()
