"""Scheduler: which tokens of which sequences the next step computes.

There are no phases: a sequence has tokens and how many of them are computed, and every step lets it catch up within the
token budget. Prefill, chunks, decode, prefix hits and recomputation after a preemption are that one rule.

A step is planned while the one before it is executed: what it computes of a sequence may follow a token that isn't known
yet, since the ranks append what they sample themselves. When the result says that the sequence is over, that is thrown away.

Order within a step: sequences that lack one token (they stream) first, then what is left of the budget is shared evenly
among those that lack more, so that neither a long prompt stalls streams nor a short prompt waits behind a long one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Seq

from kvasir.engine.admission import Limits, check, seed_of
from kvasir.engine.beam_search import BeamSearch
from kvasir.engine.beams import Beams, Job
from kvasir.engine.blocks import BlockPool
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.lends import Lends
from kvasir.engine.loads import Loads, TierIndex
from kvasir.engine.planning import Planning
from kvasir.engine.pulls import Pulls
from kvasir.engine.request import Request
from kvasir.engine.seats import Seats, remove
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.stats import Stats as Stats
from kvasir.engine.step import Result, Step
from kvasir.engine.tables import Tables, all_blocks

ONE_GROUP = Layout((LayerGroup((0,)),), 1)


class Scheduler:
    """Owns the block pool and the seats. Not thread-safe: one loop calls it.

    whole_prompts: a prompt is computed in one step or not at all (encoders). pool_last: a vector needs the last token's
    row alone, so prompts that are pooled may begin in the prefix cache. stretch_len: sequences longer than this turn by
    other angles from their first token on (`Rope.original_len`). depth: so many steps are executed at once (pipeline
    stages), and one more may be planned; streams are dealt out among them, since a step isn't begun before the result of
    the `depth`-th before it is known. tiers: what lies below the cache, in each of `ranks` ranks.
    """

    def __init__(
        self,
        *,
        block_pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Seq[int] = (),
        default_seed: int = 0,
        salt: bytes = b"",
        layout: Layout = ONE_GROUP,
        whole_prompts: bool = False,
        pool_last: bool = False,
        stretch_len: int | None = None,
        depth: int = 1,
        tiers: TierIndex | None = None,
        ranks: int = 1,
    ) -> None:
        self.pool, self.budget = block_pool, max_num_batched_tokens
        self.tables = Tables(block_pool, layout, self.budget, salt)
        self._loads = Loads(self.tables, tiers, ranks)
        self.lends = Lends(self.tables, lambda content: tiers is not None and tiers.knows(content))
        longest = self.tables.room.longest(block_pool.num_blocks, max_model_len)
        self._limits = Limits(max_model_len, longest, self.budget if whole_prompts else None, self.pool.block_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._default_seed = default_seed
        self._stretch_len = math.inf if stretch_len is None else stretch_len
        self._jobs: dict[str, Job] = {}
        self._seats = Seats(block_pool, self.tables, self._loads, self.lends, max_num_seqs)
        self._deadlines: list[tuple[float, str]] = []
        self._depth = depth
        self._in_flight: dict[int, list[tuple[Sequence, bool]]] = {}
        """step -> what it computes, in the order of its slices, and whether that follows an unknown token"""
        self._arrivals = 0
        self._totals = dict.fromkeys(
            (
                "prefix_queries",
                "prefix_hits",
                "prompt_tokens",
                "generation_tokens",
                "step_tokens",
                "ended",
            ),
            0,
        )
        self._planning = Planning(
            self._seats,
            self._loads,
            self._totals,
            lambda head: self._beams.park(head),
            budget=self.budget,
            depth=depth,
            whole_prompts=whole_prompts,
            pool_last=pool_last,
            stretch_len=self._stretch_len,
        )
        self._beams = Beams(
            self._jobs,
            self._seats,
            self._totals,
            stretch_len=self._stretch_len,
            make=self._sequence,
            end=self._end,
            fail=self._end_grammar,
        )

    # -- what clients ask

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises `ClientError` when it can never run."""
        self.check(request)
        if request.request_id in self._jobs:
            raise ClientError(f"request id {request.request_id!r} is in use", param="request_id")
        deadline = math.inf if request.deadline_s is None else now + request.deadline_s
        job = self._jobs[request.request_id] = Job(request, deadline)
        self._arrivals += 1
        first = self._sequence(job, 0, (request.priority, self._arrivals, 0), now)
        first.tokens += request.resume_token_ids
        if request.sampling.use_beam_search:
            job.search = BeamSearch(request.sampling, first.stop_token_ids, first.max_len - first.prompt_len)
            self._beams.searches += 1
        else:
            first.forks = list(range(1, request.sampling.continuations))
        first.expected = self.tables.match(first, self._planning.cacheable(first))[0] * self.pool.block_size
        self._seats.queue(first)
        if request.deadline_s is not None:
            self._note_deadline(deadline, request.request_id)
        self._totals["prompt_tokens"] += first.prompt_len

    def abort(
        self, request_id: str, index: int | None = None, reason: FinishReason = "abort", now: float = 0.0
    ) -> list[Event]:
        """End one continuation, or all that are left. Unknown ones are no error: they may just have ended."""
        job = self._jobs.get(request_id)
        if job is None or (job.search is not None and index is not None):  # one beam alone is nobody's to end
            return []
        if job.search is not None:
            return self._beams.end(job, [], now, reason)
        events: list[Event] = []
        for sequence in list(job.live.values()):
            branches = [i for i in sequence.forks if index in (None, i)]
            sequence.forks = [i for i in sequence.forks if i not in branches]
            events += [self._unborn(sequence, i, reason, now) for i in branches]
            if index in (None, sequence.index):
                self._branch(sequence, now)
                events += self._end(sequence, sequence.finished(reason, now))
        return events

    def expire(self, now: float) -> list[Event]:
        """Fail the requests whose deadline has passed."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request_id = heapq.heappop(self._deadlines)[1]
            job = self._jobs.get(request_id)
            if job is None or job.deadline > now:
                continue  # it has ended; its id may have been used again
            events += self.fail(request_id, "deadline_exceeded", "the request's deadline passed before it finished")
        return events

    def _note_deadline(self, deadline: float, request_id: str) -> None:
        """Remember it; those of requests that have ended are forgotten when they are the majority."""
        if len(self._deadlines) > 2 * len(self._jobs) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._jobs]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline, request_id))

    def fail(self, request_id: str, code: str, message: str) -> list[Event]:
        """End a whole request with `Failed`."""
        job = self._jobs.get(request_id)
        if job is None:
            return []
        for sequence in list(job.live.values()):
            sequence.forks = []
            self._end(sequence, None)
        return [Failed(request_id, code, message)]

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def knows(self, request_id: str) -> bool:
        """The request hasn't ended."""
        return request_id in self._jobs

    @property
    def num_waiting(self) -> int:
        """Sequences without a seat."""
        return len(self._seats.waiting) + len(self._loads.loading)

    @property
    def loading(self) -> bool:
        """Some sequence waits for blocks from a lower tier or a peer, or a peer for ours."""
        return bool(self._loads.loading) or self.lends.active

    def use_peers(self, peers: Pulls) -> None:
        """From now on blocks are fetched from other groups, too."""
        self._loads.peers = peers

    def fetched(self, ticket: int, count: int) -> None:
        """A rank has read the first `count` blocks that a step's fetch asked for; -ticket: it will have before they are needed."""
        sequence = self._loads.fetched(ticket, count)
        if sequence is not None:
            self._seats.queue(sequence)

    def stats(self) -> Stats:
        prompts = [sequence.remaining for _, sequence in self._seats.running if sequence.remaining > 1]
        prompts += [sequence.remaining - sequence.expected for _, sequence in self._seats.waiting]
        prompts += [sequence.remaining for sequence in self._loads.loading.values()]
        return Stats(
            running=len(self._seats.running),
            waiting=self.num_waiting,
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            queued_prefill_tokens=sum(prompts),
            prefills=len(prompts),
            decode_blocks=self.pool.num_used,
            free_blocks=self.pool.num_free,
            steps=self._planning.steps,
            preemptions=self._seats.preemptions,
            **self._totals,
        )

    # -- one step

    def plan(self, now: float) -> Step | None:
        """The next step, or None when there is nothing to compute yet. `computed` advances in `commit`."""
        assert len(self._in_flight) <= self._depth, "a step has to be committed first"
        if self._loads.landing:
            return None
        slices = self._planning.plan(now)
        moves = self._loads.moves(self.lends.moves())
        if not slices and not self._seats.left and moves is None:
            return None
        self._planning.steps += 1
        step = Step(self._planning.steps, *self._seats.changes(), slices, moves)
        self._in_flight[step.id], self._planning.slices = self._planning.slices, []
        return step

    def commit(self, step: Step, result: Result, now: float) -> list[Event]:
        """Take in what a step, the oldest that is executed, produced."""
        events: list[Event] = []
        sampled = 0
        wrong = self._loads.landed(step.moves, result.spoiled)
        while wrong and self.lends.give_up():
            pass
        for (sequence, ahead), slice_ in zip(self._in_flight.pop(step.id), step.slices, strict=True):
            number, sampled = sampled, sampled + slice_.sample
            sequence.flying -= slice_.count
            sequence.promised -= slice_.sample
            if wrong and not wrong.isdisjoint(all_blocks(sequence)):
                self._again(sequence)
                continue
            if not (ahead and sequence.ended):
                self._totals["step_tokens"] += slice_.count
            if sequence.ended:
                if not sequence.flying:
                    self._seats.leave(sequence)
                continue
            if sequence.prompt_scores is not None:
                unscored = min(slice_.start + slice_.count, sequence.prompt_len - 1) - slice_.start
                scored = result.prompt_logprobs.get(slice_.seat, ()) if slice_.prompt_logprobs else [None] * unscored
                sequence.prompt_scores += scored
            before, sequence.computed = sequence.computed, sequence.computed + slice_.count
            self.tables.advance(sequence, before)
            if slice_.pool and not sequence.remaining:
                events += self._end(sequence, _pooled(sequence, result.pooled[slice_.seat], now))
            if slice_.sample and number in result.offers:
                events += self._beams.offered(sequence, result.offers[number], result.ended.get(number), now)
            elif slice_.sample:
                score = result.logprobs[number] if result.logprobs else None
                if why := result.ended.get(number, ""):  # the token, which may be an end, wasn't chosen or doesn't fit
                    events += self._end_grammar(sequence, why)
                else:
                    events += self._append(sequence, result.token_ids[number], score, now, over=why is None)
        for _, sequence in [*self._seats.running] if wrong else ():
            if not wrong.isdisjoint(all_blocks(sequence)):
                self._again(sequence)
        return events

    def _again(self, sequence: Sequence) -> None:
        """It was computed on blocks that weren't there."""
        sequence.computed = 0
        if sequence.ended:
            self._seats.leave(sequence)
        else:
            self._seats.again(sequence)

    # -- the life of a sequence

    def check(self, request: Request) -> None:
        """Raise `ClientError` when the request can never run. Reads nothing that changes: any thread may call it."""
        check(request, self._limits)

    def _sequence(self, job: Job, index: int, order: Order, now: float) -> Sequence:
        request, sampling = job.request, job.request.sampling
        prompt = len(request.prompt_token_ids)
        stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_token_ids)
        if sampling.use_beam_search and sampling.structured_outputs is not None:
            stops |= self.eos_token_ids  # how a beam says that its grammar is over
        sequence = job.live[index] = Sequence(
            request=request,
            index=index,
            order=order,
            seed=(seed_of(request, self._default_seed) + index) % 2**64,
            stop_token_ids=stops,
            max_len=self._limits.longest if sampling.max_tokens is None else prompt + sampling.max_tokens,
            tokens=list(request.prompt_token_ids),
            prompt_len=prompt,
            queued=now,
        )
        if sampling.prompt_logprobs is not None and index == 0:
            sequence.prompt_scores = [None]
        return sequence

    def _append(
        self, sequence: Sequence, token: int, score: TokenLogprob | None, now: float, *, over: bool
    ) -> list[Event]:
        """over: its grammar allows nothing more."""
        sequence.tokens.append(token)
        sequence.first_token = sequence.first_token or now
        self._totals["generation_tokens"] += 1
        scores = None if score is None else (score,)
        prompt_scores, sequence.prompt_scores = sequence.prompt_scores, None
        event = Token(sequence.request.request_id, sequence.index, (token,), scores, prompt_scores)
        if sequence.forks:
            self._branch(sequence, now)
        ending = sequence.ending()
        if over and (ending is None or ending[0] == "length"):  # nothing is cut off
            ending = "stop", None
        if ending is None:
            if not sequence.stretched and len(sequence.tokens) > self._stretch_len:
                self._seats.again(sequence)
            return [event]
        return [event, *self._end(sequence, sequence.finished(ending[0], now, ending[1]))]

    def _end_grammar(self, sequence: Sequence, why: str) -> list[Event]:
        """No token can be chosen."""
        message = f"the output can't go on: {' '.join(why.split())[:300]}"
        return self.fail(sequence.request.request_id, "invalid_request_error", message)

    def _branch(self, parent: Sequence, now: float) -> None:
        """Start the other continuations. While the parent's prompt is there, its full blocks are shared by reference and the
        last one, which both will write, is copied: only the last prompt token is computed again, for its logits."""
        forks, parent.forks = parent.forks, []
        job = self._jobs[parent.request.request_id]
        for index in forks:
            child = self._sequence(job, index, (parent.order[0], parent.order[1], index), parent.queued)
            child.cached = parent.cached
            room = self._seats.free and self.pool.num_free >= len(parent.blocks)
            if parent.seat is None or parent.computed < parent.prompt_len or not room:
                self._seats.queue(child)
                continue
            child.contents = parent.contents[: parent.prompt_len // self.pool.block_size]
            child.scheduled, child.stretched = now, parent.stretched
            grown, copies = self.tables.fork(parent, child)
            self._seats.copy(copies)
            child.computed = parent.prompt_len - 1
            self._seats.seat(child, grown)

    def _end(self, sequence: Sequence, event: Event | None) -> list[Event]:
        """The sequence is over. Blocks of one that is being computed are given back when that step is committed."""
        request_id = sequence.request.request_id
        sequence.ended = True
        self._totals["ended"] += 1
        live = self._jobs[request_id].live
        del live[sequence.index]
        if not live:
            self._beams.searches -= self._jobs.pop(request_id).search is not None
        if sequence.seat is None:
            if sequence.offers is None and not self._loads.cancel(sequence):
                remove(self._seats.waiting, sequence)
        elif not sequence.flying:
            self._seats.leave(sequence)
        return [] if event is None else [event]

    def _unborn(self, parent: Sequence, index: int, reason: FinishReason, now: float) -> Finished:
        """The end of a continuation that never began."""
        timing = Timing(queued=parent.queued, finished=now)
        return Finished(parent.request.request_id, index, reason, prompt_tokens=parent.prompt_len, timing=timing)


def _pooled(sequence: Sequence, values: Seq[float], now: float) -> Pooled:
    timing = Timing(sequence.queued, sequence.scheduled, now, now)
    return Pooled(sequence.request.request_id, values, sequence.prompt_len, sequence.cached, timing)
