"""inference.GRPCInferenceService: the Open Inference Protocol of KServe and Triton, around a `Desk`."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from typing import Any

from kvasir.cluster.all_metrics import OtherMetrics, no_others
from kvasir.cluster.call import ROUTE_HEADER, request_id_from
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.grpc_call import Calls, Context, metadata
from kvasir.cluster.health import Health
from kvasir.cluster.http_front import warning_header
from kvasir.cluster.open_inference_schema import FINAL, INPUTS, OUTPUTS, TensorAsk, parse_inference, write_outputs
from kvasir.cluster.open_inference_statistics import statistics
from kvasir.cluster.open_inference_vectors import (
    EMBEDDING,
    VECTOR_INPUTS,
    VECTOR_OUTPUTS,
    embedded,
    only_embeds,
    parse_vectors,
    wants_vectors,
)
from kvasir.cluster.open_inference_wire import VERSION, check_version, earlier
from kvasir.cluster.recordings import RESUMABLE
from kvasir.cluster.vectors import Vectors
from kvasir.engine.errors import ClientError, KvasirError, ModelNotFoundError
from kvasir.engine.transcript import Delta
from kvasir.proto import open_inference_pb2 as pb
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceServicer

OPEN_INFERENCE = "inference.GRPCInferenceService"
SHAPES = {"num_input_tokens": (1,), EMBEDDING: (-1, -1)}
"""Of outputs that don't have one value per continuation."""
MAX_AT_ONCE = 256
"""Requests of one ModelStreamInfer that run; further ones aren't read until one of them ends."""
EXTENSIONS = ("parameters", "schedule_policy", "statistics")


