"""kvasir.v1.Files and Batches: gRPC's door to what /v1/files and /v1/batches do."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kvasir.cluster.files import NewFile, check_purpose, expires_after, find_file, pieces
from kvasir.cluster.grpc_call import Calls, Context, set_trailers, tell
from kvasir.cluster.grpc_json import as_message, request_body
from kvasir.cluster.grpc_responses import lookup_of
from kvasir.cluster.shelf import Shelf
from kvasir.engine.errors import ClientError
from kvasir.proto import files_pb2 as pb
from kvasir.proto.files_pb2_grpc import BatchesServicer, FilesServicer


class Files(FilesServicer):
    """The service of files.proto."""

    def __init__(self, shelf: Shelf, calls: Calls) -> None:
        self._shelf = shelf
        self._files = shelf.files
        self._calls = calls

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context) -> pb.File:  # noqa: N802
        async with self._calls.calling(context, later=True) as caller:
            await self._shelf.store.room(0)
            self._shelf.background.start()  # keeps our lease on a file that comes slowly
            first = await anext(request_iterator, pb.UploadRequest())
            if first.WhichOneof("part") != "info":
                raise ClientError("the first message must hold info", param="info")
            set_trailers(context, first)
            check_purpose(first.info.purpose)
            living = first.info.expires_after
            seconds = expires_after(living.anchor, living.seconds) if first.info.HasField("expires_after") else None
            file = NewFile(self._shelf.store, caller.principal, first.info.filename)
            try:
                async for part in request_iterator:
                    if part.WhichOneof("part") != "data":
                        raise ClientError("every message but the first must hold data", param="data")
                    await file.write(part.data)
                # If the client has cancelled, its messages end as if all had come, but nothing can be sent to it any more.
                await tell(context, caller)
                made = await file.done(first.info.purpose, seconds, self._shelf.ttl_s)
            except BaseException:
                await file.drop()
                raise
            return as_message(pb.File, made)

    async def List(self, request: pb.ListFilesRequest, context: Context) -> pb.FileList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.FileList, await self._files.list(lookup_of(request, caller)))

    async def Get(self, request: pb.IdRequest, context: Context) -> pb.File:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.File, await self._files.get(lookup_of(request, caller)))

    async def Content(self, request: pb.IdRequest, context: Context) -> None:  # noqa: N802
        async with self._calls.calling(context) as caller:
            stored = await find_file(self._shelf.store, request.id, caller.principal)
            set_trailers(context, request)
            async for piece in pieces(self._shelf.store, stored.id):
                await self._calls.send(context, pb.FileContent(data=piece))

    async def Delete(self, request: pb.IdRequest, context: Context) -> pb.Deleted:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Deleted, await self._files.delete(lookup_of(request, caller)))


class Batches(BatchesServicer):
    """The service of files.proto."""

    def __init__(self, shelf: Shelf, calls: Calls) -> None:
        self._batches = shelf.batches
        self._calls = calls

    async def Create(self, request: pb.CreateBatchRequest, context: Context) -> pb.Batch:  # noqa: N802
        async with self._calls.calling(context) as caller:
            answer = await self._batches.create(request_body(request), caller.principal)
            set_trailers(context, request, None, answer.warnings)
            return as_message(pb.Batch, answer.body)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.BatchList:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.BatchList, await self._batches.list(lookup_of(request, caller)))

    async def Get(self, request: pb.IdRequest, context: Context) -> pb.Batch:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Batch, await self._batches.get(lookup_of(request, caller)))

    async def Cancel(self, request: pb.IdRequest, context: Context) -> pb.Batch:  # noqa: N802
        async with self._calls.calling(context) as caller:
            set_trailers(context, request)
            return as_message(pb.Batch, await self._batches.cancel(lookup_of(request, caller)))
