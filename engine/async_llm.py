"""AsyncLLM: the engine in process, for streams of an asyncio program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvasir.engine.engine import Engine
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Event, Failed, Finished, FinishReason
from kvasir.engine.llm import Message, Prompt, TextModel, engine_config
from kvasir.engine.output import RequestOutput
from kvasir.engine.output_kind import OutputKind, OutputWriter
from kvasir.engine.request import SamplingParams
from kvasir.engine.scheduler import Stats
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Transcript


@dataclass(slots=True, eq=False)
class _Stream:
    """One request, as long as the engine knows its id."""

    request_id: str
    left: int
    """Continuations whose end the engine hasn't delivered."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


class AsyncLLM:
    """`async for output in llm.generate(prompt, sampling, request_id)`. Use it from one event loop."""

    def __init__(self, model: str = "skald", **options: Any) -> None:
        self.config = engine_config(model, options)
        self._text = TextModel(self.config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, _Stream] = {}
        """An end frees the id in the engine's thread, so that no event waits for the event loop under an id that is used again."""
        self.engine = Engine(self.config, self._deliver)
        self.engine.start()

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None with skip_tokenizer_init."""
        return self._text.tokenizer

    @property
    def default_sampling(self) -> dict[str, Any]:
        """What generation_config.json asks for, by the names of SamplingParams."""
        return dict(self._text.defaults)

    def render_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation, to be given to `generate`. Options are those of Tokenizer.render_chat."""
        return self._text.render(messages, **options)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        deadline_s: float | None = None,
        trace_context: Mapping[str, str] | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncIterator[RequestOutput]:
        """Each time something is new everything so far, what is new (`delta`), or once all of it (`final_only`). Leaving the
        loop, or cancelling, ends the request."""
        options = {"priority": priority, "cache_salt": cache_salt, "deadline_s": deadline_s}
        request, text = self._text.request(
            prompt,
            sampling_params,
            request_id,
            self.engine.info.max_model_len,
            trace_context=trace_context or {},
            **options,
        )
        self._loop = asyncio.get_running_loop()
        transcript = Transcript(request, self._text.tokenizer)
        writer = OutputWriter(transcript, text, self._text.tokenizer, output_kind)
        if request_id in self._streams:
            raise ClientError(f"request id {request_id!r} is in use", param="request_id")
        stream = self._streams[request_id] = _Stream(request_id, request.sampling.streams)
        try:
            self.engine.submit(request)
        except Exception:  # no event follows
            del self._streams[request_id]
            raise
        try:
            while not transcript.finished:
                batch = [await stream.events.get()]
                while not stream.events.empty():
                    batch.append(stream.events.get_nowait())
                deltas = transcript.feed(batch)
                for index in transcript.take_matched():
                    self._end(stream, index, "stop")
                if deltas and (output := writer.write(deltas)) is not None:
                    yield output
        finally:
            self._end(stream)

    async def abort(self, request_id: str) -> None:
        """End a request: its stream finishes with finish_reason "abort"."""
        self.engine.abort(request_id)

    def stats(self) -> Stats:
        """The engine's load."""
        return self.engine.stats()

    def shutdown(self) -> None:
        """End the engine's thread; streams that are left raise UnavailableError."""
        self.engine.shutdown()

    def _end(self, stream: _Stream, index: int | None = None, reason: FinishReason = "abort") -> None:
        """Unless it has ended: its id may be another's by now."""
        if self._streams.get(stream.request_id) is stream:
            self.engine.abort(stream.request_id, index, reason)

    def _deliver(self, events: Sequence[Event]) -> None:
        """Engine's thread: one call into the event loop per step."""
        found: list[tuple[_Stream, Event]] = []
        for event in events:
            if (stream := self._streams.get(event.request_id)) is None:
                continue
            found.append((stream, event))
            if isinstance(event, (Finished, Failed)):
                stream.left = 0 if isinstance(event, Failed) else stream.left - 1
                if not stream.left:
                    del self._streams[event.request_id]
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_dispatch, found)


def _dispatch(found: Sequence[tuple[_Stream, Event]]) -> None:
    for stream, event in found:
        stream.events.put_nowait(event)
