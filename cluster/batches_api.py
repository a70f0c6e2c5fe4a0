"""/v1/batches: files of requests, answered when there is nothing more urgent."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.background import Background
from kvasir.cluster.batch_line import CHAT, COMPLETION, RESPONSE
from kvasir.cluster.call_sampling import named
from kvasir.cluster.caller import Answer, Lookup
from kvasir.cluster.files import expires_after, find_file
from kvasir.cluster.http_front import read_json, send_json, warning_header
from kvasir.cluster.openai_fields import CHAT_HONOURED, Check, later, string
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.pages import Page
from kvasir.cluster.service_fields import check_metadata
from kvasir.cluster.store import NotFoundError, Store, Stored
from kvasir.cluster.stored_routes import found_route
from kvasir.engine.errors import ClientError

Json = dict[str, Any]

WINDOW_S = 86400.0
ENDPOINTS = (CHAT, COMPLETION, "/v1/embeddings", RESPONSE)
_HONOURED: dict[str, Check] = {
    "input_file_id": string,
    "endpoint": later,
    "completion_window": later,
    "metadata": check_metadata,
    "output_expires_after": CHAT_HONOURED["chat_template_kwargs"],
}
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class CreateBatch:
    """POST /v1/batches."""

    def __init__(self, batches: Batches, max_body_bytes: int) -> None:
        self._batches = batches
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, self._max_body_bytes)
        answer = await self._batches.create(body, scope["state"]["principal"])
        await send_json(send, 200, answer.body, warning_header(answer.warnings))


class Batches:
    """What is stored of batches."""

    def __init__(self, store: Store, background: Background, ttl_s: float) -> None:
        self._store = store
        self._background = background
        self._ttl_s = ttl_s

    async def create(self, body: Mapping[str, Any], principal: str) -> Answer:
        fields, warnings = sort_fields(body, _HONOURED, {}, {})
        _check(fields)
        try:
            file = await find_file(self._store, fields["input_file_id"], principal)
        except NotFoundError as error:
            raise NotFoundError(error.message, param="input_file_id") from error
        if file.body["purpose"] != "batch":
            raise ClientError(f"the file's purpose is {file.body['purpose']}, not batch", param="input_file_id")
        stored = self._batch(fields, principal)
        await self._store.keep([file.id], stored.body["expires_at"])
        await self._background.run_batch(stored)
        return Answer(body=stored.body, warnings=warnings)

    def _batch(self, fields: Mapping[str, Any], principal: str) -> Stored:
        now = int(time.time())
        body: Json = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": fields["endpoint"],
            "model": None,
            "errors": None,
            "input_file_id": fields["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + int(WINDOW_S),
            **{f"{name}_at": None for name in _TIMES},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "usage": None,
            "metadata": fields.get("metadata"),
        }
        living = fields.get("output_expires_after", {})
        with named({"expires_after": "output_expires_after"}):
            seconds = expires_after(living.get("anchor"), living.get("seconds")) or self._ttl_s
        return Stored(
            id=body["id"], kind="batch", principal=principal, expires=now + WINDOW_S + self._ttl_s, open=True, body=body,
            private={"models": [], "output_seconds": seconds},
        )  # fmt: skip

    async def list(self, lookup: Lookup) -> Json:
        page = Page.of(lookup.query)
        found = await page.of_store(self._store, "batch", lookup.principal, {})
        return page.json([await self._counted(body) for body in found])

    async def get(self, lookup: Lookup) -> Json:
        stored = await self._store.get(lookup.id, "batch", lookup.principal)
        return await self._counted(stored.body)

    async def cancel(self, lookup: Lookup) -> Json:
        """Whoever works on it notices within a second; what is answered by then can be fetched."""
        stored = await self._store.get(lookup.id, "batch", lookup.principal)
        facts = {"status": "cancelling", "cancelling_at": int(time.time())}
        body = await self._store.change(
            stored.id, lambda body: {**body, **facts} if body["status"] in ("validating", "in_progress") else None
        )
        body = body or stored.body
        if body["status"] not in ("cancelling", "cancelled"):
            raise ClientError(f"the batch is {body['status']}; it can't be cancelled any more", param="batch_id")
        return await self._counted(body)

    async def _counted(self, body: Json) -> Json:
        """With the lines that are answered so far."""
        if body["status"] not in ("in_progress", "finalizing", "cancelling"):
            return body
        completed, failed = await self._store.counts(body["id"])
        return {**body, "request_counts": {**body["request_counts"], "completed": completed, "failed": failed}}


def batches_routes(batches: Batches, max_body_bytes: int) -> list[Route]:
    """All routes of batches."""
    one = "/v1/batches/{id}"
    return [
        Route("/v1/batches", CreateBatch(batches, max_body_bytes), methods=["POST"]),
        found_route("GET", "/v1/batches", batches.list),
        found_route("GET", one, batches.get),
        found_route("POST", f"{one}/cancel", batches.cancel),
    ]


def _check(fields: Mapping[str, Any]) -> None:
    if "input_file_id" not in fields:
        raise ClientError("input_file_id is missing", param="input_file_id")
    if fields.get("endpoint") not in ENDPOINTS:
        known = ", ".join(ENDPOINTS)
        raise ClientError(f"endpoint must be one of {known}; got {fields.get('endpoint')!r:.60}", param="endpoint")
    if fields.get("completion_window") != "24h":
        text = f"completion_window must be 24h, got {fields.get('completion_window')!r:.60}"
        raise ClientError(text, param="completion_window")
