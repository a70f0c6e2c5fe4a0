"""Requests, events, errors and stats as protobuf messages of `proto/group.proto`, and back. No torch.

On a stream a request is called by its number; `request_id` travels once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar, cast, get_args

from google.protobuf.message import Message

from kvasir.engine.config import Role
from kvasir.engine.errors import ERRORS, ClientError, KvasirError, ServerError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import NESTED, Peer, PoolingParams, Request, SamplingParams
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb

MAX_MESSAGE_BYTES = 64 * 2**20
"""A prompt of a million token ids takes 3 to 5 MB; prompt_logprobs with 20 alternatives take 300 bytes a token."""
PUBLISH_PERIOD_S = 0.04
"""How soon a group tells of changes of its load and blocks. Behind the 50 ms for which the engine's figures hold, gateways
know within 100 ms."""
LOAD_PERIOD_S = 0.25
"""How often a group reports its load; gateways count on at least every half second."""
STALL_S = 60.0
"""A step loop without a turn for this long hangs: the longest honest step (a chunk of a big model on a slow CPU, or
a kernel compiled on first use) takes seconds."""


class Named(Protocol):
    """A request, as whoever waits for its events knows it."""

    @property
    def request_id(self) -> str: ...


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Named)
_TIMES = [field.name for field in fields(Timing)]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a group listens, which life of it that is, and the secret that lets gateways in."""

    address: str
    incarnation: str
    token: str = field(repr=False)
    kv_address: str = ""
    """Where its blocks are served to other groups; empty: nowhere."""
    kv_secret: str = field(default="", repr=False)
    """What lets other groups in there."""


def check_size(message: Message, what: str) -> None:
    """ClientError when `message` is too large for the other end: to send it would break the stream, with all its requests."""
    if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
        limit = f"{MAX_MESSAGE_BYTES / 2**20:.0f} MiB"
        raise ClientError(f"{what} takes {size / 2**20:.0f} MiB between gateway and group; at most {limit}", param=what)


def encode_request(request: Request, number: int) -> pb.Submit:
    """`request` under its `number` on the stream."""
    message = pb.Submit(
        number=number,
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=_encode_fields(pb.Sampling(), request.sampling),
        priority=request.priority,
        cache_salt=request.cache_salt,
        trace_context=dict(request.trace_context),
        resume_token_ids=request.resume_token_ids,
        token_type_ids=request.token_type_ids,
        peers=[_encode_fields(pb.Peer(), peer) for peer in request.peers],
    )
    if request.pooling is not None:
        message.pooling.CopyFrom(_encode_fields(pb.Pooling(), request.pooling))
    return _set(message, deadline_s=request.deadline_s, adapter=request.adapter)


def decode_request(message: pb.Submit, request_id: str) -> Request:
    """The request, under the name the engine knows it by. Raises ClientError as SamplingParams does."""
    sampling = _decode_fields(message.sampling, SamplingParams)
    for name, kind in NESTED.items():
        if message.sampling.HasField(name):
            sampling[name] = kind(**_decode_fields(getattr(message.sampling, name), kind))
    pooling = _decode_fields(message.pooling, PoolingParams)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(message.prompt_token_ids),
        sampling=SamplingParams(**sampling),
        priority=message.priority,
        cache_salt=message.cache_salt,
        deadline_s=_decode_field(message, "deadline_s"),
        adapter=_decode_field(message, "adapter"),
        trace_context=dict(message.trace_context),
        pooling=PoolingParams(**pooling) if message.HasField("pooling") else None,
        token_type_ids=tuple(message.token_type_ids),
        resume_token_ids=tuple(message.resume_token_ids),
        peers=tuple(Peer(**_decode_fields(peer, Peer)) for peer in message.peers),
    )


