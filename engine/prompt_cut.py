"""What is left of a prompt that is too long, when the request wants it cut instead of refused. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from kvasir.engine.errors import ClientError
from kvasir.engine.request import SamplingParams

WHAT_FITS = -1
"""truncate_prompt_tokens: as many as the context has room for."""
UNLIMITED_SHARE = 4
"""An output without a limit gets this part of the context, one in so many tokens, at least."""


def cut_prompt(
    token_ids: Sequence[int], sampling: SamplingParams, context: int, chosen_by: str = "--max-model-len"
) -> Sequence[int]:
    """At most `truncate_prompt_tokens` of `token_ids`: the first `num_keep` and the newest, or with truncation_side
    "right" the first ones. `context`: what prompt and output share, in tokens. ClientError when that can't be."""
    wanted, keep = sampling.truncate_prompt_tokens, sampling.num_keep
    if wanted is None:
        return token_ids
    if wanted == WHAT_FITS:
        output = context // UNLIMITED_SHARE if sampling.max_tokens is None else sampling.max_tokens
        wanted = max(1, context - output)
    if wanted > context:
        text = f"truncate_prompt_tokens must be -1 or 1 to {context} ({chosen_by}), got {wanted}"
        raise ClientError(text, param="truncate_prompt_tokens")
    if keep < 0 or len(token_ids) <= wanted:
        return token_ids
    if sampling.truncation_side == "right":
        return token_ids[:wanted]
    if keep >= wanted:
        text = f"num_keep ({keep}) leaves no room for anything else in the {wanted} tokens that a prompt is cut to"
        raise ClientError(text, param="num_keep")
    return [*token_ids[:keep], *token_ids[len(token_ids) - wanted + keep :]]
