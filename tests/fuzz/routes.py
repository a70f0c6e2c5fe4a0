"""Bodies through whole routes, over a fake group in this process: 4xx at worst, and an answer that can be sent."""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
from google.protobuf import json_format
from google.protobuf.message import DecodeError

sys.path.append(str(Path(__file__).resolve().parents[1] / "cluster"))
from fake_gateway import LiveGateway, write_byte_model

from kvasir.cluster import batch_file, open_inference_api
from kvasir.cluster.auth import ApiKeys
from kvasir.cluster.batch_line import answer, dumped, line_label, line_object, openai_entry
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import close_app, create_app, create_grpc_server
from kvasir.cluster.grpc_call import Calls
from kvasir.engine.errors import ClientError, KvasirError
from kvasir.proto import open_inference_pb2 as pb

FRESH = 1000
"""So many executions share what is stored."""


def _told(error: Exception) -> KvasirError:
    """What servicers make an internal error of is a finding here."""
    if isinstance(error, KvasirError):
        return error
    raise AssertionError("a call failed") from error


class _Gateway:
    """Routes over a fake group, without sockets."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        write_byte_model(Path(self._folder.name))
        self._config = GatewayConfig(failover_timeout_s=0, state_path=":memory:")
        self._live = LiveGateway(Path(self._folder.name), self._config)
        self.desk, self._calls = self._live.desk, 0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """To its end."""
        if self._calls % FRESH == 0:
            if self._calls:
                self._live.loop.run_until_complete(close_app(self._app))
                gc.collect()
            self._app = create_app(self.desk, self._config)
        self._calls += 1
        group = self._live.group
        for one in (group.requests, group.aborted, group.streams, group._live):
            one.clear()
        with patch.object(Calls, "told", staticmethod(_told)):
            return self._live.loop.run_until_complete(work)

    def methods(self) -> dict[str, Any]:
        """Those of kvasir.v1, by their names."""
        with patch("grpc.aio.server", lambda **_: _Methods()):
            server: Any = create_grpc_server(self.desk, self._config, self._app.state.shelf)
        found: dict[str, Any] = server.found
        return found

    async def send(self, method: str, path: str, body: bytes = b"", query: bytes = b"") -> Any:
        """The answer's JSON; {} of one that isn't."""
        parts, status, sent = list[bytes](), 0, False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await self._live.loop.create_future()  # the client stays
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
                 "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
                 "root_path": "", "server": ("localhost", 80), "client": ("localhost", 1)}  # fmt: skip
        await self._app(scope, receive, send)
        assert 200 <= status < 500, (status, parts)
        text = b"".join(parts)
        return orjson.loads(text) if text.startswith(b"{") and b"\n" not in text else {}


_made: list[_Gateway] = []


def _gateway() -> _Gateway:
    """Made when it is first used."""
    if not _made:
        _made.append(_Gateway())
    return _made[0]


def decisions(data: bytes) -> None:
    """POST /v1/decisions."""
    gateway = _gateway()
    gateway.do(gateway.send("POST", "/v1/decisions", data))


def compaction(data: bytes) -> None:
    """POST /v1/responses/compact, and going on from what it said."""
    gateway = _gateway()

    async def both() -> None:
        said = await gateway.send("POST", "/v1/responses/compact", data)
        if said.get("object") == "response.compaction":
            body = orjson.dumps({"model": "bytes", "input": said["output"], "max_output_tokens": 4, "store": False})
            answer = await gateway.send("POST", "/v1/responses", body)
            assert answer["object"] == "response", answer

    gateway.do(both())


def conversations(data: bytes) -> None:
    """Bodies that make, change and add to one, a query of its items and an id; separated by \\0."""
    gateway = _gateway()
    make, change, add, query, item = (*data.split(b"\0"), *[b""] * 5)[:5]

    async def all_() -> None:
        made = await gateway.send("POST", "/v1/conversations", make)
        path = f"/v1/conversations/{made.get('id', 'conv_none')}"
        await gateway.send("POST", path, change)
        await gateway.send("POST", f"{path}/items", add)
        for one in (b"", query):
            items = await gateway.send("GET", f"{path}/items", query=one)
        for name in [*(str(one["id"]) for one in items.get("data", [])), item.decode("latin-1")]:
            if "/" not in name:
                await gateway.send("GET", f"{path}/items/{name}")
                await gateway.send("DELETE", f"{path}/items/{name}")
        body = {"model": "bytes", "input": "Hi", "conversation": made.get("id"), "max_output_tokens": 4}
        await gateway.send("POST", "/v1/responses", orjson.dumps(body))

    gateway.do(all_())


def batches(data: bytes) -> None:
    """The body of one, before a \\0, and the lines of its file as both kinds of batches read them."""
    gateway = _gateway()
    body, _, lines = data.partition(b"\0")

    async def all_() -> None:
        await gateway.send("POST", "/v1/batches", body)
        await gateway.send("GET", "/v1/batches", query=body)
        for number, raw in enumerate(lines.split(b"\n")):
            with contextlib.suppress(ClientError):
                label = line_label(value := line_object(raw))
                line = batch_file._parsed(value, number, label)
                failure, done = None, None
                try:
                    done = await answer(gateway.desk, line.url, line.body)
                except ClientError as error:
                    failure = error
                dumped(openai_entry(label, done, failure))
                if line.simple:
                    dumped(batch_file._simple_entry(line, done, failure))

    gateway.do(all_())


class _Refused(Exception):  # noqa: N818
    """The call's end."""