def add_event(step: pb.Step, number: int, event: Event) -> None:
    """Append `event` of request `number` to `step`."""
    if isinstance(event, Token):
        if event.prompt_logprobs is None:
            columns = step if event.logprobs is None else step.scored
            for token in event.token_ids:
                columns.numbers.append(number)
                columns.indexes.append(event.index)
                columns.token_ids.append(token)
            for score in event.logprobs or ():
                _add_score(step.scored, score)
        else:
            step.events.append(pb.Event(number=number, token=_encode_token(event)))
    elif isinstance(event, Finished):
        step.events.append(pb.Event(number=number, finished=_encode_finished(event)))
    elif isinstance(event, Pooled):
        step.events.append(pb.Event(number=number, pooled=_encode_pooled(event)))
    else:
        step.events.append(
            pb.Event(number=number, failed=pb.Failed(code=event.code, message=event.message, param=event.param))
        )


def step_events(step: pb.Step, known: Callable[[int], N | None]) -> Iterator[tuple[int, N, Event]]:
    """(number, request, event) of the requests that are still `known` by their numbers; each one's events keep their order."""
    yield from _tokens(step, None, known)
    if step.HasField("scored"):
        yield from _tokens(step.scored, _scores(step.scored), known)
    for message in step.events:
        if (request := known(message.number)) is not None:
            yield message.number, request, _decode_event(message, request.request_id)


def _tokens(
    columns: pb.Step | pb.Scored, scores: list[TokenLogprob] | None, known: Callable[[int], N | None]
) -> Iterator[tuple[int, N, Token]]:
    """As step_events; one event for rows of one continuation behind each other."""
    numbers, indexes, ids = columns.numbers[:], columns.indexes[:], tuple(columns.token_ids[:])  # at once
    start, rows = 0, len(numbers)
    if not rows == len(indexes) == len(ids) == (rows if scores is None else len(scores)):
        raise ValueError(f"a step with {rows}, {len(indexes)} and {len(ids)} rows in its columns")
    while start < rows:
        number, index, end = numbers[start], indexes[start], start + 1
        while end < rows and numbers[end] == number and indexes[end] == index:
            end += 1
        if (request := known(number)) is not None:
            yield number, request, Token(request.request_id, index, ids[start:end], scores and scores[start:end])
        start = end


def encode_error(error: KvasirError) -> pb.Error:
    """An error that was raised on submission."""
    message = pb.Error(code=error.code, message=error.message)
    return _set(message, param=error.param, retry_after_s=error.retry_after_s)


def decode_error(message: pb.Error) -> KvasirError:
    """The same class of error, to be raised again."""
    kind = ERRORS.get(message.code, ServerError)
    return kind(
        message.message,
        param=_decode_field(message, "param"),
        retry_after_s=_decode_field(message, "retry_after_s"),
    )


def encode_info(info: ModelInfo) -> pb.ModelInfo:
    """What the engine says about itself."""
    return _encode_fields(pb.ModelInfo(), info)


def decode_info(message: pb.ModelInfo) -> ModelInfo:
    """The same on the gateway's side."""
    return ModelInfo(**_decode_fields(message, ModelInfo))


def decode_role(role: str) -> Role:
    """A group's role; one that this version doesn't know is as good as both."""
    return cast(Role, role) if role in get_args(Role) else "both"


def encode_stats(stats: Stats) -> pb.Stats:
    """The scheduler's figures."""
    return _encode_fields(pb.Stats(), stats)


def decode_stats(message: pb.Stats) -> Stats:
    """The same on the gateway's side."""
    return Stats(**_decode_fields(message, Stats))


def _encode_fields(message: M, source: object) -> M:
    """Copy the attributes that `message` has fields for."""
    for name in message.DESCRIPTOR.fields_by_name:
        value = getattr(source, name)
        if value is None:
            continue
        if isinstance(value, (int, float, str, bytes)):  # most of them
            setattr(message, name, value)
        elif isinstance(value, dict):
            getattr(message, name).update(value)
        elif name in NESTED:
            _encode_fields(getattr(message, name), value)
        else:
            getattr(message, name).extend(value)
    return message


def _decode_fields(message: Any, kind: type) -> dict[str, Any]:
    """What `kind`, a dataclass with fields of the same names, is made from."""
    return {field.name: _decode_field(message, field.name) for field in fields(kind)}


def _decode_field(message: Any, name: str) -> Any:
    """A field's value; None for an absent optional one, and for a message."""
    kind = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if kind.message_type is not None:
        return dict(value) if kind.is_repeated else None
    if kind.is_repeated:
        return tuple(value)
    return None if kind.has_presence and not message.HasField(name) else value


