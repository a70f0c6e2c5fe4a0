"""kvasir.v1.Chats: gRPC's door to chats that were stored."""

from __future__ import annotations

from kvasir.cluster.caller import Lookup
from kvasir.cluster.grpc_call import Calls, Context, set_trailers
from kvasir.cluster.grpc_json import as_json, as_message
from kvasir.cluster.grpc_responses import lookup_of
from kvasir.cluster.stored_chats import Chats as Stored
from kvasir.proto import chats_pb2 as pb
from kvasir.proto import files_pb2 as objects
from kvasir.proto.chats_pb2_grpc import ChatsServicer


class Chats(ChatsServicer):
    """The service of chats.proto."""

    def __init__(self, stored: Stored, calls: Calls) -> None:
        self._them = stored
        self._calls = calls

    async def List(self, request: pb.ListChatsRequest, context: Context) -> pb.ChatList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            given = as_json(request)
            labels = {f"metadata[{name}]": value for name, value in given.pop("metadata", {}).items()}
            query = {**labels, **{name: str(value) for name, value in given.items()}}
            return as_message(pb.ChatList, await self._them.list(Lookup(principal=caller.principal, query=query)))

    async def Get(self, request: objects.IdRequest, context: Context) -> pb.StoredChat:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.StoredChat, await self._them.get(lookup_of(request, caller)))

    async def Update(self, request: pb.UpdateChatRequest, context: Context) -> pb.StoredChat:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            lookup = Lookup(principal=caller.principal, id=request.id)
            return as_message(pb.StoredChat, await self._them.update(lookup, {"metadata": dict(request.metadata)}))

    async def Delete(self, request: objects.IdRequest, context: Context) -> objects.Deleted:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(objects.Deleted, await self._them.delete(lookup_of(request, caller)))

    async def ListMessages(  # noqa: N802
        self, request: pb.ListChatMessagesRequest, context: Context
    ) -> pb.ChatMessageList:
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.ChatMessageList, await self._them.messages(lookup_of(request, caller)))
