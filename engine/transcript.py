"""From the engine's events to what a client sees: text, and where a stop string ends it. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvasir.engine.errors import ERRORS, ServerError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.request import Request
from kvasir.engine.tokenizer import DecodeStream, Tokenizer


@dataclass(slots=True)  # not frozen, as Token
class Delta:
    """What is new in one continuation. Tokens come at once; text may lag behind them (see `Transcript`)."""

    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    """As many as `token_ids`, when asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the continuation; None for end-of-sequence."""
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None

    @property
    def matched(self) -> bool:
        """A stop string ended it here, which the engine doesn't know: abort the index with reason "stop"."""
        return isinstance(self.stop_reason, str)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, summed over its continuations."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Output:
    """One continuation so far."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timing: Timing = field(default_factory=Timing)
    drafted: int = 0
    accepted: int = 0
    """Of `drafted` tokens, as in `Finished`."""
    preemptions: int = 0
    settled: bool = False
    """The engine's own `Finished` arrived: it works on this continuation no more."""
    chunks: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text delivered so far."""
        return "".join(self.chunks)


class Transcript:
    """All continuations of one request. `feed` it the request's events in order, however they are cut.

    Held back: half a character, and text that may be the beginning of a stop string. The stop string that is complete
    first ends the text (of several that end on the same character the longest), wherever tokens begin and end. With
    `tokenizer` None text stays empty. `eos_token_ids`: the model's, default the tokenizer's. `shown`: special tokens whose
    text is wanted though others are skipped.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Sequence[int] | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.outputs = [Output(index) for index in range(sampling.n)]
        """What is delivered; with best_of, of those that are made."""
        self._made = (
            [Output(index) for index in range(sampling.streams)] if sampling.streams > sampling.n else self.outputs
        )
        self.matched: list[int] = []
        """What the next `take_matched` returns."""
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._writers: list[_Writer] | None = None
        if tokenizer is not None and sampling.detokenize:
            eos = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
            self._writers = _writers(request, tokenizer, frozenset(() if sampling.ignore_eos else eos), shown)

    @property
    def finished(self) -> bool:
        """Every continuation has its finish_reason; `usage` is complete only when also `settled`."""
        return all(output.finish_reason for output in self.outputs)

    @property
    def settled(self) -> bool:
        """The engine sends no more events."""
        return all(output.settled for output in self._made)

    @property
    def usage(self) -> Usage:
        """Counts so far; `cached_tokens` is known once a continuation's `Finished` arrived."""
        completion = sum(len(output.token_ids) for output in self._made)
        return Usage(len(self.request.prompt_token_ids), self.cached_tokens, completion)

    def feed(self, events: Iterable[Event]) -> list[Delta]:
        """What `events` bring, at most one delta per continuation. Raises what a `Failed` says. After a stop string or
        `Finished`, further tokens of that continuation are ignored. With best_of all come when the last has ended."""
        deltas: dict[int, Delta] = {}
        for event in events:
            if isinstance(event, Token):
                delta = self._token(event)
            elif isinstance(event, Failed):
                raise ERRORS.get(event.code, ServerError)(event.message, param=event.param)
            else:
                assert not isinstance(event, Pooled), "a request for a vector has no transcript"
                delta = self._finish(event)
            if delta is not None:
                before = deltas.get(event.index)
                deltas[event.index] = _merged(before, delta) if before else delta
        return list(deltas.values()) if self._made is self.outputs else self._choose()

    def take_matched(self) -> list[int]:
        """Continuations that a stop string ended since the last time, which the engine doesn't know: abort them with reason
        "stop"."""
        matched, self.matched = self.matched, []
        return matched

    def _choose(self) -> list[Delta]:
        """The best of what was made, once all is there."""
        if self.finished or not all(output.finish_reason for output in self._made):
            return []
        shown = self.request.sampling.logprobs is not None
        ranked = sorted(self._made, key=_mean_logprob, reverse=True)
        for index, output in enumerate(ranked[: len(self.outputs)]):
            self.outputs[index] = replace(output, index=index, logprobs=output.logprobs if shown else None)
        return [
            Delta(
                o.index,
                o.text,
                o.token_ids,
                o.logprobs,
                o.finish_reason,
                o.stop_reason,
                None if o.index else self.prompt_logprobs,
            )
            for o in self.outputs
        ]

    def _token(self, event: Token) -> Delta | None:
        output = self._made[event.index]
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if output.finish_reason:
            return None
        text, ids, stop, logprobs = "", event.token_ids, None, event.logprobs
        if self._writers:
            text, count, stop = self._writers[event.index].write(ids)
            if stop is not None:
                ids, logprobs = ids[:count], logprobs and logprobs[:count]
        output.token_ids += ids
        if logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += logprobs
        reason: FinishReason | None = "stop" if stop else None
        return self._noted(output, Delta(event.index, text, ids, logprobs, reason, stop, event.prompt_logprobs))

    def _finish(self, event: Finished) -> Delta | None:
        output = self._made[event.index]
        output.settled, output.timing, output.preemptions = True, event.timing, event.preemptions
        output.drafted, output.accepted = event.drafted, event.accepted
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        if output.finish_reason:
            return None
        text, stop = "", None
        if self._writers:
            text, stop = self._writers[event.index].finish(event.stop_token_id)
        reason: FinishReason = "stop" if stop else event.reason
        stop_id = event.stop_token_id if event.stop_token_id in self._stop_ids else None
        return self._noted(output, Delta(event.index, text, finish_reason=reason, stop_reason=stop or stop_id))

    def _noted(self, output: Output, delta: Delta) -> Delta:
        if delta.text:
            output.chunks.append(delta.text)
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.matched:
                self.matched.append(delta.index)
        return delta


