"""What `LLM` and `AsyncLLM` return, in the shapes that vLLM's users know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvasir.engine.event import Pooled, Timing, TokenLogprob
from kvasir.engine.request import Request
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Output, Transcript


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of a token, its rank (1 = likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    """For each token: the sampled one and the likeliest few."""
    finish_reason: str | None
    stop_reason: str | int | None
    """The stop string or stop token id that ended it; None for end-of-sequence."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its continuations so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: Timing
    """Of the first continuation."""
    num_truncated_tokens: int = 0
    """What `truncate_prompt_tokens` cut off the prompt."""


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A text as a vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """How well each label fits; in the order of the model's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well two texts fit."""

    score: float


T = TypeVar("T", EmbeddingOutput, ClassificationOutput, ScoringOutput)


@dataclass(frozen=True, slots=True)
class PoolingRequestOutput(Generic[T]):
    """A prompt and what its vector means."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int
    metrics: Timing
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


def pooling_output(request: Request, event: Pooled, outputs: T) -> PoolingRequestOutput[T]:
    """`outputs` of a request, with what is known about it."""
    ids = list(request.prompt_token_ids)
    return PoolingRequestOutput(request.request_id, outputs, ids, event.cached_tokens, event.timing)


def request_output(transcript: Transcript, prompt: str | None, tokenizer: Tokenizer | None) -> RequestOutput:
    """All that a transcript holds at this moment."""
    request = transcript.request
    scores = transcript.prompt_logprobs
    return RequestOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        prompt_logprobs=None if scores is None else _scored(request.prompt_token_ids, scores, tokenizer),
        outputs=[_completion(output, tokenizer) for output in transcript.outputs],
        finished=transcript.finished,
        num_cached_tokens=transcript.cached_tokens,
        metrics=transcript.outputs[0].timing,
        num_truncated_tokens=request.truncated_tokens,
    )


def _completion(output: Output, tokenizer: Tokenizer | None) -> CompletionOutput:
    scores = output.logprobs
    named = None if scores is None else named_logprobs(output.token_ids, scores, tokenizer)
    return CompletionOutput(
        index=output.index,
        text=output.text,
        token_ids=list(output.token_ids),
        cumulative_logprob=None if scores is None else sum(score.logprob for score in scores),
        logprobs=named,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
    )


def named_logprobs(
    ids: Sequence[int], scores: Sequence[TokenLogprob], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob]]:
    """Of each token: itself and the likeliest few."""
    return [_named(token, score, tokenizer) for token, score in zip(ids, scores, strict=True)]


def _scored(
    ids: Sequence[int], scores: Sequence[TokenLogprob | None], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob] | None]:
    pairs = zip(ids, scores, strict=True)
    return [None if score is None else _named(token, score, tokenizer) for token, score in pairs]


def _named(token: int, score: TokenLogprob, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token_id)

    likeliest = {t: Logprob(p, rank, text(t)) for rank, (t, p) in enumerate(score.top, 1)}
    return {token: Logprob(score.logprob, score.rank, text(token))} | likeliest
