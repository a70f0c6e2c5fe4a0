"""kvasir.v1.Responses, Conversations and Decisions: gRPC's door to what /v1/responses and its siblings do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson

from kvasir.cluster.caller import Caller, Lookup
from kvasir.cluster.decisions_api import decided
from kvasir.cluster.decisions_schema import parse_decisions
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.grpc_call import Calls, Context, set_trailers, tell
from kvasir.cluster.grpc_json import as_json, as_message, parsed, request_body, tool_choice
from kvasir.cluster.recordings import RESUMABLE
from kvasir.cluster.responses import Begun
from kvasir.cluster.responses import Responses as Made
from kvasir.cluster.responses_schema import parse_compaction, parse_input_tokens, parse_response
from kvasir.cluster.shelf import Shelf
from kvasir.engine.errors import KvasirError
from kvasir.proto import files_pb2 as objects
from kvasir.proto import inference_pb2 as inference
from kvasir.proto import responses_pb2 as pb
from kvasir.proto.responses_pb2_grpc import ConversationsServicer, DecisionsServicer, ResponsesServicer

Json = dict[str, Any]
KIND = b"gRPC (responses)"
"""Of streams that Resume goes on with."""


class Responses(ResponsesServicer):
    """The service of responses.proto."""

    def __init__(self, desk: Desk, shelf: Shelf, calls: Calls) -> None:
        self._desk = desk
        self._made: Made = shelf.responses
        self._calls = calls

    async def Create(self, request: pb.CreateResponseRequest, context: Context) -> pb.Response:  # noqa: N802
        async with self._calls.calling(context) as caller:
            ask = parse_response({**_response_body(request), "stream": False})
            async with self._made.begun(ask, caller) as begun:
                answer = await begun.whole()
                warnings = (*answer.warnings, *_not_resumable(begun.generation))
            set_trailers(context, request, answer.timing, warnings)
            return as_message(pb.Response, answer.body)

    async def CreateStream(self, request: pb.CreateResponseRequest, context: Context) -> None:  # noqa: N802
        async with self._calls.calling(context, later=True) as caller:
            ask = parse_response({**_response_body(request), "stream": True})
            async with self._made.begun(ask, caller) as begun:
                generation = begun.generation
                if generation is None:
                    await tell(context, caller)
                    await self._follow(begun.stored.id, -1, context)
                else:
                    generation.recording.open(KIND)
                    await tell(context, caller, generation.recording.id)
                    await self._stream(begun, generation, context)
                set_trailers(context, request, generation.timing if generation else None, begun.warnings)

    async def Resume(self, request: inference.ResumeRequest, context: Context) -> None:  # noqa: N802
        async with self._calls.as_status(context):
            set_trailers(context, request)
            await self._calls.resume(self._desk.recordings, request, context, KIND, pb.ResponseEvent)

    async def Get(self, request: objects.IdRequest, context: Context) -> pb.Response:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Response, (await self._made.get(lookup_of(request, caller))).body)

    async def Follow(self, request: pb.FollowResponseRequest, context: Context) -> None:  # noqa: N802
        async with self._calls.calling(context) as caller:
            stored = await self._made.streamed(Lookup(principal=caller.principal, id=request.id))
            set_trailers(context, request)
            after = request.starting_after if request.HasField("starting_after") else -1
            await self._follow(stored.id, after, context)

    async def Delete(self, request: objects.IdRequest, context: Context) -> objects.Deleted:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(objects.Deleted, await self._made.delete(lookup_of(request, caller)))

    async def Cancel(self, request: objects.IdRequest, context: Context) -> pb.Response:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Response, await self._made.cancel(lookup_of(request, caller)))

    async def ListInputItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ItemList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.ItemList, await self._made.input_items(lookup_of(request, caller)))

    async def CountInput(self, request: pb.CreateResponseRequest, context: Context) -> pb.CountInputReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            answer = await self._made.count_input(parse_input_tokens(_response_body(request)), caller.principal)
            set_trailers(context, request, None, answer.warnings)
            return as_message(pb.CountInputReply, answer.body)

    async def Compact(self, request: pb.CompactRequest, context: Context) -> pb.Compaction:  # noqa: N802
        async with self._calls.calling(context) as caller:
            answer = await self._made.compact(parse_compaction(request_body(request)), caller)
            set_trailers(context, request, answer.timing, answer.warnings)
            return as_message(pb.Compaction, answer.body)

    async def _stream(self, begun: Begun, generation: Generation, context: Context) -> None:
        """The events as they come; recorded, where the client may come back."""
        recording = generation.recording
        if recording.resumable:
            recording.record(_recorded(begun, generation))
            await self._calls.play(recording, 0, context, pb.ResponseEvent)
            return
        async for events in _events(begun, generation):
            for event in events:
                await self._calls.send(context, event)

    async def _follow(self, response_id: str, after: int, context: Context) -> None:
        """The events behind number `after`, those that are there and those to come."""
        async for parts in self._made.background.follow(response_id, after):
            for part in parts:
                await self._calls.send(context, _event(part.data))


class Conversations(ConversationsServicer):
    """The service of responses.proto."""

    def __init__(self, shelf: Shelf, calls: Calls) -> None:
        self._them = shelf.conversations
        self._calls = calls

    async def Create(self, request: pb.CreateConversationRequest, context: Context) -> pb.Conversation:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            made = await self._them.create(Lookup(principal=caller.principal), request_body(request))
            return as_message(pb.Conversation, made)

    async def Get(self, request: objects.IdRequest, context: Context) -> pb.Conversation:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Conversation, await self._them.get(lookup_of(request, caller)))

    async def Update(self, request: pb.UpdateConversationRequest, context: Context) -> pb.Conversation:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            lookup = Lookup(principal=caller.principal, id=request.id)
            return as_message(pb.Conversation, await self._them.update(lookup, {"metadata": dict(request.metadata)}))

    async def Delete(self, request: objects.IdRequest, context: Context) -> objects.Deleted:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(objects.Deleted, await self._them.delete(lookup_of(request, caller)))

    async def AddItems(self, request: pb.AddItemsRequest, context: Context) -> pb.ItemList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            body = request_body(request)
            lookup = Lookup(principal=caller.principal, id=body.pop("id", ""))
            return as_message(pb.ItemList, await self._them.add(lookup, body))

    async def ListItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ItemList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.ItemList, await self._them.items(lookup_of(request, caller)))

    async def GetItem(self, request: pb.ItemRequest, context: Context) -> pb.Item:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            lookup = Lookup(principal=caller.principal, id=request.id, item=request.item_id)
            return as_message(pb.Item, await self._them.item(lookup))

    async def DeleteItem(self, request: pb.ItemRequest, context: Context) -> pb.Conversation:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            lookup = Lookup(principal=caller.principal, id=request.id, item=request.item_id)
            return as_message(pb.Conversation, await self._them.delete_item(lookup))


class Decisions(DecisionsServicer):
    """The service of responses.proto."""

    def __init__(self, desk: Desk, calls: Calls) -> None:
        self._desk = desk
        self._calls = calls

    async def Decide(self, request: pb.DecideRequest, context: Context) -> pb.DecideReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            answer = await decided(self._desk, parse_decisions(request_body(request)), caller)
            set_trailers(context, request, answer.timing, answer.warnings)
            return as_message(pb.DecideReply, answer.body)


def lookup_of(request: Any, caller: Caller) -> Lookup:
    """What a request for something stored asks for: its id, and which part of a list."""
    given = as_json(request)
    return Lookup(
        principal=caller.principal, id=given.pop("id", ""), query={name: str(value) for name, value in given.items()}
    )


async def _recorded(begun: Begun, generation: Generation) -> AsyncIterator[Sequence[bytes]]:
    async for events in _events(begun, generation):
        yield [event.SerializeToString() for event in events]


async def _events(begun: Begun, generation: Generation) -> AsyncIterator[list[pb.ResponseEvent]]:
    """Those of one step after the other. What fails behind the first one is told by an event too."""
    reply = begun.reply
    try:
        async for deltas in generation:
            yield [_event(event) for event in reply.events(deltas)]
        last = reply.ending()
        await begun.keep()
    except KvasirError as error:
        if reply.count:
            yield [_event(reply.failure(error))]
        raise
    yield [_event(event) for event in last]


def _event(frame: bytes) -> pb.ResponseEvent:
    """From a server-sent event."""
    return as_message(pb.ResponseEvent, orjson.loads(frame[frame.index(b"\ndata: ") + 7 :]))


def _response_body(request: pb.CreateResponseRequest) -> Json:
    body = request_body(request)
    body.pop("allowed_tools", None)
    if (choice := tool_choice(request)) is not None:
        body["tool_choice"] = choice
    if (form := body.get("text", {}).get("format")) and "schema" in form:
        form["schema"] = parsed(form["schema"], "text.format.schema", "text")
    return body


def _not_resumable(generation: Generation | None) -> tuple[str, ...]:
    """A warning for who asked to resume."""
    asked = generation is not None and generation.recording.resumable
    return (f"{RESUMABLE} (only streams are)",) if asked else ()
