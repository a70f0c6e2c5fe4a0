"""Compaction: a conversation as a summary that the model writes, to go on from with more room."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from kvasir.cluster.call import thinking_variables
from kvasir.cluster.caller import Answer, Caller
from kvasir.cluster.carried import carry
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.reading import read_whole
from kvasir.cluster.responses_fit import fitted
from kvasir.cluster.responses_history import resolved, said_before
from kvasir.cluster.responses_reply import usage_json
from kvasir.cluster.responses_schema import ResponseAsk
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


async def compact(desk: Desk, store: Store, ask: ResponseAsk, caller: Caller) -> Answer:
    """The items that stand for what `ask` follows and holds."""
    ask = await resolved(store, ask, caller.principal)
    earlier = [*await said_before(store, ask, caller.principal, 0.0), *ask.items]
    limit = desk.info(desk.model(ask.call.model)).max_model_len
    most = min(MAX_SUMMARY, max(1, limit // 4))
    sampling = {"max_tokens": most, "temperature": 0.0}
    call = dataclasses.replace(ask.call, sampling=sampling, deadline_s=caller.deadline_s)
    wish = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": _WISH}]}
    variables = {**thinking_variables("none"), **ask.variables}
    asked = dataclasses.replace(ask, call=call, items=[wish], variables=variables, truncates=True)
    asked = await fitted(desk, asked, earlier)
    generation = await desk.begin(asked.call, caller.request_id, in_session(caller.headers, ask.session))
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
        return Answer(body=body, warnings=asked.warnings, timing=generation.timing)
    finally:
        desk.end(generation)


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
