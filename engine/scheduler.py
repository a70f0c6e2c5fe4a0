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
from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir.engine.admission import Limits, check, seed_of
from kvasir.engine.beam_search import Beam, BeamSearch, Ending
from kvasir.engine.blocks import BlockPool
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.lends import Lends
from kvasir.engine.loads import Loads, TierIndex
from kvasir.engine.pulls import Pulls
from kvasir.engine.request import Request
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.step import Candidate, NewSequence, Result, Slice, Step
from kvasir.engine.tables import Grown, Tables, all_blocks


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment's load, and totals since the start (tokens, unless named otherwise)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of blocks in use, 0 to 1."""
    queued_prefill_tokens: int = 0
    """Tokens that must be computed before every accepted request streams."""
    prefills: int = 0
    """Sequences that these tokens belong to: they share a step evenly."""
    decode_blocks: int = 0
    """Blocks that sequences hold."""
    free_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    """How many times."""
    ended: int = 0
    """Sequences that ended, however."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Tokens that all steps computed."""
    host_bytes: int = 0
    """In rank 0's host tier now; the others hold their share of the same blocks."""
    host_stored: int = 0
    """Blocks since the start, here and below."""
    host_loaded: int = 0
    host_evicted: int = 0
    disk_bytes: int = 0
    disk_stored: int = 0
    disk_loaded: int = 0
    disk_evicted: int = 0
    disk_failed: int = 0
    """Could not be written, or were bad when they were read."""
    peer_loaded: int = 0
    """Came from other groups to rank 0, and were good."""
    peer_served: int = 0
    """Went from rank 0 to other groups."""
    peer_failed: int = 0
    """Were asked of other groups and didn't come, or were bad."""
    peer_bytes: int = 0
    """Came from other groups, to all ranks together."""
    fetch_floor_s: float = 0.0
    """What a fetch from a peer took lately before its first byte; 0: nothing was fetched yet."""
    fetch_bytes_per_s: float = 0.0
    """How fast the rest of it came, to all ranks together; 0: nothing was fetched yet."""


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


