"""POST /v1/responses/compact: a conversation as a summary that the model writes, to go on from with more room."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from kvasir.cluster.call import thinking_variables
from kvasir.cluster.carried import carry
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_json, until_gone, warning_header
from kvasir.cluster.reading import read_whole
from kvasir.cluster.responses_fit import fitted
from kvasir.cluster.responses_history import said_before
from kvasir.cluster.responses_reply import usage_json
from kvasir.cluster.responses_schema import ResponseAsk, parse_compaction
from kvasir.cluster.service_fields import in_session
from kvasir.cluster.store import Store
from kvasir.engine.errors import ServerError

Json = dict[str, Any]
MAX_SUMMARY = 2048
"""Tokens of a summary, or a quarter of the model's context where that is less."""
_WISH = (
    "Summarise our conversation so far for yourself: what was asked, what was found out and decided, names, numbers and "
    "wordings that matter, and what is still to be done. Write nothing but the summary."
)


class Compact:
    """The route, an ASGI application by itself."""

    def __init__(self, desk: Desk, store: Store, max_body_bytes: int) -> None:
        self._desk = desk
        self._store = store
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_compaction(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id, principal = request_id_of(scope, headers, ask.request_id), scope["state"]["principal"]
        await until_gone(receive, self._answer(ask, principal, request_id, in_session(headers, ask.session), send))

    async def _answer(
        self, ask: ResponseAsk, principal: str, request_id: str, headers: Mapping[str, str], send: Send
    ) -> None:
        earlier = [*await said_before(self._store, ask, principal, 0.0), *ask.items]
        limit = self._desk.info(self._desk.model(ask.call.model)).max_model_len
        most = min(MAX_SUMMARY, max(1, limit // 4))
        call = dataclasses.replace(ask.call, sampling={"max_tokens": most, "temperature": 0.0})
        wish = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": _WISH}]}
        variables = {**thinking_variables("none"), **ask.variables}
        asked = dataclasses.replace(ask, call=call, items=[wish], variables=variables, truncates=True)
        asked = await fitted(self._desk, asked, earlier)
        generation = await self._desk.begin(asked.call, request_id, headers)
        try:
            async for _ in generation:
                pass
            summary = _summary(generation, most)
            body = {
                "id": f"resp_{uuid.uuid4().hex}",
                "object": "response.compaction",
                "created_at": int(time.time()),
                "output": _compacted(earlier, summary),
                "usage": usage_json(generation.usage, 0),
            }
            await send_json(send, 200, body, [*warning_header(asked.warnings), generation.timing.header()])
        finally:
            self._desk.end(generation)


def _summary(generation: Generation, most: int) -> str:
    """What the model wrote, whole. ServerError when that doesn't stand for the conversation."""
    output = generation.transcripts[0].outputs[0]
    plain = generation.reading.plain
    summary = (output.text if plain else read_whole(generation.reading, output.text).content).strip()
    if output.finish_reason == "length":
        raise ServerError(f"the model's summary had no end after {most} tokens, so the conversation isn't compacted")
    if not summary:
        raise ServerError("the model wrote no summary, so the conversation isn't compacted")
    return summary


def _compacted(items: Sequence[Json], summary: str) -> list[Json]:
    """What the system said, and the summary of the rest."""
    kept = [item for item in items if item["type"] == "message" and item["role"] in ("system", "developer")]
    return [*kept, {"type": "compaction", "id": f"cmp_{uuid.uuid4().hex}", "encrypted_content": carry(summary)}]