def _set(message: M, **values: Any) -> M:
    """Set the fields that aren't None."""
    for name, value in values.items():
        if value is not None:
            setattr(message, name, value)
    return message


def _add_score(columns: pb.Scored, score: TokenLogprob) -> None:
    columns.logprobs.append(score.logprob)
    columns.ranks.append(score.rank)
    columns.tops.append(len(score.top))
    for token, logprob in score.top:
        columns.top_token_ids.append(token)
        columns.top_logprobs.append(logprob)


def _scores(columns: pb.Scored) -> list[TokenLogprob]:
    tops, top = columns.tops[:], tuple(zip(columns.top_token_ids[:], columns.top_logprobs[:], strict=True))
    if sum(tops) != len(top):
        raise ValueError(f"a step with {len(top)} of the most likely tokens where there should be {sum(tops)}")
    found, start = [], 0
    for logprob, rank, count in zip(columns.logprobs[:], columns.ranks[:], tops, strict=True):
        found.append(TokenLogprob(logprob, rank, top[start : start + count]))
        start += count
    return found


def _encode_token(event: Token) -> pb.Token:
    return pb.Token(
        index=event.index,
        token_ids=event.token_ids,
        logprobs=[_encode_logprob(item) for item in event.logprobs or ()],
        prompt_logprobs=[_encode_logprob(item) for item in event.prompt_logprobs or ()],
    )


def _encode_logprob(item: TokenLogprob | None) -> pb.TokenLogprob:
    if item is None:
        return pb.TokenLogprob()
    tokens, logprobs = zip(*item.top, strict=True) if item.top else ((), ())
    return pb.TokenLogprob(logprob=item.logprob, rank=item.rank, top_token_ids=tokens, top_logprobs=logprobs)


def _encode_finished(event: Finished) -> pb.Finished:
    message = pb.Finished(
        index=event.index,
        reason=event.reason,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        output_tokens=event.output_tokens,
        preemptions=event.preemptions,
        drafted=event.drafted,
        accepted=event.accepted,
        **{name: getattr(event.timing, name) for name in _TIMES},
    )
    return _set(message, stop_token_id=event.stop_token_id)


def _encode_pooled(event: Pooled) -> pb.Pooled:
    return pb.Pooled(
        values=event.values,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        **{name: getattr(event.timing, name) for name in _TIMES},
    )


def _decode_pooled(message: pb.Pooled, request_id: str) -> Pooled:
    timing = Timing(**{name: getattr(message, name) for name in _TIMES})
    return Pooled(request_id, tuple(message.values), message.prompt_tokens, message.cached_tokens, timing)


def _decode_event(message: pb.Event, request_id: str) -> Event:
    kind = message.WhichOneof("event")
    if kind == "token":
        return _decode_token(message.token, request_id)
    if kind == "finished":
        return _decode_finished(message.finished, request_id)
    if kind == "pooled":
        return _decode_pooled(message.pooled, request_id)
    failed = message.failed
    return Failed(request_id, failed.code, failed.message, param=failed.param if failed.HasField("param") else None)


def _decode_token(message: pb.Token, request_id: str) -> Token:
    logprobs = cast("Sequence[TokenLogprob]", [_decode_logprob(item) for item in message.logprobs])
    prompt = [_decode_logprob(item) for item in message.prompt_logprobs]
    return Token(request_id, message.index, tuple(message.token_ids), logprobs or None, prompt or None)


def _decode_logprob(message: pb.TokenLogprob) -> TokenLogprob | None:
    if not message.HasField("logprob"):
        return None
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprob(message.logprob, message.rank, top)


def _decode_finished(message: pb.Finished, request_id: str) -> Finished:
    return Finished(
        request_id,
        message.index,
        cast(FinishReason, message.reason),
        stop_token_id=_decode_field(message, "stop_token_id"),
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        output_tokens=message.output_tokens,
        preemptions=message.preemptions,
        timing=Timing(**{name: getattr(message, name) for name in _TIMES}),
        drafted=message.drafted,
        accepted=message.accepted,
    )
