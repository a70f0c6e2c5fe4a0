"""Beams: the sequences of a beam search, which wait for each other and take each other's places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir.engine.beam_search import Beam, BeamSearch, Ending
from kvasir.engine.event import Event, FinishReason, Token, TokenLogprob
from kvasir.engine.request import Request
from kvasir.engine.seats import Seats
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.step import Candidate
from kvasir.engine.tables import Grown


@dataclass(slots=True)
class Job:
    """A request and those of its continuations that haven't ended."""

    request: Request
    deadline: float
    live: dict[int, Sequence] = field(default_factory=dict)
    search: BeamSearch | None = None
    """Set: the live sequences are its beams, and nothing is delivered before it ends."""
    prompt_scores: Seq[TokenLogprob | None] | None = None
    """Of a search, until it ends."""


class Beams:
    """make(job, index, order, queued): a continuation of the job. end(beam): it is over. fail(beam, why): its request is."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        seats: Seats,
        totals: MutableMapping[str, int],
        *,
        stretch_len: float,
        make: Callable[[Job, int, Order, float], Sequence],
        end: Callable[[Sequence, Event | None], list[Event]],
        fail: Callable[[Sequence, str], list[Event]],
    ) -> None:
        self._jobs, self._seats, self._totals, self._stretch_len = jobs, seats, totals, stretch_len
        self.pool, self.tables = seats.pool, seats.tables
        self._make, self._end, self._end_grammar = make, end, fail
        self.searches = 0
        """Requests that search."""

    def offered(self, beam: Sequence, offers: Seq[Candidate], why: str | None, now: float) -> list[Event]:
        """A beam knows its likeliest next tokens. When all of its search do, the next beams take their places."""
        job = self._jobs[beam.request.request_id]
        assert job.search is not None
        if why is not None and offers:
            return self._end_grammar(beam, why)
        beam.offers, beam.first_token = offers, beam.first_token or now
        job.prompt_scores, beam.prompt_scores = job.prompt_scores or beam.prompt_scores, None
        beams = [job.live[index] for index in sorted(job.live)]
        if any(each.offers is None for each in beams):
            return []
        chosen = job.search.advance([each.offers or () for each in beams])
        if chosen:
            self._follow(job, beams, chosen)
            return []
        if why is not None and not job.search.endings:
            return self._end_grammar(beam, why)
        return self.end(job, job.search.best(job.request.sampling.n), now, "stop")

    def _follow(self, job: Job, parents: list[Sequence], chosen: list[tuple[int, int]]) -> None:
        """New beams in place of the old: the last one behind a parent takes over its blocks, others share them."""
        sons = [self._make(job, i, (*parents[0].order[:2], i), parents[0].queued) for i in range(len(chosen))]
        job.live = dict(enumerate(sons))
        last = {number: i for i, (number, _) in enumerate(chosen)}
        for number in set(range(len(parents))) - last.keys():
            self._drop(parents[number])
        seated: list[tuple[Sequence, Grown]] = []
        for i, (son, (number, token)) in enumerate(zip(sons, chosen, strict=True)):
            grown = self._succeed(parents[number], son, token, heir=last[number] == i)
            if grown is None:
                self._seats.queue(son)
            else:
                seated.append((son, grown))
        for number in last:
            self._drop(parents[number])
        for son, grown in seated:
            if self._seats.free:
                self._seats.seat(son, grown)
            else:
                self.tables.release(son)
                son.computed = 0
                self._seats.queue(son)

    def _succeed(self, parent: Sequence, son: Sequence, token: int, *, heir: bool) -> Grown | None:
        """The beam of `parent` and `token`, with blocks; None: it has none, and all of it is to be computed."""
        son.tokens = [*parent.tokens, token]
        son.cached, son.preemptions, son.prompt_scores = parent.cached, parent.preemptions, None
        son.scheduled, son.first_token, son.stretched = parent.scheduled, parent.first_token, parent.stretched
        if parent.seat is None or (not son.stretched and len(son.tokens) > self._stretch_len):
            return None
        son.contents = parent.contents[: parent.computed // self.pool.block_size]
        son.computed = parent.computed
        if heir:
            return self.tables.inherit(parent, son)
        if self.pool.num_free < len(parent.blocks):
            son.computed = 0
            return None
        grown, copies = self.tables.branch(parent, son)
        self._seats.copy(copies)
        return grown

    def _drop(self, beam: Sequence) -> None:
        """Its place goes to others."""
        if beam.seat is not None:
            self._seats.leave(beam)

    def park(self, head: Sequence) -> bool:
        """Take the blocks and the seat of a beam that waits for others of its search, for `head`, which lacks them: it may be
        one of those others. Its offers are kept."""
        if not self.searches:
            return False
        for _, beam in reversed(self._seats.running):
            mine = beam.request is head.request or beam.order > head.order
            if beam.offers is not None and not beam.flying and mine:
                self._seats.preempt(beam)
                return True
        return False

    def end(self, job: Job, endings: list[Ending], now: float, reason: FinishReason) -> list[Event]:
        """All is delivered at once; of continuations that don't exist only the end."""
        beams, request_id = list(job.live.values()), job.request.request_id
        first = beams[0]
        for beam in beams:
            self._end(beam, None)
        scores, events = job.prompt_scores, []  # type: Seq[TokenLogprob | None] | None, list[Event]
        for index in range(job.request.sampling.n):
            found = endings[index] if index < len(endings) else Ending(Beam(), 0.0, reason)
            tokens = found.beam.token_ids
            self._totals["generation_tokens"] += len(tokens)
            if tokens or scores:
                events.append(Token(request_id, index, tokens, found.beam.logprobs or None, scores))
            scores = None
            first.index, first.tokens = index, [*first.tokens[: first.prompt_len], *tokens]
            events.append(first.finished(found.reason, now, found.stop_token_id))
        return events
