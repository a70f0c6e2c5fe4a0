"""What every rank is told to execute once (`Step`), and what the last rank answers (`Result`). Ints and lists only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvasir.engine.blocks import ContentId
from kvasir.engine.event import TokenLogprob
from kvasir.engine.request import PoolingParams, SamplingParams

Candidate = tuple[int, float, "TokenLogprob | None"]
"""(token, its log probability with the request's biases and penalties, what is reported of it when asked for)"""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence enters the ranks' batch state (again, after a preemption). Its block table starts empty."""

    seat: int
    """Its row in the ranks' batch state, 0 to max_num_seqs - 1."""
    token_ids: Sequence[int]
    """Everything so far: prompt, and output if it was resumed or preempted."""
    prompt_len: int
    """Tokens that count as prompt (for penalties and min_tokens)."""
    sampling: SamplingParams
    seed: int
    """Draws depend on (seed, position) alone."""
    stop_token_ids: Sequence[int]
    """End-of-sequence and stop ids: masked until sampling.min_tokens outputs exist."""
    adapter: str | None = None
    pooling: PoolingParams | None = None
    token_type_ids: Sequence[int] = ()
    stretched: bool = False
    """It is longer than the model's ropes were trained for (`Rope.original_len`), so its angles are the long ones'."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of the sequence in `seat`, from position `start`, are computed in this step."""

    seat: int
    start: int
    count: int
    sample: bool
    """The last row's logits give the next token, which every rank appends to the seat's tokens."""
    prompt_logprobs: bool = False
    """Also score the prompt tokens behind these rows."""
    pool: bool = False
    """These rows count for the sequence's vector; the slice that ends its prompt yields it."""
    replay: bool = False
    """The sampler sees again what it chose behind these rows, as far as they are behind the prompt's last but one token."""


@dataclass(frozen=True, slots=True)
class Lent:
    """A portion of what another group gets."""

    lend: int
    readers: Sequence[int]
    """How many will read it, by rank."""
    way: str
    """By which it goes (`channels`)."""
    first: int
    """How many items went before."""
    places: Sequence[tuple[int, ContentId]]
    """(block, content); a block that isn't in the cache (GONE) is in a lower tier."""
    layers: tuple[int, int]
    """Places of the layers in a block that it holds, first and behind the last."""


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks that every rank fetches its part of, from another group."""

    ticket: int
    address: str
    secret: str = field(repr=False)
    fetch: str
    """Names this fetch to the other group."""
    chain: ContentId
    """What stands before the prompt's first block."""
    tokens: bytes
    """The prompt's, from its start."""
    first: int
    """Tokens that are cached already, a whole number of blocks like `end`."""
    end: int
    limit_s: float
    """What has come until then is all."""
    ahead_s: float = 0.0
    """What the first step behind it is expected to take: it may begin on the first layers. 0: only when all is there."""


@dataclass(frozen=True, slots=True)
class Moves:
    """What goes between the cache and the tiers below it (host memory, disk) or other groups, in the order of the fields."""

    saves: Sequence[tuple[int, ContentId]] = ()
    """(block, content): what the block holds is written behind."""
    loads: Sequence[tuple[int, int, int]] = ()
    """(ticket, number, block): the number-th content that this fetch brought goes into the block."""
    ended: Sequence[int] = ()
    """Tickets of fetches that nobody waits for any more."""
    fetches: Sequence[tuple[int, Sequence[ContentId]]] = ()
    """(ticket, contents): read them, up to the first that isn't there, and say how many came."""
    used: Sequence[tuple[int, Sequence[ContentId]]] = ()
    """(count, contents) of a sequence that ended, its head last; the last `count` weren't computed for it."""
    lends: Sequence[Lent] = ()
    """Copied aside for other groups, behind the loads."""
    pulls: Sequence[Pull] = ()
    """Fetch these, and say up to which block of the prompt they came."""
    landing: Sequence[int] = ()
    """Tickets among the loads' of which some rank may wait for layers while it computes the step. Of several ranks each says
    behind it what didn't come in time."""


@dataclass(frozen=True, slots=True)
class Step:
    """Differences to the last step, applied in the order of the fields, then one forward over `slices`."""

    id: int
    freed: Sequence[int] = ()
    """Seats whose sequences left."""
    new: Sequence[NewSequence] = ()
    blocks: Sequence[tuple[int, int, Sequence[int]]] = ()
    """(seat, layer group, block ids to append to the seat's table for these layers); negative ones are never read."""
    copies: Sequence[tuple[int, int]] = ()
    """(source block, target block): copy-on-write, done before the forward, and between the moves' saves and loads."""
    slices: Sequence[Slice] = ()
    moves: Moves | None = None
    record: bool = False
    """Then record a CUDA graph that is still lacking: no request waits."""


def first_blocks(lengths: Sequence[int], groups: int, block_size: int) -> list[tuple[int, int, list[int]]]:
    """`Step.blocks` of sequences that alone use a cache: so many tokens in each seat, for each group of layers."""
    found, used = [], 0
    for seat, length in enumerate(lengths):
        count = -(-length // block_size)
        for group in range(groups):
            found.append((seat, group, [*range(used, used + count)]))
            used += count
    return found


@dataclass(frozen=True, slots=True)
class Result:
    """What step `step` produced: one token for each slice with `sample`, in the order of the slices."""

    step: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob | None] = ()
    """As many as `token_ids`, or empty when no sequence asked."""
    prompt_logprobs: dict[int, Sequence[TokenLogprob]] = field(default_factory=dict)
    """seat -> scores of the prompt tokens start + 1 .. start + count (those inside the prompt)."""
    ended: dict[int, str | None] = field(default_factory=dict)
    """Number in `token_ids` -> None when that token ends its sequence's grammar, or else why the grammar can't go on."""
    pooled: dict[int, Sequence[float]] = field(default_factory=dict)
    """seat -> the vector of a sequence whose prompt ended in this step."""
    offers: dict[int, Sequence[Candidate]] = field(default_factory=dict)
    """Number in `token_ids`, where a beam stands (the token itself means nothing) -> its likeliest next tokens."""
    spoiled: Sequence[int] = ()
    """Tickets of fetches whose layers didn't all come in time: what was computed on their blocks means nothing. A rank of several
    knows its own alone, and says it apart from this."""


def replays(sampling: SamplingParams) -> bool:
    """What it draws next depends on how surprising its outputs were, not on the tokens alone."""
    return sampling.mirostat > 0 and sampling.temperature > 0 and not sampling.use_beam_search
