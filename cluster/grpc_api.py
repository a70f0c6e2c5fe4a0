"""The gRPC server around a `Desk` and a `Shelf`, without its sockets: kvasir.v1, of which Inference is here, grpc.health.v1,
reflection and, beside them, the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha import reflection

from kvasir.cluster.all_metrics import OtherMetrics, no_others
from kvasir.cluster.auth import GRPC_KEY, ApiKeys, UnauthenticatedError, load_keys
from kvasir.cluster.call import ROUTE_HEADER
from kvasir.cluster.caller import Caller
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.grpc_call import Calls, Context, abort, metadata, set_trailers, tell
from kvasir.cluster.grpc_chats import Chats
from kvasir.cluster.grpc_files import Batches, Files
from kvasir.cluster.grpc_pooling import (
    ask_of_pairs,
    call_of_classify,
    classify_reply,
    inputs_of,
    rerank,
    score,
)
from kvasir.cluster.grpc_reply import GenerateReplies, numbered
from kvasir.cluster.grpc_responses import Conversations, Decisions, Responses
from kvasir.cluster.grpc_schema import ask_of_chat, ask_of_generate, call_of_embed, embed_reply, prompt_of_tokenize
from kvasir.cluster.health import Health
from kvasir.cluster.open_inference_api import OPEN_INFERENCE, OpenInference
from kvasir.cluster.openai_reply import ChatReply
from kvasir.cluster.openai_schema import Ask
from kvasir.cluster.shelf import Shelf
from kvasir.cluster.stored_chats import Chats as StoredChats
from kvasir.cluster.stored_chats import new_answer_id, nothing_kept
from kvasir.cluster.vectors import Vectors
from kvasir.engine.errors import KvasirError
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.chats_pb2_grpc import add_ChatsServicer_to_server
from kvasir.proto.files_pb2_grpc import add_BatchesServicer_to_server, add_FilesServicer_to_server
from kvasir.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from kvasir.proto.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kvasir.proto.responses_pb2_grpc import (
    add_ConversationsServicer_to_server,
    add_DecisionsServicer_to_server,
    add_ResponsesServicer_to_server,
)

SERVICES = tuple(
    f"kvasir.v1.{name}"
    for name in ("Inference", "Chats", "Responses", "Conversations", "Decisions", "Files", "Batches")
)
KIND = b"gRPC"
"""Of streams that Resume goes on with."""
WATCH_S = 0.25
"""How often those who watch grpc.health.v1 are told of changes."""
MAX_WATCHES = 1000
"""Streams that watch one gateway at a time: they need no key."""
_OPEN = frozenset(
    {
        *(f"/{HEALTH}/{name}" for name in ("Check", "Watch")),
        *(f"/{OPEN_INFERENCE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
    }
)
"""What probes ask needs no key."""


def create_grpc_server(
    desk: Desk, config: GatewayConfig, shelf: Shelf, other_metrics: OtherMetrics = no_others
) -> grpc.aio.Server:
    """Add ports and start it. Needs a running loop. `shelf`: the HTTP application's."""
    options = [("grpc.max_receive_message_length", config.max_body_bytes), ("grpc.so_reuseport", 1)]
    options += _gone_after(config.receive_timeout_s)
    keys = load_keys(config, os.environ)
    calls = Calls(keys, desk.metrics.refused, config.receive_timeout_s)
    server = grpc.aio.server(interceptors=[_KeyCheck(keys, calls)], options=options)
    add_InferenceServicer_to_server(Inference(desk, calls, shelf.chats, config.response_role), server)
    add_ChatsServicer_to_server(Chats(shelf.chats, calls), server)
    add_ResponsesServicer_to_server(Responses(desk, shelf, calls), server)
    add_ConversationsServicer_to_server(Conversations(shelf, calls), server)
    add_DecisionsServicer_to_server(Decisions(desk, calls), server)
    add_FilesServicer_to_server(Files(shelf, calls), server)
    add_BatchesServicer_to_server(Batches(shelf, calls), server)
    add_GRPCInferenceServiceServicer_to_server(OpenInference(desk, calls, other_metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(desk), server)
    reflection.enable_server_reflection((*SERVICES, OPEN_INFERENCE, HEALTH, reflection.SERVICE_NAME), server)
    return server


def _gone_after(limit_s: float) -> list[tuple[str, int]]:
    """Options of a server that asks silent clients whether they are there, and closes the connection of those who don't answer."""
    half = max(1, int(limit_s * 500))  # in ms
    unasked = [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)]
    # the first is what TCP is given, too, for a client that acknowledges nothing
    answered = [("grpc.keepalive_timeout_ms", half), ("grpc.http2.ping_timeout_ms", half)]
    return [("grpc.keepalive_time_ms", half), *answered, *unasked]


