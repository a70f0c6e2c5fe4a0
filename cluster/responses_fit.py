"""What of a conversation the model reads: all of it, or with `truncation: auto` what its context has room for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

from kvasir.cluster.call import Conversation
from kvasir.cluster.desk import Desk
from kvasir.cluster.responses_schema import ResponseAsk

Json = dict[str, Any]


async def fitted(desk: Desk, ask: ResponseAsk, earlier: Sequence[Json]) -> ResponseAsk:
    """`ask` behind the items of an earlier conversation. The fewest oldest items are left out, if that was allowed, so
    that prompt and output fit; what the system said, compactions and the last item stay. A warning tells how many."""
    items = [*earlier, *ask.items]
    whole = ask.with_items(items)
    low, high = 1, len(items) - 1  # the fewest that have to go; all that may
    if not ask.truncates or high < low or await _fits(desk, whole):
        return whole
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await _fits(desk, ask.with_items(_without(items, middle))) else (middle + 1, high)
    left = _without(items, low)
    told = f"input: {len(items) - len(left)} items that don't fit into the context"
    return dataclasses.replace(ask.with_items(left), warnings=(*ask.warnings, told))


def _without(items: Sequence[Json], count: int) -> list[Json]:
    """But for those of the first `count` that may go, and results whose calls are among them."""
    last = _last_calls(items)
    left = [item for number, item in enumerate(items) if number >= count or _stays(item, last)]
    calls = {item["call_id"] for item in left if item["type"].endswith("_call")}
    return [item for item in left if not item["type"].endswith("_call_output") or item["call_id"] in calls]


def _stays(item: Json, last: Collection[str]) -> bool:
    """What the system said, what stands for items that were compacted, and calls whose results the model is to read now."""
    if item["type"] == "message":
        return item["role"] in ("system", "developer")
    return item["type"] == "compaction" or item.get("call_id") in last


def _last_calls(items: Sequence[Json]) -> set[str]:
    """Ids of the calls whose results come last."""
    behind = itertools.takewhile(lambda item: item["type"].endswith("_call_output"), reversed(items))
    return {item["call_id"] for item in behind}


async def _fits(desk: Desk, ask: ResponseAsk) -> bool:
    (conversation,) = ask.call.prompts
    assert isinstance(conversation, Conversation)
    model = desk.model(ask.call.model)
    output: int = ask.call.sampling.get("max_tokens", 1)
    return len(await model.encode(conversation)) + output <= desk.info(model).max_model_len
