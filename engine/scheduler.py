"""Scheduler: which tokens of which sequences the next step computes.

There are no phases: a sequence has tokens and how many of them are computed, and every step lets it catch up within the
token budget. Prefill, chunks, decode, prefix hits and recomputation after a preemption are that one rule.

Order within a step: sequences that lack one token (they stream) first, then what is left of the budget is shared evenly
among those that lack more, so that neither a long prompt stalls streams nor a short prompt waits behind a long one.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir.engine.blocks import BlockPool, ContentId, content_id, salted
from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Timing, Token, TokenLogprob
from kvasir.engine.request import Request
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.step import NewSequence, Result, Slice, Step


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment's load, and totals since the start (tokens, unless named otherwise)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of blocks in use, 0 to 1."""
    queued_prefill_tokens: int = 0
    """Tokens that must be computed before every accepted request streams."""
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    """How many times."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Tokens that all steps computed."""


@dataclass(slots=True)
class Job:
    """A request and those of its continuations that haven't ended."""

    request: Request
    deadline: float
    live: dict[int, Sequence] = field(default_factory=dict)


class Scheduler:
    """Owns the block pool and the seats. Not thread-safe: one loop calls it."""

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
    ) -> None:
        self.pool, self.max_model_len = block_pool, max_model_len
        self.budget = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self._default_seed, self._salt = default_seed, salt
        self._jobs: dict[str, Job] = {}
        self._waiting: list[tuple[Order, Sequence]] = []
        self._running: list[tuple[Order, Sequence]] = []
        self._seats = list(range(max_num_seqs - 1, -1, -1))
        self._freed: list[int] = []
        self._new: list[NewSequence] = []
        self._grown: list[tuple[int, Seq[int]]] = []
        self._copies: list[tuple[int, int]] = []
        self._deadlines: list[tuple[float, str]] = []
        self._in_flight: list[Sequence] = []
        self._blocked: tuple[Order, int] | None = None
        self._arrivals = self._steps = self._turn = 0
        self._totals = dict.fromkeys(
            ("prefix_queries", "prefix_hits", "preemptions", "prompt_tokens", "generation_tokens", "step_tokens"), 0
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
        first.forks = list(range(1, request.sampling.n))
        insort(self._waiting, (first.order, first))
        if request.deadline_s is not None:
            self._note_deadline(deadline, request.request_id)
        self._totals["prompt_tokens"] += first.prompt_len

    def abort(
        self, request_id: str, index: int | None = None, reason: FinishReason = "abort", now: float = 0.0
    ) -> list[Event]:
        """End one continuation, or all that are left. Unknown ones are no error: they may just have ended."""
        job = self._jobs.get(request_id)
        if job is None:
            return []
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
        return len(self._waiting)

    def stats(self) -> Stats:
        everyone = [sequence for _, sequence in self._waiting + self._running]
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            queued_prefill_tokens=sum(sequence.remaining for sequence in everyone if sequence.remaining > 1),
            steps=self._steps,
            **self._totals,
        )

    # -- one step

    def plan(self, now: float) -> Step | None:
        """The next step, or None when there is nothing to compute. `computed` advances in `commit`."""
        assert not self._in_flight, "the last step isn't committed"
        prompts = sum(sequence.remaining > 1 for _, sequence in self._running)
        slices = self._plan_streams(prompts > 0)
        left = self.budget - len(slices)
        admitted = self._admit(left - prompts, now)
        behind = [s for _, s in self._running if not s.in_flight and (s.remaining > 1 or id(s) in admitted)]
        slices += self._plan_prompts(behind, left)
        if not slices and not self._freed:
            return None
        self._steps += 1
        step = Step(self._steps, self._freed, self._new, self._grown, self._copies, slices)
        self._freed, self._new, self._grown, self._copies = [], [], [], []
        return step

    def commit(self, step: Step, result: Result, now: float) -> list[Event]:
        """Take in what a step produced."""
        events: list[Event] = []
        sampled = 0
        for sequence, slice_ in zip(self._in_flight, step.slices, strict=True):
            number, sampled = sampled, sampled + slice_.sample
            sequence.in_flight = False
            self._totals["step_tokens"] += slice_.count
            if sequence.ended:
                self._leave(sequence)
                continue
            if slice_.prompt_logprobs and sequence.prompt_scores is not None:
                sequence.prompt_scores += result.prompt_logprobs.get(slice_.seat, ())
            self._advance(sequence, slice_.count)
            if slice_.sample:
                score = result.logprobs[number] if result.logprobs else None
                events += self._append(sequence, result.token_ids[number], score, now)
        self._in_flight = []
        return events

    def _plan_streams(self, prompts: bool) -> list[Slice]:
        """One token for every sequence that lacks one; when there are more than fit, they take turns."""
        streams = [sequence for _, sequence in self._running if sequence.remaining == 1]
        room = self.budget
        if prompts or (self._waiting and self._seats):
            room -= max(1, self.budget // 4)  # prompts make progress however many streams there are
        room = max(room, 1)
        if len(streams) > room:
            self._turn = (self._turn + room) % len(streams)
            streams = (streams[self._turn :] + streams[: self._turn])[:room]
            streams.sort(key=lambda sequence: sequence.order)
        for sequence in streams:  # most important first, so that nobody loses blocks to a less important one
            if sequence.seat is not None:
                self._grow(sequence)
        return [self._slice(sequence, 1) for sequence in streams if sequence.seat is not None]

    def _plan_prompts(self, prompts: list[Sequence], left: int) -> list[Slice]:
        """Even shares of `left` tokens; what one sequence doesn't need, the others get."""
        slices = []
        for number, sequence in enumerate(sorted(prompts, key=lambda s: (s.remaining, s.order))):
            share = min(sequence.remaining, -(-left // (len(prompts) - number)))
            if share > 0:
                slices.append(self._slice(sequence, share))
                left -= share
        return slices

    def _slice(self, sequence: Sequence, count: int) -> Slice:
        assert sequence.seat is not None
        sequence.in_flight = True
        self._in_flight.append(sequence)
        scores = sequence.prompt_scores is not None and sequence.computed < sequence.prompt_len - 1
        return Slice(sequence.seat, sequence.computed, count, count == sequence.remaining, scores)

    def _admit(self, room: int, now: float) -> set[int]:
        """Seat waiting sequences, strictly in order: one that lacks blocks isn't overtaken, or it might wait for ever."""
        admitted: set[int] = set()
        while self._waiting and self._seats and len(admitted) < room:
            sequence = self._waiting[0][1]
            if self._still_blocked(sequence):
                break
            matched = self._match(sequence)
            need = self._blocks_for(len(sequence.tokens)) - len(matched)
            spare = len(self._running)  # every running sequence will want another block before long
            if need + spare > self.pool.num_free - self.pool.count_free(matched):
                self._blocked = (sequence.order, self.pool.num_free)
                break
            del self._waiting[0]
            self.pool.hold(matched)
            sequence.computed = len(matched) * self.pool.block_size
            if not sequence.scheduled:
                sequence.scheduled = now
            if not sequence.preemptions and not sequence.index:  # what its own prompt left behind is no hit
                sequence.cached = min(sequence.computed, sequence.prompt_len)
                self._totals["prefix_queries"] += len(sequence.tokens)
                self._totals["prefix_hits"] += sequence.computed
            self._seat(sequence, matched + self.pool.take(need))
            admitted.add(id(sequence))
        return admitted

    def _still_blocked(self, sequence: Sequence) -> bool:
        """It lacked blocks, and none was given back since: its prompt needn't be looked up again at every step."""
        order, free = self._blocked or (None, 0)
        if order != sequence.order or self.pool.num_free > free:
            return False
        self._blocked = (sequence.order, self.pool.num_free)
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix; at least one token is left to compute, since its logits are needed."""
        if not self.pool.prefix_caching or sequence.prompt_scores is not None:
            return []
        full = (len(sequence.tokens) - 1) // self.pool.block_size
        return self.pool.match(self._content(sequence, i) for i in range(full))

    # -- seats and blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _content(self, sequence: Sequence, block: int) -> ContentId:
        """Content id of a full block of the sequence; each is hashed once."""
        size, contents = self.pool.block_size, sequence.contents
        while len(contents) <= block:
            start = len(contents) * size
            contents.append(
                content_id(
                    contents[-1] if contents else self._chain(sequence.request), sequence.tokens[start : start + size]
                )
            )
        return contents[block]

    def _chain(self, request: Request) -> ContentId:
        return salted(self._salt, request.cache_salt, request.adapter or "")

    def _seat(self, sequence: Sequence, blocks: list[int]) -> None:
        """The ranks learn of the sequence with the next step."""
        seat = sequence.seat = self._seats.pop()
        sequence.blocks = blocks
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
            )
        )
        self._grown.append((seat, tuple(blocks)))
        insort(self._running, (sequence.order, sequence))

    def _grow(self, sequence: Sequence) -> None:
        """Room for one more token; when there is no free block, the least important sequence gives up its own."""
        if sequence.computed < len(sequence.blocks) * self.pool.block_size:
            return
        while not self.pool.num_free:
            victim = self._running[-1][1]
            self._preempt(victim)
            if victim is sequence:
                return
        block = self.pool.take(1)
        sequence.blocks += block
        assert sequence.seat is not None
        self._grown.append((sequence.seat, block))

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with its output: it will be recomputed, or found in the cache."""
        self._leave(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self._totals["preemptions"] += 1
        if sequence.prompt_scores is not None:
            sequence.prompt_scores = [None]
        insort(self._waiting, (sequence.order, sequence))

    def _leave(self, sequence: Sequence) -> None:
        """Give back seat and blocks, and withdraw what the ranks haven't been told yet."""
        seat = sequence.seat
        assert seat is not None
        known = len(self._new)
        self._new = [new for new in self._new if new.seat != seat]
        if len(self._new) == known:
            self._freed.append(seat)
        self._grown = [grown for grown in self._grown if grown[0] != seat]
        if self._copies:
            own = set(sequence.blocks)
            self._copies = [pair for pair in self._copies if pair[1] not in own]
        self._seats.append(seat)
        sequence.seat = None
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        _remove(self._running, sequence)

    # -- the life of a sequence

    def check(self, request: Request) -> None:
        """Raise `ClientError` when the request can never run. Reads nothing that changes: any thread may call it."""
        prompt, limit = len(request.prompt_token_ids), self.max_model_len
        if not prompt:
            raise ClientError("the prompt is empty; send at least one token", param="prompt")
        wanted = request.sampling.max_tokens
        if prompt >= limit or (wanted is not None and prompt + wanted > limit):
            asked = f"{prompt} prompt tokens" + (
                f" + max_tokens {wanted}" if wanted is not None else " and at least one more"
            )
            raise ContextLengthError(
                f"{asked} exceed the context of {limit} tokens (--max-model-len); shorten the prompt or lower max_tokens",
                param="max_tokens" if wanted is not None and prompt < limit else "prompt",
            )
        if self._blocks_for(prompt + (wanted or 1)) > self.pool.num_blocks:
            raise ContextLengthError(
                f"{prompt + (wanted or 1)} tokens exceed the KV cache of {self.pool.num_blocks * self.pool.block_size} tokens;"
                " raise --kv-cache-memory-bytes or --gpu-memory-utilization",
                param="prompt",
            )
        if request.resume_token_ids and request.sampling.n != 1:
            raise ClientError("resume_token_ids needs n = 1", param="resume_token_ids")
        if wanted is not None and len(request.resume_token_ids) >= wanted:
            raise ClientError("resume_token_ids leave nothing of max_tokens to generate", param="resume_token_ids")
        given, longest = prompt + len(request.resume_token_ids), self._longest
        if given >= longest:
            raise ContextLengthError(
                f"{given} tokens of prompt and resume_token_ids leave no room in {longest} tokens"
                " (--max-model-len, or the KV cache if that is smaller)",
                param="resume_token_ids",
            )

    @property
    def _longest(self) -> int:
        """Most tokens that a sequence can have: those of the context, if the cache holds them."""
        return min(self.max_model_len, self.pool.num_blocks * self.pool.block_size)

    def _sequence(self, job: Job, index: int, order: Order, now: float) -> Sequence:
        request, sampling = job.request, job.request.sampling
        prompt = len(request.prompt_token_ids)
        stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_token_ids)
        sequence = job.live[index] = Sequence(
            request=request,
            index=index,
            order=order,
            seed=(self._seed(request) + index) % 2**64,
            stop_token_ids=stops,
            max_len=self._longest if sampling.max_tokens is None else prompt + sampling.max_tokens,
            tokens=list(request.prompt_token_ids),
            prompt_len=prompt,
            queued=now,
        )
        if sampling.prompt_logprobs is not None and index == 0:
            sequence.prompt_scores = [None]
        return sequence

    def _seed(self, request: Request) -> int:
        """The request's own, or one that it would get again wherever it is resubmitted."""
        if request.sampling.seed is not None:
            return request.sampling.seed
        text = f"{self._default_seed}/{request.request_id}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def _advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are computed; blocks that this filled can be found from now on."""
        size, before = self.pool.block_size, sequence.computed
        sequence.computed += count
        if self.pool.prefix_caching:
            for block in range(before // size, sequence.computed // size):
                self.pool.commit(sequence.blocks[block], self._content(sequence, block))

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
            return [event]
        return [event, *self._end(sequence, sequence.finished(ending[0], now, ending[1]))]

    def _branch(self, parent: Sequence, now: float) -> None:
        """Start the other continuations. While the parent's prompt is there, its full blocks are shared by reference and the
        last one, which both will write, is copied: only the last prompt token is computed again, for its logits."""
        forks, parent.forks = parent.forks, []
        job = self._jobs[parent.request.request_id]
        full, inside = divmod(parent.prompt_len - 1, self.pool.block_size)
        for index in forks:
            child = self._sequence(job, index, (parent.order[0], parent.order[1], index), parent.queued)
            child.contents = parent.contents[: parent.prompt_len // self.pool.block_size]
            child.cached = parent.cached
            if parent.seat is None or parent.computed < parent.prompt_len or not self._seats or not self.pool.num_free:
                insort(self._waiting, (child.order, child))
                continue
            child.scheduled = now
            shared = parent.blocks[:full]
            self.pool.hold(shared)
            (own,) = self.pool.take(1)
            if inside:
                self._copies.append((parent.blocks[full], own))
            child.computed = parent.prompt_len - 1
            self._seat(child, [*shared, own])

    def _end(self, sequence: Sequence, event: Event | None) -> list[Event]:
        """The sequence is over. Blocks of one that is being computed are given back when that step is committed."""
        request_id = sequence.request.request_id
        sequence.ended = True
        live = self._jobs[request_id].live
        del live[sequence.index]
        if not live:
            del self._jobs[request_id]
        if sequence.seat is None:
            _remove(self._waiting, sequence)
        elif not sequence.in_flight:
            self._leave(sequence)
        return [] if event is None else [event]

    def _unborn(self, parent: Sequence, index: int, reason: FinishReason, now: float) -> Finished:
        """The end of a continuation that never began."""
        timing = Timing(queued=parent.queued, finished=now)
        return Finished(parent.request.request_id, index, reason, prompt_tokens=parent.prompt_len, timing=timing)


def _remove(entries: list[tuple[Order, Sequence]], sequence: Sequence) -> None:
    """Out of a list that is sorted by order."""
    place = bisect_left(entries, (sequence.order,))
    assert entries[place][1] is sequence
    del entries[place]
