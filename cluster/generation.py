"""What runs for one call: the events of its requests become deltas; metrics and the span are closed with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from kvasir.cluster.call_sampling import named
from kvasir.cluster.failover import LastingStream
from kvasir.cluster.merged import Merged
from kvasir.cluster.metrics import CallRecord
from kvasir.cluster.reading import PLAIN, Reading
from kvasir.cluster.recordings import Recording
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.telemetry import RequestSpan
from kvasir.cluster.timing import CallTiming
from kvasir.engine.errors import KvasirError, UnavailableError
from kvasir.engine.event import Event, Finished
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.transcript import Delta, Transcript, Usage


class Generation:
    """Iterate for the deltas, each with the number of its prompt; `close` in any case.

    Iteration raises the KvasirError with which a request failed, and ends when the groups are done with all of them.
    """

    def __init__(
        self,
        model: ServedModel,
        info: ModelInfo,
        requests: Sequence[Request],
        streams: Sequence[LastingStream],
        *,
        span: RequestSpan,
        record: CallRecord,
        recording: Recording,
        started: float,
        reading: Reading = PLAIN,
        known_as: Mapping[str, str] = {},
    ) -> None:
        """known_as: fields of `SamplingParams` that the client knows by other names."""
        self.model = model
        self.info = info
        """What the requests were checked against."""
        self.requests = requests
        self.reading = reading
        """How the answers of a conversation are to be read."""
        self.transcripts = [
            Transcript(r, model.tokenizer, eos_token_ids=info.eos_token_ids, shown=reading.shown) for r in requests
        ]
        self.recording = recording
        """What is known of it as a stream."""
        self.closed = False
        self.route: str | None = None
        """The router's reasons, for a client that asked for them."""
        self._streams = streams
        self._merged = Merged(streams) if len(streams) > 1 else None
        self._open = len(streams)
        self._span = span
        self._record = record
        self._started = started
        self._known_as = known_as
        self._why: KvasirError | None = None
        self.error: str | None = None
        """Once closed: the code of what went wrong; `cancelled` when the client went away."""

    @property
    def usage(self) -> Usage:
        """Sum over all prompts; complete when iteration has ended."""
        counts = [dataclasses.astuple(transcript.usage) for transcript in self.transcripts]
        return Usage(*map(sum, zip(*counts, strict=True)))

    @property
    def truncated_tokens(self) -> int:
        """What was cut off the prompts because the client wanted it so."""
        return sum(request.truncated_tokens for request in self.requests)

    @property
    def timing(self) -> CallTiming:
        """Complete when iteration has ended."""
        outputs = [output for transcript in self.transcripts for output in transcript.outputs]
        return CallTiming.of(
            (output.timing for output in outputs),
            total_s=time.monotonic() - self._started,
            cached_tokens=sum(transcript.cached_tokens for transcript in self.transcripts),
            group=self._streams[0].placement.client.name,
            drafted=sum(output.drafted for output in outputs),
            accepted=sum(output.accepted for output in outputs),
        )

    def summary(self) -> str:
        """One line for the log: no text of anybody's."""
        usage, seconds = self.usage, time.monotonic() - self._started
        counts = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached"
        name = self.requests[0].request_id.rsplit("-", 2)[0]
        return f"{name} {self.model.name}: {counts}, {seconds:.3f} s, {self.error or 'done'}"

    def close(self) -> None:
        """Abort what still runs."""
        if self.closed:
            return
        self.closed = True
        self.abandon()
        if self._merged:
            self._merged.close()
        self._conclude()

    def abandon(self, why: KvasirError | None = None) -> None:
        """Abort what still runs; who iterates is told why, or that the group is unavailable."""
        self._why = self._why or why
        for stream in self._streams:
            stream.close()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[tuple[int, Delta]]:
        """What came since the last time: at least one delta."""
        while self._open:
            number, events = await self._merged.next() if self._merged else (0, await self._streams[0].batch())
            if not events:
                self._open -= 1
            elif deltas := self._feed(number, events):
                return deltas
        if not all(transcript.settled for transcript in self.transcripts) and not self.closed:
            raise self._ended_early()
        raise StopAsyncIteration

    def pour(self, put: Callable[[Sequence[tuple[int, Delta]]], None], free: Callable[[], bool]) -> None:
        """Give deltas that come while an iteration is awaited to `put` instead, as long as it is `free`, but for the last
        ones. The answers to several prompts aren't given away."""

        def take(events: Sequence[Event]) -> None:
            if deltas := self._feed(0, events):
                put(deltas)

        if self._merged is None:
            self._streams[0].pour(take, free)

    def _feed(self, number: int, events: Sequence[Event]) -> list[tuple[int, Delta]]:
        transcript = self.transcripts[number]
        try:
            deltas = transcript.feed(events)
        except KvasirError as error:
            self.error, error.counted = error.code, True
            with named(self._known_as):
                raise
        for event in events:
            if isinstance(event, Finished):
                self._record.finished(number, event)
        if deltas and deltas[0].token_ids:
            self._record.tokens(number)
        found = []
        for delta in deltas:
            if delta.finish_reason == "abort":
                raise self._ended_early()
            found.append((number, delta))
        if transcript.matched:
            for index in transcript.take_matched():
                self._streams[number].abort(index, "stop")
        return found

    def _ended_early(self) -> KvasirError:
        """It was abandoned; without a reason the server drains, or the group does."""
        ended = "the server ended this request before it was complete"
        error = self._why or UnavailableError(ended, retry_after_s=1.0)
        self.error, error.counted = error.code, True
        return error

    def _conclude(self) -> None:
        """End span and record; a call that was closed early counts as aborted."""
        reasons = [output.finish_reason or "abort" for t in self.transcripts for output in t.outputs]
        self.error = self.error or ("cancelled" if "abort" in reasons else None)
        usage = self.usage
        self._span.end(
            response_id=self.requests[0].request_id,
            finish_reasons=reasons,
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            error=self.error,
        )
