"""Sequence: the engine's progress on one continuation of a request. Only the scheduler changes it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir.engine.blocks import ContentId
from kvasir.engine.event import Finished, FinishReason, Timing, TokenLogprob
from kvasir.engine.request import Request
from kvasir.engine.step import Candidate, replays

GONE = -1
Order = tuple[int, int, int]
"""(priority, arrival, index): who comes first. The smallest is the most important, and no two are equal."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is all there is to compute; the keys and values of the first `computed` are in `blocks`."""

    request: Request
    index: int
    order: Order
    seed: int
    stop_token_ids: frozenset[int]
    max_len: int
    """Ends when it has this many tokens."""
    tokens: list[int]
    prompt_len: int
    queued: float
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    """A table per layer group. GONE: given back, since no later row sees it."""
    near_from: list[int] = field(default_factory=list)
    """How many blocks at the head of each table are gone."""
    stretched: bool = False
    """It turns by the angles of long sequences (`Rope.original_len`)."""
    contents: list[ContentId] = field(default_factory=list)
    """Content ids of its full blocks, hashed once."""
    seat: int | None = None
    """None: waiting."""
    flying: int = 0
    """Tokens behind `computed` that steps compute whose results aren't known yet."""
    promised: int = 0
    """Tokens behind `tokens` that these steps sample."""
    step: int = 0
    """The last one that computes some of it."""
    ended: bool = False
    offers: Seq[Candidate] | None = None
    """A beam's likeliest next tokens: it waits until the others of its search have theirs. If it has to give up its blocks
    meanwhile, it doesn't queue for new ones."""
    forks: list[int] = field(default_factory=list)
    """Continuations to branch off once the prompt is computed."""
    prompt_scores: list[TokenLogprob | None] | None = None
    """Gathered until the first token is delivered; None: not asked for, or delivered."""
    expected: int = 0
    """Tokens that were cached when it began to wait."""
    ticket: int | None = None
    """Of a fetch from the lower tiers: under way, or come and waiting with it for a seat."""
    sought: int = -2
    """Most blocks of its prefix that were cached when the lower tiers were asked for more; -1: they had no more, -2: never
    looked."""
    peers_asked: int = 0
    """How many of the request's peers were considered."""
    tries: int = 0
    """How often they were asked since it got any further."""
    cached: int = 0
    preemptions: int = 0
    scheduled: float = 0.0
    first_token: float = 0.0

    @property
    def remaining(self) -> int:
        """Tokens that aren't computed yet: 1 when it decodes."""
        return len(self.tokens) - self.computed

    @property
    def planned(self) -> int:
        """Tokens that are computed, or will be by the steps that were planned."""
        return self.computed + self.flying

    @property
    def behind(self) -> int:
        """Tokens that no step computes yet, those that are still being sampled included: 1 when it decodes."""
        return 0 if self.ended else len(self.tokens) + self.promised - self.planned

    @property
    def waits(self) -> bool:
        """What follows its next token is decided, or told to others' code, when that token is known."""
        sampling = self.request.sampling
        return bool(self.forks or sampling.use_beam_search or sampling.logits_processors)

    @property
    def outputs(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def skippable(self) -> int:
        """Tokens at its head whose rows nobody needs to see."""
        return (self.prompt_len if replays(self.request.sampling) else len(self.tokens)) - 1

    def replays(self, count: int) -> bool:
        """Among its next `count` rows is one whose successor was sampled already, and must be seen again."""
        first, end = max(self.planned, self.prompt_len - 1), self.planned + count
        return first < min(end, len(self.tokens) - 1) and replays(self.request.sampling)

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Why the newest token ends it, and the stop token; None: it goes on."""
        token = self.tokens[-1]
        if token in self.stop_token_ids and self.outputs >= self.request.sampling.min_tokens:
            return "stop", token
        return ("length", None) if len(self.tokens) >= self.max_len else None

    def finished(self, reason: FinishReason, now: float, stop_token_id: int | None = None) -> Finished:
        return Finished(
            self.request.request_id,
            self.index,
            reason,
            stop_token_id,
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached,
            output_tokens=self.outputs,
            preemptions=self.preemptions,
            timing=Timing(self.queued, self.scheduled, self.first_token, now),
        )
