"""/v1/responses: HTTP's door to `Responses`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.background import Background
from kvasir.cluster.caller import Answer, Caller
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_json, until_gone, warning_header
from kvasir.cluster.reply_stream import SSE, UNBUFFERED, stream
from kvasir.cluster.responses import Responses
from kvasir.cluster.responses_schema import ResponseAsk, parse_compaction, parse_input_tokens, parse_response
from kvasir.cluster.stored_routes import found_route, lookup_of
from kvasir.cluster.straight import Straight
from kvasir.engine.errors import ClientError

Headers = Sequence[tuple[bytes, bytes]]


class CreateResponse:
    """POST /v1/responses."""

    def __init__(self, responses: Responses, max_body_bytes: int) -> None:
        self._responses = responses
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_response(await read_json(scope, receive, self._max_body_bytes))
        await until_gone(receive, self._answer(ask, _caller(scope, ask), Straight(scope, send)))

    async def _answer(self, ask: ResponseAsk, caller: Caller, send: Straight) -> None:
        async with self._responses.begun(ask, caller) as begun:
            warnings, generation = warning_header(begun.warnings), begun.generation
            if not ask.stream:
                await _send(send, await begun.whole())
            elif generation is None:
                await _follow(self._responses.background, begun.stored.id, -1, send, warnings)
            else:
                await stream(generation, begun.reply, send, [SSE, *warnings], begun.reply.failure, begun.keep)


class CountInput:
    """POST /v1/responses/input_tokens."""

    def __init__(self, responses: Responses, max_body_bytes: int) -> None:
        self._responses = responses
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_input_tokens(await read_json(scope, receive, self._max_body_bytes))
        await _send(send, await self._responses.count_input(ask, scope["state"]["principal"]))


class Compact:
    """POST /v1/responses/compact."""

    def __init__(self, responses: Responses, max_body_bytes: int) -> None:
        self._responses = responses
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_compaction(await read_json(scope, receive, self._max_body_bytes))
        await until_gone(receive, self._answer(ask, _caller(scope, ask), send))

    async def _answer(self, ask: ResponseAsk, caller: Caller, send: Send) -> None:
        await _send(send, await self._responses.compact(ask, caller))


class GetResponse:
    """GET: the response, or with ?stream=true the events of one that was made in the background."""

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lookup = lookup_of(Request(scope))
        if not _flag(lookup.query, "stream"):
            await send_json(send, 200, (await self._responses.get(lookup)).body)
            return
        stored = await self._responses.streamed(lookup)
        after = _number(lookup.query, "starting_after", -1)
        await until_gone(receive, _follow(self._responses.background, stored.id, after, Straight(scope, send)))


async def _send(send: Send, answer: Answer) -> None:
    timing = [answer.timing.header()] if answer.timing else []
    await send_json(send, 200, answer.body, [*warning_header(answer.warnings), *timing])


async def _follow(background: Background, response_id: str, after: int, send: Straight, headers: Headers = ()) -> None:
    """Send the events behind number `after`, those too that are still to come."""
    await send({"type": "http.response.start", "status": 200, "headers": [SSE, *headers, *UNBUFFERED]})
    async for parts in background.follow(response_id, after):
        await send.chunk(b"".join(part.data for part in parts))
    await send({"type": "http.response.body", "body": b""})


def responses_routes(them: Responses, max_body_bytes: int) -> list[Route]:
    """All routes of responses."""
    all_ = "/v1/responses"
    one = f"{all_}/{{id}}"
    return [
        Route(all_, CreateResponse(them, max_body_bytes), methods=["POST"]),
        Route(f"{all_}/input_tokens", CountInput(them, max_body_bytes), methods=["POST"]),
        Route(f"{all_}/compact", Compact(them, max_body_bytes), methods=["POST"]),
        Route(one, GetResponse(them), methods=["GET"]),
        found_route("DELETE", one, them.delete),
        found_route("POST", f"{one}/cancel", them.cancel),
        found_route("GET", f"{one}/input_items", them.input_items),
    ]


def _caller(scope: Scope, ask: ResponseAsk) -> Caller:
    headers = header_map(scope)
    request_id = request_id_of(scope, headers, ask.request_id)
    return Caller(principal=scope["state"]["principal"], request_id=request_id, headers=headers)


def _flag(query: Mapping[str, str], name: str) -> bool:
    given = query.get(name, "false")
    if given not in ("true", "false"):
        raise ClientError(f"{name} must be true or false, got {given!r:.60}", param=name)
    return given == "true"


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ClientError(f"{name} must be the number of an event, got {given!r:.60}", param=name)
    return int(given)