AHEAD = 4
"""So many of those that wait for a seat have their blocks read from lower tiers meanwhile."""
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
        self._default_seed, self._whole_prompts, self._pool_last = default_seed, whole_prompts, pool_last
        self._stretch_len = math.inf if stretch_len is None else stretch_len
        self._jobs: dict[str, Job] = {}
        self._waiting: list[tuple[Order, Sequence]] = []
        self._running: list[tuple[Order, Sequence]] = []
        self._seats = list(range(max_num_seqs - 1, -1, -1))
        self._freed: list[int] = []
        self._new: list[NewSequence] = []
        self._grown: list[tuple[int, int, Seq[int]]] = []
        self._copies: list[tuple[int, int]] = []
        self._deadlines: list[tuple[float, str]] = []
        self._depth = depth
        self._in_flight: dict[int, list[tuple[Sequence, bool]]] = {}
        """step -> what it computes, in the order of its slices, and whether that follows an unknown token"""
        self._planned: list[tuple[Sequence, bool]] = []
        self._stalled: Order | None = None
        """Who lacks blocks that it gets once a result is known: nobody less important goes ahead of it in this step."""
        self._blocked: tuple[Order, int] | None = None
        self._arrivals = self._steps = self._turn = self._searches = 0
        self._totals = dict.fromkeys(
            (
                "prefix_queries",
                "prefix_hits",
                "preemptions",
                "prompt_tokens",
                "generation_tokens",
                "step_tokens",
                "ended",
            ),
            0,
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
            self._searches += 1
        else:
            first.forks = list(range(1, request.sampling.continuations))
        first.expected = self.tables.match(first, self._cacheable(first))[0] * self.pool.block_size
        insort(self._waiting, (first.order, first))
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
            return self._end_search(job, [], now, reason)
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
        return len(self._waiting) + len(self._loads.loading)

    @property
    def loading(self) -> bool:
        """Some sequence waits for blocks from a lower tier or a peer, or a peer for ours."""
        return bool(self._loads.loading) or self.lends.active

    def use_peers(self, peers: Pulls) -> None:
        """From now on blocks are fetched from other groups, too."""
        self._loads.peers = peers

    def fetched(self, ticket: int, count: int) -> None:
        """A rank has read the first `count` blocks that a step's fetch asked for."""
        sequence = self._loads.fetched(ticket, count)
        if sequence is not None:
            insort(self._waiting, (sequence.order, sequence))

    def stats(self) -> Stats:
        prompts = [sequence.remaining for _, sequence in self._running if sequence.remaining > 1]
        prompts += [sequence.remaining - sequence.expected for _, sequence in self._waiting]
        prompts += [sequence.remaining for sequence in self._loads.loading.values()]
        return Stats(
            running=len(self._running),
            waiting=self.num_waiting,
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            queued_prefill_tokens=sum(prompts),
            prefills=len(prompts),
            decode_blocks=self.pool.num_used,
            free_blocks=self.pool.num_free,
            steps=self._steps,
            **self._totals,
        )

    # -- one step

    def plan(self, now: float) -> Step | None:
        """The next step, or None when there is nothing to compute yet. `computed` advances in `commit`."""
        assert len(self._in_flight) <= self._depth, "a step has to be committed first"
        self._stalled = None
        self._look_below(now)
        prompts = sum(sequence.behind > 1 for _, sequence in self._running)
        slices = self._plan_streams(prompts > 0)
        left = self.budget - len(slices)
        admitted = self._admit(left - prompts, now) if self._stalled is None else set()
        behind = [s for _, s in self._running if s.behind > 1 or id(s) in admitted]
        slices += self._plan_prompts(behind, left)
        moves = self._loads.moves(self.lends.moves())
        if not slices and not self._freed and moves is None:
            return None
        self._steps += 1
        step = Step(self._steps, self._freed, self._new, self._grown, self._copies, slices, moves)
        self._in_flight[step.id], self._planned = self._planned, []
        self._freed, self._new, self._grown, self._copies = [], [], [], []
        return step

    def commit(self, step: Step, result: Result, now: float) -> list[Event]:
        """Take in what a step, the oldest that is executed, produced."""
        events: list[Event] = []
        sampled = 0
        for (sequence, ahead), slice_ in zip(self._in_flight.pop(step.id), step.slices, strict=True):
            number, sampled = sampled, sampled + slice_.sample
            sequence.flying -= slice_.count
            sequence.promised -= slice_.sample
            if not (ahead and sequence.ended):
                self._totals["step_tokens"] += slice_.count
            if sequence.ended:
                if not sequence.flying:
                    self._leave(sequence)
                continue
            if slice_.prompt_logprobs and sequence.prompt_scores is not None:
                sequence.prompt_scores += result.prompt_logprobs.get(slice_.seat, ())
            before, sequence.computed = sequence.computed, sequence.computed + slice_.count
            self.tables.advance(sequence, before)
            if slice_.pool and not sequence.remaining:
                events += self._end(sequence, _pooled(sequence, result.pooled[slice_.seat], now))
            if slice_.sample and number in result.offers:
                events += self._offered(sequence, result.offers[number], result.ended.get(number), now)
            elif slice_.sample:
                score = result.logprobs[number] if result.logprobs else None
                events += self._append(sequence, result.token_ids[number], score, now)
                if number in result.ended and not sequence.ended:
                    events += self._end_grammar(sequence, result.ended[number], now)
        return events

    def _plan_streams(self, prompts: bool) -> list[Slice]:
        """One token for every sequence that lacks one; when there are more than fit, they take turns."""
        streams = [sequence for _, sequence in self._running if sequence.behind == 1]
        room = self.budget if self._depth == 1 else min(self.budget, -(-len(streams) // self._depth))
        streams = [sequence for sequence in streams if not sequence.promised or self._ready(sequence)]
        if prompts or (self._waiting and self._seats):
            room = min(
                room, self.budget - max(1, self.budget // 4)
            )  # prompts make progress however many streams there are
        room = max(room, 1)
        if len(streams) > room:
            self._turn = (self._turn + room) % len(streams)
            streams = (streams[self._turn :] + streams[: self._turn])[:room]
            streams.sort(key=lambda sequence: sequence.order)
        # most important first, so that nobody loses blocks to a less important one
        ready = [sequence for sequence in streams if self._grow(sequence, sequence.planned + 1)]
        return [self._slice(sequence, 1) for sequence in ready]

    def _ready(self, sequence: Sequence) -> bool:
        """The token that it lacks is still being sampled, but will be known where it is needed, and won't be its last."""
        length = len(sequence.tokens) + sequence.promised
        known = self._steps + 1 - sequence.step >= self._depth
        same = sequence.stretched or length <= self._stretch_len
        return known and same and not sequence.waits and length < sequence.max_len

    def _plan_prompts(self, prompts: list[Sequence], left: int) -> list[Slice]:
        """Even shares of `left` tokens; what one sequence doesn't need, the others get."""
        shares: list[tuple[Order, int, Sequence]] = []
        for number, sequence in enumerate(sorted(prompts, key=lambda s: (s.behind, s.order))):
            share = min(sequence.behind, -(-left // (len(prompts) - number)))
            if self._whole_prompts:
                share = sequence.behind if sequence.behind <= left else 0
            if share > 0:
                shares.append((sequence.order, share, sequence))
                left -= share
        shares.sort(key=lambda entry: entry[0])
        ready = [(share, sequence) for _, share, sequence in shares if self._grow(sequence, sequence.planned + share)]
        return [self._slice(sequence, share) for share, sequence in ready]

    def _slice(self, sequence: Sequence, count: int) -> Slice:
        assert sequence.seat is not None
        start = sequence.planned
        scores = sequence.prompt_scores is not None and start < sequence.prompt_len - 1
        pool = sequence.request.pooling is not None
        sample = count == sequence.behind and not pool
        planned = Slice(sequence.seat, start, count, sample, scores, pool, sequence.replays(count))
        self._planned.append((sequence, start + count > len(sequence.tokens)))
        sequence.flying, sequence.promised = sequence.flying + count, sequence.promised + sample
        sequence.step = self._steps + 1
        return planned

    def _admit(self, room: int, now: float) -> set[int]:
        """Seat waiting sequences, strictly in order: one that lacks blocks isn't overtaken, or it might wait for ever."""
        admitted: set[int] = set()
        while self._waiting and len(admitted) < room:
            sequence = self._waiting[0][1]
            if not self._seats or self._still_blocked(sequence):
                if self._park(sequence):
                    continue
                break
            most = self._cacheable(sequence)
            if self._loads.seek(sequence, most, now):
                del self._waiting[0]
                continue
            found = self._fitting(sequence, most)
            if found is None and self.lends.give_up():
                continue
            if found is None:
                self._blocked = (sequence.order, self.pool.num_free)
                if self._park(sequence):
                    continue
                break
            if self._loads.land(sequence):
                continue  # more of it is cached now
            matched, tables = found
            del self._waiting[0]
            sequence.computed = matched * self.pool.block_size
            if not sequence.scheduled:
                sequence.scheduled = now
            # what its own prompt left behind is no hit, nor what a beam's parent did
            if not (sequence.preemptions or sequence.index or sequence.first_token):
                sequence.cached = min(sequence.computed, sequence.prompt_len)
                self._totals["prefix_queries"] += len(sequence.tokens)
                self._totals["prefix_hits"] += sequence.computed
            self._seat(sequence, self.tables.begin(sequence, tables))
            admitted.add(id(sequence))
        return admitted

    def _fitting(self, sequence: Sequence, most: int) -> tuple[int, list[list[int]]] | None:
        """(blocks, tables) of its longest cached prefix, up to `most` blocks; None: what it needs besides isn't free."""
        spare = sum(self.tables.due(other) for _, other in self._running)
        for limit in (most,) if self._running else (most, 0):  # a window's blocks come on top of what it needs alone
            matched, tables = self.tables.match(sequence, limit)
            need = self.tables.need(sequence, matched)
            if need + spare <= self.pool.num_free - sum(self.pool.count_free(table) for table in tables):
                return matched, tables
        return None

    def _still_blocked(self, sequence: Sequence) -> bool:
        """It lacked blocks, and none was given back since: its prompt needn't be looked up again at every step."""
        order, free = self._blocked or (None, 0)
        if order != sequence.order or self.pool.num_free > free:
            return False
        self._blocked = (sequence.order, self.pool.num_free)
        return True

    def _look_below(self, now: float) -> None:
        """Read what the next to be seated lack in the cache; who has waited too long for that gets its turn without."""
        for sequence in self._loads.overdue(now):
            insort(self._waiting, (sequence.order, sequence))
        for entry in self._waiting[:AHEAD]:
            sequence = entry[1]
            if sequence.sought == -2 and self._loads.seek(sequence, self._cacheable(sequence), now):
                self._waiting.remove(entry)

    def _cacheable(self, sequence: Sequence) -> int:
        """Blocks of it that may come from the cache; at least one token is left to compute, since its row is needed."""
        stretched = len(sequence.tokens) > self._stretch_len
        if stretched != sequence.stretched:
            sequence.stretched, sequence.contents = stretched, []
        whole = sequence.prompt_scores is not None or (sequence.request.pooling is not None and not self._pool_last)
        return 0 if whole or not self.pool.prefix_caching else sequence.skippable // self.pool.block_size

    # -- seats and blocks

    def _seat(self, sequence: Sequence, grown: Grown) -> None:
        """The ranks learn of the sequence with the next step."""
        seat = sequence.seat = self._seats.pop()
        request = sequence.request
        stops = tuple(sequence.stop_token_ids)
        self._new.append(
            NewSequence(
                seat,
                list(sequence.tokens),
                sequence.prompt_len,
                request.sampling,
                sequence.seed,
                stops,
                request.adapter,
                request.pooling,
                request.token_type_ids,
                sequence.stretched,
            )
        )
        self._grown += ((seat, group, blocks) for group, blocks in grown)
        insort(self._running, (sequence.order, sequence))

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Slots for its first `tokens` tokens; when free blocks are too few, the least important sequence that this step
        doesn't compute gives up its own, at last this one itself. False: it has none, or has to wait for a result."""
        if sequence.seat is None or (self._stalled is not None and self._stalled < sequence.order):
            return False
        lacking = self.tables.lacking(sequence, tokens)
        while lacking > self.pool.num_free:
            if self.lends.give_up():
                continue
            victim = next(other for _, other in reversed(self._running) if other.step <= self._steps)
            if victim.flying:
                self._stalled = sequence.order
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if lacking:
            self._grown += ((sequence.seat, group, blocks) for group, blocks in self.tables.grow(sequence, tokens))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with its output: it will be recomputed, or found in the cache."""
        self._again(sequence)
        sequence.preemptions += 1
        self._totals["preemptions"] += 1

    def _again(self, sequence: Sequence) -> None:
        """Back to waiting: all of it is to be computed once more."""
        self._leave(sequence)
        sequence.computed, sequence.expected, sequence.sought = 0, 0, -2
        if sequence.prompt_scores is not None:
            sequence.prompt_scores = [None]
        if sequence.offers is None:
            insort(self._waiting, (sequence.order, sequence))

    def _leave(self, sequence: Sequence) -> None:
        """Give back seat and blocks, and withdraw what the ranks haven't been told yet."""
        seat = sequence.seat
        assert seat is not None
        assert not sequence.flying, "it is being computed"
        if sequence.ended:
            self._loads.note_use(sequence)
        known = len(self._new)
        self._new = [new for new in self._new if new.seat != seat]
        if len(self._new) == known:
            self._freed.append(seat)
        self._grown = [grown for grown in self._grown if grown[0] != seat]
        if self._copies:
            own = all_blocks(sequence)
            self._copies = [pair for pair in self._copies if pair[1] not in own]
        self._seats.append(seat)
        sequence.seat = None
        self.tables.release(sequence)
        _remove(self._running, sequence)

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

    def _append(self, sequence: Sequence, token: int, score: TokenLogprob | None, now: float) -> list[Event]:
        sequence.tokens.append(token)
        sequence.first_token = sequence.first_token or now
        self._totals["generation_tokens"] += 1
        scores = None if score is None else (score,)
        prompt_scores, sequence.prompt_scores = sequence.prompt_scores, None
        event = Token(sequence.request.request_id, sequence.index, (token,), scores, prompt_scores)
        if sequence.forks:
            self._branch(sequence, now)
        ending = sequence.ending()
        if ending is None:
            if not sequence.stretched and len(sequence.tokens) > self._stretch_len:
                self._again(sequence)
            return [event]
        return [event, *self._end(sequence, sequence.finished(ending[0], now, ending[1]))]

    def _end_grammar(self, sequence: Sequence, why: str | None, now: float) -> list[Event]:
        """Its grammar allows nothing more, or (with a reason) no token can be chosen."""
        if why is None:
            return self._end(sequence, sequence.finished("stop", now))
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
            room = self._seats and self.pool.num_free >= len(parent.blocks)
            if parent.seat is None or parent.computed < parent.prompt_len or not room:
                insort(self._waiting, (child.order, child))
                continue
            child.contents = parent.contents[: parent.prompt_len // self.pool.block_size]
            child.scheduled, child.stretched = now, parent.stretched
            grown, copies = self.tables.fork(parent, child)
            self._copies += copies
            child.computed = parent.prompt_len - 1
            self._seat(child, grown)

    # -- beams

    def _offered(self, beam: Sequence, offers: Seq[Candidate], why: str | None, now: float) -> list[Event]:
        """A beam knows its likeliest next tokens. When all of its search do, the next beams take their places."""
        job = self._jobs[beam.request.request_id]
        assert job.search is not None
        if why is not None and offers:
            return self._end_grammar(beam, why, now)
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
            return self._end_grammar(beam, why, now)
        return self._end_search(job, job.search.best(job.request.sampling.n), now, "stop")

    def _follow(self, job: Job, parents: list[Sequence], chosen: list[tuple[int, int]]) -> None:
        """New beams in place of the old: the last one behind a parent takes over its blocks, others share them."""
        sons = [self._sequence(job, i, (*parents[0].order[:2], i), parents[0].queued) for i in range(len(chosen))]
        job.live = dict(enumerate(sons))
        last = {number: i for i, (number, _) in enumerate(chosen)}
        for number in set(range(len(parents))) - last.keys():
            self._drop(parents[number])
        seated: list[tuple[Sequence, Grown]] = []
        for i, (son, (number, token)) in enumerate(zip(sons, chosen, strict=True)):
            grown = self._succeed(parents[number], son, token, heir=last[number] == i)
            if grown is None:
                insort(self._waiting, (son.order, son))
            else:
                seated.append((son, grown))
        for number in last:
            self._drop(parents[number])
        for son, grown in seated:
            if self._seats:
                self._seat(son, grown)
            else:
                self.tables.release(son)
                son.computed = 0
                insort(self._waiting, (son.order, son))

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
        self._copies += copies
        return grown

    def _drop(self, beam: Sequence) -> None:
        """Its place goes to others."""
        if beam.seat is not None:
            self._leave(beam)

    def _park(self, head: Sequence) -> bool:
        """Take the blocks and the seat of a beam that waits for others of its search, for `head`, which lacks them: it may be
        one of those others. Its offers are kept."""
        if not self._searches:
            return False
        for _, beam in reversed(self._running):
            mine = beam.request is head.request or beam.order > head.order
            if beam.offers is not None and not beam.flying and mine:
                self._preempt(beam)
                return True
        return False

    def _end_search(self, job: Job, endings: list[Ending], now: float, reason: FinishReason) -> list[Event]:
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

    def _end(self, sequence: Sequence, event: Event | None) -> list[Event]:
        """The sequence is over. Blocks of one that is being computed are given back when that step is committed."""
        request_id = sequence.request.request_id
        sequence.ended = True
        self._totals["ended"] += 1
        live = self._jobs[request_id].live
        del live[sequence.index]
        if not live:
            self._searches -= self._jobs.pop(request_id).search is not None
        if sequence.seat is None:
            if sequence.offers is None and not self._loads.cancel(sequence):
                _remove(self._waiting, sequence)
        elif not sequence.flying:
            self._leave(sequence)
        return [] if event is None else [event]

    def _unborn(self, parent: Sequence, index: int, reason: FinishReason, now: float) -> Finished:
        """The end of a continuation that never began."""
        timing = Timing(queued=parent.queued, finished=now)
        return Finished(parent.request.request_id, index, reason, prompt_tokens=parent.prompt_len, timing=timing)


def _pooled(sequence: Sequence, values: Seq[float], now: float) -> Pooled:
    timing = Timing(sequence.queued, sequence.scheduled, now, now)
    return Pooled(sequence.request.request_id, values, sequence.prompt_len, sequence.cached, timing)


def _remove(entries: list[tuple[Order, Sequence]], sequence: Sequence) -> None:
    """Out of a list that is sorted by order."""
    place = bisect_left(entries, (sequence.order,))
    assert entries[place][1] is sequence
    del entries[place]