class _Context:
    """What a servicer is told of a call."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, pairs: Any) -> None:
        pass

    def set_trailing_metadata(self, pairs: Any) -> None:
        pass

    async def write(self, reply: Any) -> None:
        self.replies.append(reply)

    async def abort(self, status: Any, text: str, trailers: Any) -> None:
        assert status.name not in ("INTERNAL", "UNKNOWN"), text
        raise _Refused


def kserve(data: bytes) -> None:
    """ModelInfer and ModelStreamInfer of the Open Inference Protocol, of messages as bytes or as JSON."""
    gateway = _gateway()
    try:
        if data[:1] in (b"{", b"["):
            message = json_format.Parse(data, pb.ModelInferRequest())
        else:
            message = pb.ModelInferRequest.FromString(data[1:])
    except (DecodeError, json_format.ParseError, UnicodeDecodeError, RecursionError):  # the libraries' own
        return
    service = open_inference_api.OpenInference(gateway.desk, Calls(ApiKeys(()), gateway.desk.metrics.refused, 60.0))

    async def asked() -> AsyncIterator[pb.ModelInferRequest]:
        yield message

    async def both() -> None:
        with contextlib.suppress(_Refused):
            (await service.ModelInfer(message, _Context())).SerializeToString()
        with contextlib.suppress(_Refused):
            await service.ModelStreamInfer(asked(), context := _Context())
            assert context.replies

    gateway.do(both())


class _Methods:
    """Stands for a gRPC server: what is added to it can be called."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same as below, without names."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        if service.startswith("kvasir.v1."):
            self.found |= {f"{service}.{name}": handler for name, handler in handlers.items()}


def grpc_methods(data: bytes) -> None:
    """Any method of kvasir.v1, chosen by the first byte; its message as bytes or as JSON."""
    gateway = _gateway()

    async def called() -> None:
        methods = gateway.methods()
        handler = methods[sorted(methods)[data[0] % len(methods)]] if data else None
        if handler is None or (message := _message(handler.request_deserializer, data[1:])) is None:
            return

        async def asked() -> AsyncIterator[Any]:
            yield message

        call = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        with contextlib.suppress(_Refused):
            answer = call(asked() if handler.request_streaming else message, context := _Context())
            if hasattr(answer, "__aiter__"):
                context.replies += [one async for one in answer]
            elif (whole := await answer) is not None:
                context.replies.append(whole)
            for reply in context.replies:
                reply.SerializeToString()

    gateway.do(called())


def _message(read: Callable[[bytes], Any], data: bytes) -> Any:
    """None: it is none, which the libraries say."""
    try:
        return json_format.Parse(data, read(b"")) if data[:1] in (b"{", b"[") else read(data)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError, RecursionError):
        return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (decisions, compaction, conversations, batches, kserve, grpc_methods)
}
