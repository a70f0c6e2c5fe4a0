"""From a call of any dialect to requests: validate, tokenise, admit, route. The one path of HTTP and gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from kvasir.cluster import telemetry
from kvasir.cluster.call import ROUTE_HEADER, SESSION_HEADERS, Call, Conversation, Prompt, Text
from kvasir.cluster.call_sampling import PROMPT, check_ids, check_range, context_of, fitted, named, sampling_of, seeded
from kvasir.cluster.failover import PAUSE_S, Failover, LastingStream
from kvasir.cluster.generation import Generation
from kvasir.cluster.group_client import GroupClient, Placement
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.metrics import Metrics
from kvasir.cluster.reading import PLAIN, Reading, constraints, reading
from kvasir.cluster.recordings import Recording, Recordings
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.telemetry import RequestSpan, Tracing
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.blocks import salted
from kvasir.engine.errors import (
    ClientError,
    KvasirError,
    ModelNotFoundError,
    UnavailableError,
    UnsupportedError,
)
from kvasir.engine.event import Pooled
from kvasir.engine.info import ModelInfo
from kvasir.engine.prompt_cut import cut_prompt
from kvasir.engine.request import Request, SamplingParams

log = logging.getLogger(__name__)

DRAIN_RETRY_S = 5.0
"""What clients are told to wait when this gateway drains: another one, or the next version, is up by then."""


class Desk:
    """Takes calls for the models of this gateway."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        directory: GroupDirectory,
        metrics: Metrics,
        tracing: Tracing,
        *,
        log_requests: bool = False,
        failover_timeout_s: float = 0.0,
        recordings: Recordings | None = None,
        tenant: Callable[[Mapping[str, str]], str] = lambda headers: "",
    ) -> None:
        self.models = tuple(models)
        self.directory = directory
        self.metrics = metrics
        metrics.watch(directory)
        self.recordings = recordings or Recordings()
        """Answers that are streamed, by their ids."""
        self._tenant = tenant
        """A call's headers -> with whom it shares cached blocks."""
        self.draining = False
        """New calls are refused."""
        self._beginning = 0
        self._running: set[Generation | Vectors] = set()
        self._tracing = tracing
        self._log_requests = log_requests
        self._failover_timeout_s = failover_timeout_s
        self._by_name = {name: model for model in models for name in model.names}

    @property
    def running(self) -> int:
        """Calls that haven't ended."""
        return self._beginning + len(self._running)

    def priorities(self, model: ServedModel) -> list[int]:
        """Of each request for `model` that hasn't ended."""
        return [request.priority for work in self._running if work.model is model for request in work.requests]

    def abandon(self) -> None:
        """Abort everything; clients are told that the server is unavailable."""
        for work in self._running:
            work.abandon()

    def model(self, name: str) -> ServedModel:
        """The model of that name. Raises ModelNotFoundError, which lists those that there are."""
        if name in self._by_name:
            return self._by_name[name]
        if not name and len(self.models) == 1:
            return self.models[0]
        served = ", ".join(self._by_name)
        raise ModelNotFoundError(f"model {name!r:.100} isn't served here; there is: {served}", param="model")

    def info(self, model: ServedModel) -> ModelInfo:
        """Facts of a living group of `model`. Raises UnavailableError."""
        return _info(self.directory.find(model.name))

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around several calls that answer one: between them it runs too."""
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    async def begin_next(self, call: Call, request_id: str, headers: Mapping[str, str]) -> Generation:
        """A later call of the same `work`. Like a stream it waits for a group where there is none just now, and isn't refused
        because this gateway drains."""
        limit, pause = time.monotonic() + self._failover_timeout_s, PAUSE_S[0]
        while True:
            try:
                self.info(self.model(call.model))
                break
            except UnavailableError:
                if time.monotonic() + pause > limit:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])
        return await self.begin(call, request_id, headers, begun=True)

    async def begin(
        self, call: Call, request_id: str, headers: Mapping[str, str], *, begun: bool = False
    ) -> Generation:
        """Start `call`. Raises a KvasirError when it can't be run, or not now. `headers` may hold a traceparent, and say
        that the answer may be resumed. begun: it belongs to what runs already."""
        started = time.monotonic()
        call = dataclasses.replace(call, cache_salt=self._salt(call.cache_salt, headers))
        model = self.model(call.model)
        recording = self.recordings.new(headers)
        span = self._span(call, model, headers)
        with self._opening(model, span):
            if not begun:
                self._check_open()
            if call.reads:
                model.need_tokenizer(call.reads)
            generation = await self._begin(call, model, request_id, headers, span, recording, started)
        self._running.add(generation)
        recording.on_end, recording.on_cancel = lambda: self.end(generation), generation.abandon
        return generation

    async def pool(
        self, call: PoolingCall, request_id: str, headers: Mapping[str, str]
    ) -> tuple[Vectors, list[Pooled]]:
        """Run `call` to its end: a vector for each input. Raises a KvasirError when it can't be run, or not now."""
        started = time.monotonic()
        call = dataclasses.replace(call, cache_salt=self._salt(call.cache_salt, headers))
        model = self.model(call.model)
        facts = {telemetry.RESPONSE_MODEL: model.name, telemetry.REQUEST_DIMENSIONS: call.params.dimensions}
        span = self._tracing.request(call.operation, call.model or model.name, headers, facts)
        with self._opening(model, span):
            vectors = await self._vectors(call, model, request_id, self._session(headers), span, started)
        self._running.add(vectors)
        try:
            return vectors, await vectors.run()
        except KvasirError as error:
            vectors.error, error.counted = error.code, True
            raise
        finally:
            self.end(vectors)

    async def detokenize(self, model: ServedModel, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids`. ClientError when one isn't the model's."""
        check_range("tokens", ids, self.info(model))
        return await model.decode(ids, skip_special_tokens=skip_special_tokens)

    def end(self, work: Generation | Vectors) -> None:
        """Every `begin` is followed by this; aborts what still runs, unless it is recorded for a client that may come back."""
        if isinstance(work, Generation):
            if work.recording.running:
                return
            if not work.recording.resumable:
                self.recordings.drop(work.recording)
        if work in self._running:
            work.close()
            self._running.discard(work)
            if work.error:
                self.metrics.failed(work.model.name, work.error)
            if self._log_requests:
                log.info("%s", work.summary())

    def _salt(self, given: str, headers: Mapping[str, str]) -> str:
        tenant = self._tenant(headers)
        return f"{tenant}:{given}" if tenant else given

    def _session(self, headers: Mapping[str, str]) -> str:
        """What the client says belongs together, apart from what others do, and however long it is: routers remember many.
        Empty: nothing."""
        given = next((headers[name] for name in SESSION_HEADERS if headers.get(name)), "")
        return salted(self._tenant(headers), given).hex() if given else ""

    @contextmanager
    def _opening(self, model: ServedModel, span: RequestSpan) -> Iterator[None]:
        """Around what happens before a call runs: an error there ends its span and is counted."""
        try:
            with self.work():
                yield
        except BaseException as error:  # cancellation too: span and counter must not be forgotten
            code = _code(error)
            self.metrics.failed(model.name, code)
            if isinstance(error, KvasirError):
                error.counted = True
            span.end(error=code)
            raise

    async def _begin(
        self,
        call: Call,
        model: ServedModel,
        request_id: str,
        headers: Mapping[str, str],
        span: RequestSpan,
        recording: Recording,
        started: float,
    ) -> Generation:
        names = {PROMPT: call.source, **call.known_as}
        with span.stage("admit"), named(names):
            requests, info, found = await self._requests(call, model, request_id, span)
        record = self.metrics.call(model.name, call.operation, requests, started)
        with span.stage("route") as facts:
            streams = await _submit(requests, self._failover(model, self._session(headers), span))
            facts.update(streams[0].placement.route.facts())
        generation = Generation(
            model,
            info,
            requests,
            streams,
            span=span,
            record=record,
            reading=found,
            recording=recording,
            started=started,
            known_as={**names, **_of_tools(call)},
        )
        if ROUTE_HEADER in headers:
            generation.route = ", ".join(stream.placement.route.header() for stream in streams)
        return generation

    async def _vectors(
        self, call: PoolingCall, model: ServedModel, request_id: str, session: str, span: RequestSpan, started: float
    ) -> Vectors:
        with span.stage("admit"):
            self._check_open()
            info, suffix = self.info(model), uuid.uuid4().hex[:8]
            info.need(call.params.task)
            encoded = await model.encode_passages(call.inputs, call.places, info.max_model_len, call.truncate)
            requests = [
                Request(
                    request_id=f"{request_id}-{number}-{suffix}",
                    prompt_token_ids=one.ids,
                    sampling=SamplingParams(),
                    priority=call.priority,
                    cache_salt=call.cache_salt,
                    deadline_s=call.deadline_s,
                    trace_context=span.trace_context,
                    pooling=call.params,
                    token_type_ids=one.segments,
                    truncated_tokens=one.cut,
                )
                for number, one in enumerate(encoded)
            ]
            for place, one in zip(call.places, encoded, strict=True):
                check_range(place, one.ids, info)
        record = self.metrics.call(model.name, call.operation, requests, started)
        return Vectors(model, info, requests, self._failover(model, session, span), span=span, record=record)

    def _failover(self, model: ServedModel, session: str, span: RequestSpan) -> Failover:
        @contextmanager
        def stage() -> Iterator[None]:
            self.metrics.failover(model.name)
            with span.stage("failover"):
                yield

        def moved(why: str, to: Placement, seconds: float) -> None:
            self.metrics.moved(model.name, why)
            with span.stage("move") as facts:
                facts.update({"why_moved": why, "prepared_s": round(seconds, 4), **to.route.facts()})

        return Failover(
            partial(self.directory.place, model.name, session=session),
            self._failover_timeout_s,
            stage,
            partial(self.directory.move, model.name, session=session),
            moved,
        )

    def _check_open(self) -> None:
        if self.draining:
            why = "this server is shutting down; send the request again"
            raise UnavailableError(why, retry_after_s=DRAIN_RETRY_S)

    async def _requests(
        self, call: Call, model: ServedModel, request_id: str, span: RequestSpan
    ) -> tuple[list[Request], ModelInfo, Reading]:
        """One request per prompt, the facts they were checked against, and how their answers are to be read."""
        info = self.info(model)
        info.need("generate")
        prompts = [await _token_ids(model, prompt, info) for prompt in call.prompts]
        call, found = await _read(call, model, prompts[0])
        sampling, chosen = sampling_of(call, model)
        check_ids(sampling, info)
        context = context_of(call, info)
        cut = [cut_prompt(ids, sampling, *context) for ids in prompts]
        suffix = uuid.uuid4().hex[:8]  # clients may use an id twice, groups need them unique
        requests = [
            Request(
                request_id=f"{request_id}-{number}-{suffix}",
                prompt_token_ids=ids,
                sampling=seeded(fitted(sampling, len(ids), context, chosen)),
                priority=call.priority,
                cache_salt=call.cache_salt,
                deadline_s=call.deadline_s,
                trace_context=span.trace_context,
                truncated_tokens=len(whole) - len(ids),
            )
            for number, (whole, ids) in enumerate(zip(prompts, cut, strict=True))
        ]
        return requests, info, found

    def _span(self, call: Call, model: ServedModel, headers: Mapping[str, str]) -> RequestSpan:
        given = call.sampling
        facts = {
            telemetry.RESPONSE_MODEL: model.name,
            telemetry.REQUEST_MAX_TOKENS: given.get("max_tokens"),
            telemetry.REQUEST_TEMPERATURE: given.get("temperature"),
            telemetry.REQUEST_TOP_P: given.get("top_p"),
            telemetry.REQUEST_TOP_K: given.get("top_k"),
            telemetry.REQUEST_SEED: given.get("seed"),
            telemetry.REQUEST_CHOICE_COUNT: given.get("n"),
        }
        return self._tracing.request(call.operation, call.model or model.name, headers, facts)


async def _read(call: Call, model: ServedModel, prompt_ids: Sequence[int]) -> tuple[Call, Reading]:
    """(the call with what holds the model to its tools and its budget of thoughts, how answers are to be read)."""
    prompt = call.prompts[0]
    if not isinstance(prompt, Conversation) or model.tokenizer is None:
        return call, PLAIN
    if call.tools is not None and prompt.chat_template is None and not model.shows_tools:
        text = f"the chat template of {model.name!r} doesn't show tools to the model, so it can't know them"
        raise UnsupportedError(f"{text}; serve it with a --chat-template that does", param="tools")
    held = await model.hold(call.tools, call.sampling.get("structured_outputs")) if call.tools is not None else None
    found = reading(call, model.tokenizer, prompt_ids, (model.tools, model.thoughts), held)
    given = constraints(call, found, model.tokenizer, held)
    return dataclasses.replace(call, sampling={**call.sampling, **given}) if given else call, found


def _of_tools(call: Call) -> dict[str, str]:
    """A structured output that nobody asked for by itself is that of tools."""
    return {"structured_outputs": "tools"} if call.tools and "structured_outputs" not in call.sampling else {}


def _code(error: BaseException) -> str:
    if isinstance(error, KvasirError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else KvasirError.code


def _info(client: GroupClient) -> ModelInfo:
    assert client.info is not None, "the directory gives out groups that are connected"
    return client.info


async def _token_ids(model: ServedModel, prompt: Prompt, info: ModelInfo) -> Sequence[int]:
    """The prompt as ids of the model's vocabulary, at least one."""
    if isinstance(prompt, (Text, Conversation)):
        ids: Sequence[int] = await model.encode(prompt)
    else:
        ids = prompt
        check_range("prompt", ids, info)
    if not ids:
        raise ClientError("prompt must hold at least one token", param="prompt")
    return ids


async def _submit(requests: Sequence[Request], failover: Failover) -> list[LastingStream]:
    """All requests or none: when one is refused the others are aborted."""
    streams = [LastingStream(request, failover) for request in requests]
    if len(streams) == 1:
        await streams[0].start()
        return streams
    tasks = [asyncio.ensure_future(stream.start()) for stream in streams]
    try:
        await asyncio.gather(*tasks)
    except BaseException:  # cancellation too
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            stream.close()
        raise
    return streams