class _Writer:
    """Text of one continuation: decoding, stop strings, and the stop token whose text is left out."""

    __slots__ = ("_aside", "_count", "_ends", "_held", "_include", "_min_tokens", "_state", "_stops", "_stream")

    def __init__(
        self, stream: DecodeStream, stops: _StopStrings | None, ends: frozenset[int], *, include: bool, min_tokens: int
    ) -> None:
        self._stream = stream
        self._stops = stops
        self._ends = ends
        self._include = include
        self._min_tokens = min_tokens
        self._count = 0
        self._aside: int | None = None  # maybe the stop token: whether its text counts is known by the next event
        self._held = ""
        self._state = 0

    def write(self, ids: Sequence[int]) -> tuple[str, int, str | None]:
        """(text, tokens that count, stop string found). Tokens behind a stop string don't count."""
        if self._stops is None and self._aside is None and self._ends.isdisjoint(ids):  # nothing to look for
            return self._stream.push(ids), len(ids), None
        text = ""
        for position, token in enumerate(ids):
            if self._aside is not None:
                new, stop = self._flush_aside()
                text += new
                if stop is not None:
                    return text, position, stop
            self._count += 1
            if token in self._ends:
                self._aside = token
                continue
            new, stop = self._search(self._stream.push((token,)))
            text += new
            if stop is not None:
                return text, position + 1, stop
        return text, len(ids), None

    def finish(self, stop_token_id: int | None) -> tuple[str, str | None]:
        """(text that was held back, stop string found in it)."""
        text, stop = "", None
        if self._aside is not None and self._aside != stop_token_id:
            text, stop = self._flush_aside()
        if stop is None:
            rest, stop = self._search(self._stream.finish())
            text += rest
        return (text, stop) if stop else (text + self._held, None)

    def _flush_aside(self) -> tuple[str, str | None]:
        """The token wasn't the stop token after all."""
        assert self._aside is not None
        text = self._stream.push((self._aside,))
        self._aside = None
        return self._search(text)

    def _search(self, new: str) -> tuple[str, str | None]:
        """(text that can't be part of a stop string any more, stop string found)."""
        stops = self._stops
        if stops is None:
            return new, None
        text = self._held + new
        end, self._state, stop = stops.step(self._state, new, armed=self._count >= self._min_tokens)
        if stop is not None:
            end += len(self._held)
            return text[: end if self._include else end - len(stop)], stop
        keep = stops.depth[self._state]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


class _StopStrings:
    """Finds the stop strings in a text that arrives in parts, O(1) per character (Aho and Corasick 1975).

    A state is a beginning of some stop string, the longest one that the text ends with; `depth` is its length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._fail = self._link()

    def step(self, state: int, text: str, *, armed: bool) -> tuple[int, int, str | None]:
        """(characters read, new state, stop string that ends there). Unless `armed` none is reported."""
        following, fail, found = self._next, self._fail, self._found
        for position, char in enumerate(text):
            while state and char not in following[state]:
                state = fail[state]
            state = following[state].get(char, 0)
            if found[state] is not None:
                if armed:
                    return position + 1, state, found[state]
                while state and not following[state]:  # a whole stop string that doesn't count is the beginning of none
                    state = fail[state]
        return len(text), state, None

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self._found.append(None)
            state = self._next[state][char]
        self._found[state] = stop

    def _link(self) -> list[int]:
        """state -> the longest other state that it ends with; shorter states first."""
        fail = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                queue.append(child)
                link = fail[state]
                while link and char not in self._next[link]:
                    link = fail[link]
                fail[child] = self._next[link].get(char, 0)
                self._found[child] = self._found[child] or self._found[fail[child]]
        return fail


def _writers(request: Request, tokenizer: Tokenizer, eos: frozenset[int], shown: frozenset[int]) -> list[_Writer]:
    """One writer for each continuation; they share the stop strings' automaton."""
    sampling, resumed = request.sampling, request.resume_token_ids
    context = [*request.prompt_token_ids, *resumed] if resumed else request.prompt_token_ids
    stops = _StopStrings(sampling.stop) if sampling.stop else None
    include = sampling.include_stop_str_in_output
    ends = frozenset() if include else eos.union(sampling.stop_token_ids)
    min_tokens = sampling.min_tokens - len(resumed)
    return [
        _Writer(
            tokenizer.stream(
                context,
                skip_special_tokens=sampling.skip_special_tokens,
                spaces_between_special_tokens=sampling.spaces_between_special_tokens,
                shown=shown,
            ),
            stops,
            ends,
            include=include,
            min_tokens=min_tokens,
        )
        for _ in range(sampling.streams)
    ]


def _mean_logprob(output: Output) -> float:
    """Log probability per token; a continuation without any is as good as none."""
    scores = [score.logprob for score in output.logprobs or ()]
    return sum(scores) / len(scores) if scores else -math.inf


def _merged(a: Delta, b: Delta) -> Delta:
    logprobs = b.logprobs if a.logprobs is None else a.logprobs if b.logprobs is None else [*a.logprobs, *b.logprobs]
    return Delta(
        a.index,
        a.text + b.text,
        [*a.token_ids, *b.token_ids],
        logprobs,
        b.finish_reason or a.finish_reason,
        b.stop_reason if b.finish_reason else a.stop_reason,
        a.prompt_logprobs or b.prompt_logprobs,
    )
