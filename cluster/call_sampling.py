"""What a call asks of sampling, by a model's facts: its defaults, its vocabulary, what its context has room for."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from kvasir.cluster.call import Call
from kvasir.cluster.served_model import ServedModel
from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import SamplingParams

PROMPT = "prompt"
BY_MODEL = "--max-model-len"
"""What says how long a context is, unless the request does."""


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """An error about one of these fields speaks of it as the client does. (The prompt is what messages make, too.)"""
    try:
        yield
    except ClientError as error:
        if error.param is not None and (name := names.get(error.param)):
            if error.param != PROMPT:
                error.message = re.sub(rf"\b{error.param}\b", name, error.message)
            error.param = name
        raise


def sampling_of(call: Call, model: ServedModel) -> tuple[SamplingParams, bool]:
    """(client's values over the model's defaults over Kvasir's, whether the client chose max_tokens)."""
    chosen = call.sampling.get("max_tokens") is not None
    detokenize = {} if model.tokenizer else {"detokenize": False}
    given = {"max_tokens": call.max_tokens, **model.sampling_defaults, **call.sampling, **detokenize}
    return SamplingParams(**given), chosen


def check_ids(sampling: SamplingParams, info: ModelInfo) -> None:
    """Token ids that the sampling names are the model's."""
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        check_range(name, getattr(sampling, name), info)


def check_range(name: str, ids: Collection[int], info: ModelInfo) -> None:
    """ClientError unless all `ids` are in the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise ClientError(f"{name} has token id {wrong}; ids are 0 to {info.vocab_size - 1}", param=name)


def context_of(call: Call, info: ModelInfo) -> tuple[int, str]:
    """(tokens that prompt and output share, what says so)."""
    if call.context is not None and call.context < info.max_model_len:
        return call.context, "options.num_ctx"
    return info.max_model_len, BY_MODEL


def fitted(sampling: SamplingParams, prompt_tokens: int, context: tuple[int, str], chosen: bool) -> SamplingParams:
    """`sampling` with a max_tokens that the context has room for. ContextLengthError when a chosen one doesn't fit. None
    stays where the engine's own limit is meant."""
    limit, chosen_by = context
    room, wanted = limit - prompt_tokens, sampling.max_tokens
    if room < 1:
        text = f"the prompt has {prompt_tokens} tokens; prompt and output share {limit} tokens ({chosen_by})"
        raise ContextLengthError(f"{text}, so it may have {limit - 1} at most", param="prompt")
    if wanted is None and chosen_by == BY_MODEL:
        return sampling
    if wanted is not None and wanted <= room:
        return sampling
    if wanted is None or not chosen:
        return dataclasses.replace(sampling, max_tokens=room)
    text = f"the prompt has {prompt_tokens} tokens and max_tokens is {wanted}, {prompt_tokens + wanted} together"
    raise ContextLengthError(f"{text}; the context is {limit} ({chosen_by})", param="max_tokens")


def seeded(sampling: SamplingParams) -> SamplingParams:
    """`sampling` with a seed: another group must draw as the first would have."""
    return sampling if sampling.seed is not None else dataclasses.replace(sampling, seed=secrets.randbits(63))