Pooled = TypeVar("Pooled", pb.EmbedReply, pb.ClassifyReply, pb.ScoreReply, pb.RerankReply)


class Inference(InferenceServicer):
    """The service of inference.proto. A call that is cancelled is cancelled here too, and ends its requests."""

    def __init__(self, desk: Desk, calls: Calls, chats: StoredChats, role: str) -> None:
        self._desk = desk
        self._calls = calls
        self._chats = chats
        self._role = role

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        await self._answer(ask_of_generate, request, context)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:  # noqa: N802
        await self._answer(ask_of_chat, request, context)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # noqa: N802
        async with self._calls.as_status(context):
            await self._calls.resume(self._desk.recordings, request, context, KIND, pb.GenerateReply)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelReply:  # noqa: N802
        async with self._calls.as_status(context):
            self._desk.recordings.need_here(request.stream_id)
            self._desk.recordings.cancel(request.stream_id, metadata(context))
            return pb.CancelReply()

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            call = dataclasses.replace(call_of_embed(request), deadline_s=caller.deadline_s)
            vectors, events = await self._desk.pool(call, caller.request_id, caller.headers)
            return _timed(context, request, embed_reply(vectors, events, caller.request_id), vectors)

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            special = {"add_special_tokens": request.add_special_tokens}
            given = special if request.HasField("add_special_tokens") else {}
            call = call_of_classify(request, inputs_of(request.inputs, given))
            call = dataclasses.replace(call, deadline_s=caller.deadline_s)
            vectors, events = await self._desk.pool(call, caller.request_id, caller.headers)
            return _timed(context, request, classify_reply(vectors, events, caller.request_id), vectors)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            ask = ask_of_pairs(request, caller.deadline_s)
            reply, vectors = await score(self._desk, ask, caller.request_id, caller.headers)
            return _timed(context, request, reply, vectors)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankReply:  # noqa: N802
        async with self._calls.calling(context) as caller:
            ask = ask_of_pairs(request, caller.deadline_s)
            reply, vectors = await rerank(self._desk, ask, caller.request_id, caller.headers)
            return _timed(context, request, reply, vectors)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeReply:  # noqa: N802
        async with self._calls.as_status(context):
            model = self._desk.model(request.model)
            ids = await model.encode(prompt_of_tokenize(request))
            set_trailers(context, request)
            reply = pb.TokenizeReply(token_ids=ids, max_model_len=self._desk.info(model).max_model_len)
            if request.return_token_texts:
                tokenizer = model.need_tokenizer("return_token_texts")
                reply.token_texts.extend(tokenizer.token_text(token) for token in ids)
            return reply

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeReply:  # noqa: N802
        async with self._calls.as_status(context):
            model, ids, skip = self._desk.model(request.model), list(request.token_ids), request.skip_special_tokens
            set_trailers(context, request)
            return pb.DetokenizeReply(text=await self._desk.detokenize(model, ids, skip_special_tokens=skip))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsReply:  # noqa: N802
        infos = {info.name: info for info in self._desk.directory.models()}
        reply = pb.ListModelsReply()
        for model in self._desk.models:
            for name in model.names:
                card = reply.models.add(id=name, root=model.name)
                if info := infos.get(model.name):
                    card.max_model_len, card.vocab_size = info.max_model_len, info.vocab_size
                    card.ready = not self._desk.draining
        return reply

    async def _answer(self, parse: Callable[[Any], Ask], request: Any, context: Context) -> None:
        async with self._calls.calling(context, later=True) as caller:
            ask = parse(request)
            call = dataclasses.replace(ask.call, deadline_s=caller.deadline_s)
            generation = await self._desk.begin(call, caller.request_id, caller.headers)
            try:
                recording = generation.recording
                recording.open(KIND)
                await tell(context, caller, recording.id)
                await self._send(ask, generation, caller, context)
                route = [] if generation.route is None else [(ROUTE_HEADER, generation.route)]
                warnings, cut = (*ask.warnings, *generation.reading.warnings), generation.truncated_tokens
                set_trailers(context, request, generation.timing, warnings, cut, route)
            finally:
                self._desk.end(generation)

    async def _send(self, ask: Ask, generation: Generation, caller: Caller, context: Context) -> None:
        """The answer; recorded, where the client may come back."""
        answer = GenerateReplies(ask, generation, caller.request_id, self._role)
        replies = answer.all(self._keeping(ask, generation, caller, answer))
        if generation.recording.resumable:
            generation.recording.record(numbered(replies))
            await self._calls.play(generation.recording, 0, context, pb.GenerateReply)
            return
        async for reply in replies:
            await self._calls.send(context, reply)

    def _keeping(
        self, ask: Ask, generation: Generation, caller: Caller, answer: GenerateReplies
    ) -> Callable[[], Awaitable[str]]:
        """What keeps the answer, as HTTP's door would have."""
        if not ask.store:
            return nothing_kept
        answer_id = new_answer_id(ask, caller.request_id)
        reply = ChatReply(ask, generation, answer_id, self._role, answer.answers)
        return self._chats.keeping(ask, reply, caller.principal)


