"""The one stream type from an engine to its clients: `Token | Finished | Pooled | Failed`. Standard library only.

Every accepted request gets, for each of its n continuations, any number of `Token`s and exactly one `Finished`; or, for
the request as a whole, one `Failed` (index -1) after which nothing follows. One that asks for pooling gets one `Pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

FinishReason = Literal["stop", "length", "abort"]
TopLogprobs = Sequence[tuple[int, float]]
"""(token id, natural log probability), most likely first."""


@dataclass(slots=True)  # not frozen, as Token
class TokenLogprob:
    """Log probability of one token under the model's raw distribution, its rank (1 = most likely) and the best few. Not to
    be changed."""

    logprob: float
    rank: int
    top: TopLogprobs = ()


@dataclass(slots=True)  # frozen it would take 1.6 us to make instead of 0.2, and one is made for each token
class Token:
    """New tokens of continuation `index`; a step usually brings one. Not to be changed."""

    request_id: str
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None = None
    """As many as `token_ids`, when asked for."""
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    """On the first `Token` of index 0 only, when asked for; the first prompt token has None."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds since the epoch (time.time); 0.0 = never happened."""

    queued: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """Continuation `index` is complete. Token counts are this continuation's own."""

    request_id: str
    index: int
    reason: FinishReason
    stop_token_id: int | None = None
    """The stop token, when one ended it: it was delivered in a `Token`, the text leaves it out."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that came out of the prefix cache."""
    output_tokens: int = 0
    preemptions: int = 0
    timing: Timing = field(default_factory=Timing)
    drafted: int = 0
    """Tokens that were proposed to the model instead of drawn from it (speculation) ..."""
    accepted: int = 0
    """... and those of them that it would have drawn."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vector of a request with `pooling`; nothing follows."""

    request_id: str
    values: Sequence[float]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    index: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The request as a whole failed; `code` is a key of `errors.ERRORS`."""

    request_id: str
    code: str
    message: str
    index: int = -1
    param: str | None = None
    """The request's field that is to blame."""


Event = Union[Token, Finished, Pooled, Failed]
