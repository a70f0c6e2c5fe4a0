"""Which requests can run at all, and the seed of one that brings none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.engine.request import Request


@dataclass(frozen=True)
class Limits:
    """What a request is measured against, in tokens."""

    context: int
    """--max-model-len"""
    longest: int
    """What the KV cache holds of one sequence, at most `context`."""
    step: int | None
    """What a step computes, for models that compute a prompt in one step."""
    block_size: int


def check(request: Request, limits: Limits) -> None:
    """Raise `ClientError` when the request can never run."""
    if not request.prompt_token_ids:
        raise ClientError("the prompt is empty; send at least one token", param="prompt")
    if request.pooling is not None:
        _check_pooled(request, limits)
        return
    _check_context(request, limits.context)
    _check_cache(request, limits)
    _check_resumed(request, limits.longest)


def seed_of(request: Request, default: int) -> int:
    """The request's own seed, or one that it would get again wherever it is resubmitted."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    text = f"{default}/{request.request_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _check_pooled(request: Request, limits: Limits) -> None:
    prompt = len(request.prompt_token_ids)
    if request.sampling.n != 1 or request.resume_token_ids:
        raise ClientError("a request for a vector has neither n nor resume_token_ids", param="pooling")
    for limit, where in (
        (limits.context, "context (--max-model-len)"),
        (limits.longest, "KV cache (--kv-cache-memory-bytes, --gpu-memory-utilization)"),
        (limits.step, "step (--max-num-batched-tokens), in which this model reads a whole prompt"),
    ):
        if limit is not None and prompt > limit:
            raise ContextLengthError(
                f"{prompt} prompt tokens exceed the {limit} tokens of a {where}; shorten the prompt", param="prompt"
            )


def _check_context(request: Request, limit: int) -> None:
    prompt, wanted = len(request.prompt_token_ids), request.sampling.max_tokens
    if prompt < limit and (wanted is None or prompt + wanted <= limit):
        return
    more = f" + max_tokens {wanted}" if wanted is not None else " and at least one more"
    raise ContextLengthError(
        f"{prompt} prompt tokens{more} exceed the context of {limit} tokens (--max-model-len);"
        " shorten the prompt or lower max_tokens",
        param="max_tokens" if wanted is not None and prompt < limit else "prompt",
    )


def _check_cache(request: Request, limits: Limits) -> None:
    tokens = len(request.prompt_token_ids) + (request.sampling.max_tokens or 1)
    if tokens > limits.longest:
        raise ContextLengthError(
            f"{tokens} tokens exceed the KV cache, which holds {limits.longest} tokens of one sequence;"
            " raise --kv-cache-memory-bytes or --gpu-memory-utilization",
            param="prompt",
        )


def _check_resumed(request: Request, longest: int) -> None:
    given, wanted = len(request.resume_token_ids), request.sampling.max_tokens
    if given and (request.sampling.continuations != 1 or request.sampling.use_beam_search):
        raise ClientError("resume_token_ids needs n = 1, and no beam search", param="resume_token_ids")
    if wanted is not None and given >= wanted:
        raise ClientError("resume_token_ids leave nothing of max_tokens to generate", param="resume_token_ids")
    if len(request.prompt_token_ids) + given >= longest:
        raise ContextLengthError(
            f"{len(request.prompt_token_ids) + given} tokens of prompt and resume_token_ids leave no room in {longest}"
            " tokens (--max-model-len, or the KV cache if that is smaller)",
            param="resume_token_ids",
        )
