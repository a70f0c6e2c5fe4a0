"""What was said before a response: the items of all responses that it follows, and those that it names."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvasir.cluster.conversations_api import add_items, conversation_items
from kvasir.cluster.named_items import named_items
from kvasir.cluster.responses_schema import ResponseAsk
from kvasir.cluster.store import NotFoundError, Store, Stored
from kvasir.engine.errors import ClientError

Json = dict[str, Any]


async def said_before(store: Store, ask: ResponseAsk, principal: str, expires: float) -> list[Json]:
    """Items that come before those of `ask`. What they are kept in lives until `expires` at least."""
    if ask.conversation is not None:
        return await conversation_items(store, ask.conversation, principal, expires)
    return await history(store, ask.previous, principal, expires)


async def resolved(store: Store, ask: ResponseAsk, principal: str) -> ResponseAsk:
    """`ask` with the items that it names by their ids alone. Raises NotFoundError."""
    return dataclasses.replace(ask, items=await named_items(store, ask.items, principal))


async def add_to_conversation(store: Store, ask: ResponseAsk, response: Json, expires: float) -> None:
    """What was asked and answered, if that was in a conversation."""
    if ask.conversation is not None:
        await add_items(store, ask.conversation, [*ask.items, *response["output"]], expires)


async def history(store: Store, previous: str | None, principal: str, expires: float) -> list[Json]:
    """Items up to and with those of response `previous`, oldest first. All of them live until `expires` at least.

    Raises ClientError when one of these responses is gone or not complete.
    """
    chain: list[Stored] = []
    while previous is not None:
        chain.append(await _response(store, previous, principal))
        previous = chain[-1].private["previous"]
    if chain:
        await store.keep([stored.id for stored in chain], expires)
    return [item for stored in reversed(chain) for item in (*stored.private["items"], *stored.body["output"])]


async def _response(store: Store, response_id: str, principal: str) -> Stored:
    try:
        stored = await store.get(response_id, "response", principal)
    except NotFoundError as error:
        text = f"the conversation can't go on: {error.message}; it was never stored, was deleted or has expired"
        raise NotFoundError(text, param="previous_response_id") from error
    if stored.open:
        text = f"response {response_id} is {stored.body['status']}; wait until it is done"
        raise ClientError(text, param="previous_response_id")
    return stored