def _timed(context: Context, request: Any, reply: Pooled, vectors: Vectors) -> Pooled:
    """`reply` with where the time went, if that was asked for; trailing metadata tells it in any case."""
    set_trailers(context, request, vectors.timing, (), vectors.truncated_tokens)
    if request.return_timing:
        reply.timing.CopyFrom(pb.Timing(**vectors.timing.json()))
    return reply


_Facts = tuple[bool, frozenset[str]]


class HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1. Services: "" (all models), those of this server that generate, and every model by its names."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._health = Health(desk)
        self._watches = 0
        self._looks: dict[_Facts, asyncio.Task[None]] = {}

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        found = self._status(request.service)
        if found == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=found)

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        """All of them; it names the models, so it needs a key."""
        names = ("", *SERVICES, OPEN_INFERENCE, *(name for model in self._desk.models for name in model.names))
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in names}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # its stubs are older

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        if self._watches >= MAX_WATCHES:
            why = f"{MAX_WATCHES} streams watch this server's health already"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        self._watches += 1
        last = None
        try:
            while True:
                facts, found = self._facts(), self._status(request.service)
                if found != last:
                    await context.write(health_pb2.HealthCheckResponse(status=found))
                last = found
                await self._other_than(facts)
        finally:
            self._watches -= 1

    async def _other_than(self, facts: _Facts) -> None:
        """Returns when something has changed; all who wait for that share one look at it."""
        if facts not in self._looks:
            look = self._looks[facts] = asyncio.ensure_future(self._look(facts))
            look.add_done_callback(lambda _: self._looks.pop(facts))
        await asyncio.shield(self._looks[facts])

    async def _look(self, facts: _Facts) -> None:
        while self._watches and self._facts() == facts:  # a group that hangs is told by the time alone
            await asyncio.sleep(WATCH_S)

    def _facts(self) -> _Facts:
        """What every status follows from."""
        return self._desk.draining, frozenset(self._health.dead())

    def _status(self, service: str) -> Any:
        names = {name: model.name for model in self._desk.models for name in model.names}
        dead = self._health.dead()
        if service in ("", *SERVICES, OPEN_INFERENCE):
            bad = bool(dead)
        elif service in names:
            bad = names[service] in dead
        else:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        serving = health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING if bad or self._desk.draining else serving


class _KeyCheck(grpc.aio.ServerInterceptor):
    """Every method needs a key, but those that probes call."""

    def __init__(self, keys: ApiKeys, calls: Calls) -> None:
        self._keys = keys
        self._calls = calls

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method in _OPEN:
            return await continuation(details)
        given = dict(details.invocation_metadata or ()).get("authorization")
        try:
            self._keys.check(given if isinstance(given, str) else None, hint=GRPC_KEY)
        except UnauthenticatedError as error:
            return await self._refuse(continuation, details, error)
        return await continuation(details)

    async def _refuse(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails, error: KvasirError
    ) -> Any:
        """A handler of the method's own kind that aborts; methods that don't exist are refused alike."""

        async def refuse(_: Any, context: Context) -> None:
            await abort(context, self._calls.told(error))

        handler = await continuation(details)
        if handler is not None and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        if handler is not None and handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)
