"""/v1/streams/{id}: GET goes on with a stream whose connection was lost, DELETE cancels it.

Gateways share a port, and the kernel deals out connections: a client that comes back may well reach another gateway than
before. That one passes the request on to the gateway that the id names, since to send the client away would be to let it
knock until it is lucky.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from kvasir.cluster.http_front import header_map, send_json, until_gone
from kvasir.cluster.recordings import Recordings, StreamNotFoundError
from kvasir.cluster.reply_stream import NDJSON, SSE, play
from kvasir.cluster.straight import Straight
from kvasir.engine.errors import ClientError

FindGateway = Callable[[str], Awaitable["str | None"]]
"""A gateway's name -> such as http://127.0.0.1:40123, its own address; None: there is no such gateway."""
FORWARDED = "kvasir-forwarded"
_PASSED_ON = ("authorization", "x-api-key", "last-event-id", "x-request-id")
_PASSED_BACK = (
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "kvasir-stream-id",
    "x-kvasir-warning",
    "content-length",
)
_KINDS = (SSE[1], NDJSON[1])


async def nowhere(_: str) -> str | None:
    """Of a gateway that is alone."""
    return None


class Streams:
    """An ASGI application by itself."""

    def __init__(self, recordings: Recordings, find_gateway: FindGateway) -> None:
        self._recordings = recordings
        self._find_gateway = find_gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream_id, headers = scope["path_params"]["id"], header_map(scope)
        if self._recordings.is_elsewhere(stream_id) and FORWARDED not in headers:
            gateway = stream_id.partition("-")[0]
            if (url := await self._find_gateway(gateway)) is None:
                raise StreamNotFoundError(f"there is no stream {stream_id!r:.80}: no gateway that runs began it")
            await until_gone(receive, _forward(url, scope, send))
        elif scope["method"] == "DELETE":
            self._recordings.cancel(stream_id, headers)
            await send_json(send, 200, {"id": stream_id, "object": "stream", "deleted": True})
        else:
            after = _after(scope, headers.get("last-event-id"))
            recording = self._recordings.resumed(stream_id, after, headers, _KINDS)
            head = [(b"content-type", recording.kind)]
            await until_gone(receive, play(recording, after, Straight(scope, send), head))


def _after(scope: Scope, last_event_id: str | None) -> int:
    """Number of the last event that the client saw. A browser that reconnects by itself keeps the URL as it was: its
    header is the newer one."""
    given = scope["state"]["query"].get("after", "0")
    if last_event_id is not None:
        given = last_event_id
    if not (given.isascii() and given.isdigit() and len(given) < 16):
        name = "after" if last_event_id is None else "Last-Event-ID"
        raise ClientError(f"{name} must be the number of an event, 0: from the start; got {given!r:.60}", param="after")
    return int(given)


async def _forward(url: str, scope: Scope, send: Send) -> None:
    """Let the gateway at `url` answer."""
    import aiohttp  # takes 0.1 s, and few need it

    headers = {name: value for name, value in header_map(scope).items() if name in _PASSED_ON} | {FORWARDED: "1"}
    target, query, begun = f"{url}{scope['path']}", {**scope["state"]["query"]}, False
    # no certificate is checked: the address is our own, and certificates are made out for the public one
    connector, limits = aiohttp.TCPConnector(ssl=False), aiohttp.ClientTimeout(total=None, connect=5.0)
    async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:
        try:
            async with session.request(scope["method"], target, params=query, headers=headers) as reply:
                kept = [(name.encode(), reply.headers[name].encode()) for name in _PASSED_BACK if name in reply.headers]
                await send({"type": "http.response.start", "status": reply.status, "headers": kept})
                begun = True
                async for part in reply.content.iter_any():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except aiohttp.ClientError as error:
            if not begun:
                raise StreamNotFoundError("the gateway that began this stream can't be reached any more") from error
            return  # the server closes the connection: an end would say that this was all
        await send({"type": "http.response.body", "body": b""})
