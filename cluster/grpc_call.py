"""What every gRPC method of ours has in common: who calls, metadata, and errors as status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from kvasir.cluster.auth import GRPC_KEY, ApiKeys
from kvasir.cluster.call import request_id_from
from kvasir.cluster.caller import Caller
from kvasir.cluster.http_front import warning_header
from kvasir.cluster.recordings import STREAM_ID, Recording, Recordings
from kvasir.cluster.timing import CallTiming
from kvasir.engine.errors import KvasirError, OverloadedError, ServerError

log = logging.getLogger(__name__)

STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    410: grpc.StatusCode.OUT_OF_RANGE,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC's; others are INTERNAL."""

MAX_DETAILS = 2000
"""Bytes of an error's text, each up to three on the way: beyond 8 KiB of trailing metadata clients may see another status."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Calls:
    """What the methods of one server share. refused: hears of every error that is told.

    A call ends whose client takes no message for `unread_s`: else it would hold its request for ever.
    """

    def __init__(self, keys: ApiKeys, refused: Callable[[KvasirError], None], unread_s: float) -> None:
        self._keys = keys
        self._refused = refused
        self._unread_s = unread_s

    @asynccontextmanager
    async def as_status(self, context: Context) -> AsyncIterator[None]:
        """An error ends the call with its status."""
        try:
            yield
        except Exception as error:
            await abort(context, self.told(error))

    @asynccontextmanager
    async def calling(self, context: Context, *, later: bool = False) -> AsyncIterator[Caller]:
        """Who calls; it is told its request's id. An error ends the call with its status. later: the one who asks says the id
        by `tell`, with that of a stream; an error before says it too."""
        headers = metadata(context)
        async with self.as_status(context):
            principal = self._keys.check(headers.get("authorization"), hint=GRPC_KEY)
            request_id = request_id_from(headers.get("x-request-id"), "x-request-id")
            deadline_s = context.time_remaining()
            caller = Caller(principal=principal, request_id=request_id, headers=headers, deadline_s=deadline_s)
            if not later:
                await tell(context, caller)
            try:
                yield caller
            except KvasirError:
                if later:
                    with suppress(grpc.aio.UsageError):  # it is said already
                        await tell(context, caller)
                raise

    async def send(self, context: Context, message: Message) -> None:
        """A message of a streamed answer. Raises OverloadedError when the client doesn't take it."""
        call, late = asyncio.current_task(), []
        assert call is not None, "gRPC runs each call as a task"

        def give_up() -> None:
            late.append(call.cancel())

        limit = asyncio.get_running_loop().call_later(self._unread_s, give_up)
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if not late:
                raise
            text = f"the client reads too slowly: it took no message for {self._unread_s:g} s (--receive-timeout)"
            error = OverloadedError(text)
            error.counted = True  # as its request's, which is cancelled
            raise error from None
        finally:
            limit.cancel()

    async def resume(
        self, recordings: Recordings, request: Any, context: Context, kind: bytes, message: type[Message]
    ) -> None:
        """Go on with a stream that holds such messages."""
        recordings.need_here(request.stream_id)
        recording = recordings.resumed(request.stream_id, request.after, metadata(context), (kind,))
        await context.send_initial_metadata(((STREAM_ID, recording.id),))
        await self.play(recording, request.after, context, message)

    async def play(self, recording: Recording, after: int, context: Context, message: type[Message]) -> None:
        """The messages behind number `after`, those that are there and those to come."""
        async with aclosing(recording.read(after)) as batches:
            async for events in batches:
                for event in events:
                    await self.send(context, message.FromString(event))

    def told(self, error: Exception) -> KvasirError:
        """What clients are told; of what isn't a KvasirError the log alone has the text."""
        if isinstance(error, KvasirError):
            self._refused(error)
            return error
        log.error("a gRPC call failed", exc_info=error)
        return ServerError("internal error; the server's log says more")


async def tell(context: Context, caller: Caller, stream_id: str = "") -> None:
    """Initial metadata."""
    more = ((STREAM_ID, stream_id),) if stream_id else ()
    await context.send_initial_metadata((("x-request-id", caller.request_id), *more))


async def abort(context: Context, error: KvasirError) -> None:
    """End the call."""
    trailers = [("kvasir-code", error.code)]
    if error.param is not None:
        named = ascii(error.param)[1:-1]  # it may be a name that the client made up, and metadata is ASCII alone
        trailers.append(("kvasir-param", f"{named:.100}"))
    if error.retry_after_s is not None:
        trailers.append(("retry-after", str(max(1, round(error.retry_after_s)))))
    status = STATUS.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(status, _cut(error.message), tuple(trailers))


def _cut(text: str) -> str:
    return text.encode(errors="replace")[:MAX_DETAILS].decode(errors="ignore")


def metadata(context: Context) -> dict[str, str]:
    """Names are lower case in gRPC; binary values are left out."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def set_trailers(
    context: Context,
    request: Message,
    timing: CallTiming | None = None,
    warnings: Iterable[str] = (),
    truncated_tokens: int = 0,
    more: Iterable[tuple[str, str]] = (),
) -> None:
    """What a caller is told beside its answer: where the time went, and what was ignored."""
    names = (*unknown_fields(request), *warnings)
    warned = [(name.decode(), text.decode()) for name, text in warning_header(names, truncated_tokens)]
    timed = [("server-timing", timing.text())] if timing is not None else []
    context.set_trailing_metadata((*timed, *more, *warned))


def unknown_fields(message: Message, at: str = "") -> list[str]:
    """Numbers of the fields that only a newer client's messages have."""
    unknown = UnknownFieldSet(message)
    found = [f"{at}field {unknown[place].field_number}" for place in range(len(unknown))]
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None or kind.GetOptions().map_entry or kind.file.package.startswith("google."):
            continue
        for one in value if field.is_repeated else (value,):
            found += unknown_fields(one, f"{at}{field.name}.")
    return found