class OpenInference(GRPCInferenceServiceServicer):
    """The service of open_inference.proto. A call that is cancelled is cancelled here too, and ends its requests."""

    def __init__(self, desk: Desk, calls: Calls, other_metrics: OtherMetrics = no_others) -> None:
        self._desk = desk
        self._calls = calls
        self._other_metrics = other_metrics
        self._health = Health(desk)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        return pb.ServerLiveResponse(live=not self._health.dead())

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not await self._health.unready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        try:
            check_version(request.version)
            name = self._desk.model(request.name).name
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=name not in await self._health.unready())

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="kvasir", version=version("kvasir"), extensions=EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        async with self._calls.as_status(context):
            check_version(request.version)
            model = self._desk.model(request.name)
            info = self._desk.info(model)
            reply = pb.ModelMetadataResponse(name=model.name, versions=[VERSION], platform="kvasir")
            inputs, outputs = INPUTS, OUTPUTS | (VECTOR_OUTPUTS if "embed" in info.tasks else {})
            if alone := only_embeds(info.tasks):
                inputs, outputs = VECTOR_INPUTS, VECTOR_OUTPUTS
            for tensor, datatype in inputs.items():
                reply.inputs.add(name=tensor, datatype=datatype, shape=[-1 if alone and tensor == "text_input" else 1])
            for tensor, datatype in outputs.items():
                reply.outputs.add(name=tensor, datatype=datatype, shape=SHAPES.get(tensor, (-1,)))
            reply.properties["max_model_len"] = str(info.max_model_len)
            return reply

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        async with self._calls.as_status(context):
            check_version(request.version)
            models = [self._desk.model(request.name)] if request.name else self._desk.models
            others = await self._other_metrics() or {}
            texts = [self._desk.metrics.render().decode(), *others.values()]
            return statistics(texts, [model.name for model in models])

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        headers = metadata(context)
        async with self._calls.as_status(context):
            request_id = _request_id(request, headers)
            await context.send_initial_metadata((("x-request-id", request_id),))
            if self._wants_vectors(request):
                reply, vectors = await self._embed(request, request_id, headers, context)
                context.set_trailing_metadata((("server-timing", vectors.timing.text()),))
                return reply
            asked = parse_inference(request)
            if asked.stream:
                raise ClientError("stream must be false in ModelInfer; ModelStreamInfer streams", param="stream")
            async with self._begun(asked, request_id, headers, context) as generation:
                reply = pb.ModelInferResponse()
                await _write_whole(reply, asked, generation)
                _write_end(reply, asked, generation)
                context.set_trailing_metadata((("server-timing", generation.timing.text()),))
                return reply

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        free, writing = asyncio.Semaphore(MAX_AT_ONCE), asyncio.Lock()
        tasks: set[asyncio.Task[None]] = set()
        call, broken = asyncio.current_task(), list[Exception]()
        assert call is not None, "gRPC runs each call as a task"

        async def answer(request: pb.ModelInferRequest) -> None:
            async with aclosing(self._answers(request, context)) as replies:
                async for reply in replies:
                    async with writing:
                        if broken:
                            return
                        try:
                            await self._calls.send(context, reply)
                        except Exception as error:  # without it the answer would go on as if nothing were missing
                            broken.append(error)
                            call.cancel()
                            return

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            free.release()

        async with self._calls.as_status(context):
            await context.send_initial_metadata(())  # else it goes with the first message, and no status without that
            try:
                async for request in request_iterator:
                    await free.acquire()
                    task = asyncio.ensure_future(answer(request))
                    tasks.add(task)
                    task.add_done_callback(ended)
                await asyncio.gather(*tasks)
            except asyncio.CancelledError:
                if not broken:
                    raise
                raise broken[0] from None
            finally:
                left = [*tasks]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _answers(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """To one request of a stream. An error is one of them: other requests go on."""
        headers = metadata(context)
        try:
            request_id = _request_id(request, headers)
            if self._wants_vectors(request):
                whole, _ = await self._embed(request, request_id, headers, context)
                whole.parameters[FINAL].bool_param = True
                yield pb.ModelStreamInferResponse(infer_response=whole)
                return
            asked = parse_inference(request)
            async with self._begun(asked, request_id, headers, context) as generation:
                replies = _pieces(asked, generation) if asked.stream else _one(asked, generation)
                async with aclosing(replies):
                    async for reply in replies:
                        yield reply
        except Exception as error:
            yield _failed(request, self._calls.told(error))

    def _wants_vectors(self, request: pb.ModelInferRequest) -> bool:
        return wants_vectors(request, self._desk.info(self._desk.model(request.model_name)).tasks)

    async def _embed(
        self, request: pb.ModelInferRequest, request_id: str, headers: Mapping[str, str], context: Context
    ) -> tuple[pb.ModelInferResponse, Vectors]:
        return await embedded(self._desk, parse_vectors(request), request_id, headers, context.time_remaining())

    @asynccontextmanager
    async def _begun(
        self, asked: TensorAsk, request_id: str, headers: Mapping[str, str], context: Context
    ) -> AsyncIterator[Generation]:
        call = dataclasses.replace(asked.ask.call, deadline_s=earlier(context.time_remaining(), asked.timeout_s))
        generation = await self._desk.begin(call, request_id, headers)
        try:
            yield generation
        finally:
            self._desk.end(generation)


def _request_id(request: pb.ModelInferRequest, headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id")
    return request_id_from(given, "x-request-id") if given else request_id_from(request.id, "id")


async def _write_whole(reply: pb.ModelInferResponse, asked: TensorAsk, generation: Generation) -> None:
    async for _ in generation:
        pass
    outputs = generation.transcripts[0].outputs
    values: dict[str, list[Any]] = {
        "text_output": [asked.opening + output.text for output in outputs],
        "finish_reason": [output.finish_reason or "" for output in outputs],
        "num_input_tokens": [generation.usage.prompt_tokens],
        "num_output_tokens": [len(output.token_ids) for output in outputs],
    }
    write_outputs(reply, asked, generation.model.name, values)


async def _one(asked: TensorAsk, generation: Generation) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
    """The only response of a stream to a request that wants no deltas."""
    whole = pb.ModelStreamInferResponse()
    await _write_whole(whole.infer_response, asked, generation)
    whole.infer_response.parameters[FINAL].bool_param = True
    _write_end(whole.infer_response, asked, generation)
    yield whole


async def _pieces(asked: TensorAsk, generation: Generation) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
    """A response per step; the last is marked."""
    transcript, prompt_tokens = generation.transcripts[0], [generation.usage.prompt_tokens]
    async for deltas in generation:
        values = _step([delta for _, delta in deltas], len(transcript.outputs))
        values["num_input_tokens"] = prompt_tokens
        whole = pb.ModelStreamInferResponse()
        reply = whole.infer_response
        write_outputs(reply, asked, generation.model.name, values)
        reply.parameters[FINAL].bool_param = finished = transcript.finished
        if finished:
            _write_end(reply, asked, generation)
        yield whole


def _step(deltas: Sequence[Delta], count: int) -> dict[str, list[Any]]:
    """What is new, per continuation; nothing of those that have no delta."""
    texts, reasons, tokens = [""] * count, [""] * count, [0] * count
    for delta in deltas:
        texts[delta.index] += delta.text
        reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        tokens[delta.index] += len(delta.token_ids)
    return {"text_output": texts, "finish_reason": reasons, "num_output_tokens": tokens}


def _write_end(reply: pb.ModelInferResponse, asked: TensorAsk, generation: Generation) -> None:
    """Into the last response: what was ignored or cut off, and the router's reasons if they were asked for."""
    resumable = (f"{RESUMABLE} (not in this protocol)",) if generation.recording.resumable else ()
    for _, text in warning_header((*asked.ask.warnings, *resumable), generation.truncated_tokens):
        reply.parameters["warning"].string_param = text.decode()
    if generation.route is not None:
        reply.parameters[ROUTE_HEADER].string_param = generation.route


def _failed(request: pb.ModelInferRequest, error: KvasirError) -> pb.ModelStreamInferResponse:
    reply = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    reply.parameters[FINAL].bool_param = True
    reply.parameters["code"].string_param = error.code
    if error.param is not None:
        reply.parameters["param"].string_param = error.param
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=reply)
