"""A fleet in one process on a virtual clock: the router, hashes, block pools and messages are the real ones; only the
model is replaced, by how long its steps take.

A group does what the engine's scheduler does: sequences that stream come first, what is left of a step's budget is shared
evenly among prompts, blocks are found, taken, committed and freed in a real pool. Other than there, a sequence takes the
blocks of its whole output at once, so none is ever preempted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.member import Member
from kvasir.cluster.router import Route, Router
from kvasir.engine.blocks import BlockPool, ContentId, chain_start, content_ids, salted, token_bytes
from kvasir.engine.errors import OverloadedError
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Stats

REPORT_S = 0.1
"""How often a group reports, if anything changed: what gateways know is at most this old, as in a real fleet."""
ALL_COUNTED = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step = base + prefill x prompt tokens + stream x streaming sequences + context x their tokens.

    The defaults are what a 70 B model in bf16 can do on a node of eight H100: 140 GFLOP a token at 45 % of 8 x 989 TFLOP/s,
    140 GB of weights and 0.33 MB of keys and values a token read at 8 x 3.35 TB/s, and 50 us a sequence for the host.
    `benchmarks/replay.py --fit` measures an engine's.
    """

    base_s: float = 0.006
    prefill_s: float = 40e-6
    stream_s: float = 50e-6
    context_s: float = 12e-9

    def __call__(self, prompt_tokens: int, streams: int, context: int) -> float:
        return self.base_s + self.prefill_s * prompt_tokens + self.stream_s * streams + self.context_s * context


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all groups of a fleet have in common."""

    step_time: StepTime = StepTime()
    num_blocks: int = 81920
    block_size: int = 16
    max_num_seqs: int = 256
    budget: int = 384
    """Tokens of a step: so many that it takes less than 25 ms."""

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name="simulated",
            max_model_len=self.num_blocks * self.block_size,
            vocab_size=2**31,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            salt=salted("simulated"),
        )


@dataclass(slots=True, eq=False)
class Run:
    """A request in a simulated group."""

    request: Request
    output: int
    """Tokens that it will produce."""
    arrived: float
    ids: Sequence[ContentId] = ()
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    produced: int = 0
    first_token: float = math.nan
    finished: float = math.nan
    route: Route | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def left(self) -> int:
        """Prompt tokens to compute."""
        return self.prompt_tokens - self.computed


class SimulatedGroup:
    """One group. `now` is the end of its last step; `on_tokens(run, count)` is called for what a step produced."""

    def __init__(
        self, name: str, shape: Shape, on_tokens: Callable[[Run, int], None] = lambda run, count: None
    ) -> None:
        self.shape, self.info = shape, shape.info
        self.pool = BlockPool(shape.num_blocks, shape.block_size)
        self.pool.listen()
        self.journal = BlockJournal(name)
        self.now = 0.0
        self._on_tokens = on_tokens
        self._waiting: deque[Run] = deque()
        self._prompts: list[Run] = []
        self._streams: list[Run] = []
        self._expected = 0
        """Tokens of waiting requests that were cached when they came."""
        self._context = 0
        self._steps = self._step_tokens = self._generated = self._ended = self._hits = self._queries = 0

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._prompts or self._streams)

    def submit(self, run: Run, now: float) -> None:
        """A request comes; a step that is being computed doesn't know it yet."""
        self.now = max(self.now, now)
        start = chain_start(self.info.salt, run.request.cache_salt, run.request.adapter, False)
        run.ids = content_ids(start, token_bytes(run.request.prompt_token_ids), self.shape.block_size)
        run.cached = self._match(run) * self.shape.block_size
        self._expected += run.cached
        self._waiting.append(run)

    def abort(self, run: Run) -> None:
        """It ends now, wherever it is."""
        if run in self._waiting:
            self._waiting.remove(run)
            self._expected -= run.cached
            self._ended += 1
        elif run in self._prompts or run in self._streams:
            self._leave(run)

    def advance(self, until: float) -> None:
        """Compute steps until `until`; the last may end later."""
        while self.now < until and not self.idle:
            self.step(until)

    def step(self, until: float) -> None:
        """One step; of steps that are all alike, as many as begin before `until`."""
        self._admit()
        if not self._prompts and not self._streams:
            raise RuntimeError("a request needs more blocks than the group has")
        shares = self._shares()
        tokens, streams = sum(count for _, count in shares), len(self._streams)
        seconds = self.shape.step_time(tokens, streams, self._context)
        count = 1 if shares else self._alike(until, seconds)
        self.now += seconds * count
        self._steps += count
        self._step_tokens += tokens + streams * count
        for run in [*self._streams]:
            self._produce(run, count)
        for run, share in shares:
            self._compute(run, share)

    def stats(self) -> Stats:
        left = sum(run.left for run in self._prompts) + sum(run.left for run in self._waiting) - self._expected
        return Stats(
            running=len(self._prompts) + len(self._streams),
            waiting=len(self._waiting),
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            queued_prefill_tokens=left,
            prefills=len(self._prompts) + len(self._waiting),
            decode_blocks=self.pool.num_used,
            free_blocks=self.pool.num_free,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            ended=self._ended,
            generation_tokens=self._generated,
            steps=self._steps,
            step_tokens=self._step_tokens,
        )

    def _alike(self, until: float, seconds: float) -> int:
        """Steps that begin before `until` and end no stream before their last."""
        shortest = min(run.output - run.produced for run in self._streams)
        return max(1, min(shortest, math.ceil((until - self.now) / seconds) if until < math.inf else shortest))

    def _admit(self) -> None:
        """In order, while there are seats and blocks."""
        while self._waiting and len(self._prompts) + len(self._streams) < self.shape.max_num_seqs:
            run = self._waiting[0]
            matched = self.pool.match(run.ids[: self._most(run)])
            need = -(-(run.prompt_tokens + run.output) // self.shape.block_size) - len(matched)
            if need > self.pool.num_free - self.pool.count_free(matched):
                return
            self._waiting.popleft()
            self._expected -= run.cached
            self.pool.hold(matched)
            run.blocks = matched + self.pool.take(need)
            run.computed = run.cached = len(matched) * self.shape.block_size
            self._queries += run.prompt_tokens
            self._hits += run.cached
            self._prompts.append(run)

    def _shares(self) -> list[tuple[Run, int]]:
        """Even shares of what the streams leave of the budget, at least a quarter."""
        if not self._prompts:
            return []
        left = self.shape.budget - min(len(self._streams), self.shape.budget * 3 // 4)
        shares = []
        prompts = sorted(self._prompts, key=lambda run: run.left)
        for number, run in enumerate(prompts):
            share = min(run.left, -(-left // (len(prompts) - number)))
            if share:
                shares.append((run, share))
                left -= share
        return shares

    def _compute(self, run: Run, count: int) -> None:
        size, before = self.shape.block_size, run.computed
        run.computed += count
        for place in range(before // size, run.computed // size):
            self.pool.commit(run.blocks[place], run.ids[place])
        if not run.left:
            run.first_token = self.now
            self._prompts.remove(run)
            self._streams.append(run)
            self._context += run.prompt_tokens
            self._produce(run, 1)

    def _produce(self, run: Run, count: int) -> None:
        run.produced += count
        self._context += count
        self._generated += count
        self._on_tokens(run, count)
        if run.produced >= run.output:
            run.finished = self.now
            self._leave(run)

    def _leave(self, run: Run) -> None:
        if run in self._streams:
            self._streams.remove(run)
            self._context -= run.prompt_tokens + run.produced
        else:
            self._prompts.remove(run)
        self.pool.free(run.blocks)
        self._ended += 1

    def _match(self, run: Run) -> int:
        return len(self.pool.match(run.ids[: self._most(run)]))

    def _most(self, run: Run) -> int:
        return (run.prompt_tokens - 1) // self.shape.block_size


class Simulation:
    """`groups` behind one gateway or more, that take turns with the requests."""

    def __init__(self, groups: int, shape: Shape, routers: Sequence[Router]) -> None:
        self.routers = routers
        self.groups = [SimulatedGroup(f"group {number}", shape, self._on_tokens) for number in range(groups)]
        self._members = [[router.join(f"g{number}") for number in range(groups)] for router in routers]
        self._busy: set[int] = set()
        """Groups that have something to report."""
        self._number: dict[Member, int] = {}
        for members in self._members:
            for number, (member, group) in enumerate(zip(members, self.groups, strict=True)):
                self._number[member] = number
                member.welcome(group.info, f"group {number}")
                for message in group.journal.snapshot():
                    member.blocks(message)

    def run(self, requests: Iterable[tuple[float, Sequence[int], int]]) -> tuple[list[Run], list[float]]:
        """Play (arrival, prompt, output tokens), sorted by arrival, to the end. Returns (what ran, when others were refused)."""
        runs, refused, tick, now = [], list[float](), 0.0, 0.0
        for turn, (now, prompt, output) in enumerate(requests):
            while tick <= now:
                self._report(tick)
                tick += REPORT_S
            asked = Request(request_id=str(turn), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=output))
            try:
                runs.append(self._begin(Run(asked, output, now), turn % len(self.routers), now))
            except OverloadedError:
                refused.append(now)
        while self._busy:
            self._report(tick)
            tick += REPORT_S
        return runs, refused

    def _begin(self, run: Run, turn: int, now: float) -> Run:
        router = self.routers[turn]
        run.route = router.place(run.request, self._members[turn], now)
        run.route.reservation.number = 1
        number = self._number[run.route.member]
        self._busy.add(number)
        group = self.groups[number]
        group.advance(now)
        group.submit(run, now)
        return run

    def _on_tokens(self, run: Run, count: int) -> None:
        if run.route is not None and run.produced == count:
            run.route.reservation.streams()

    def _report(self, now: float) -> None:
        """Every group that did something until now says so."""
        for number in [*self._busy]:
            group = self.groups[number]
            group.advance(now)
            stats = group.stats()
            group.journal.take("device", group.pool.drain())
            messages = group.journal.flush()
            for members in self._members:
                member = members[number]
                member.report(stats, ALL_COUNTED, now)
                for message in messages:
                    member.blocks(message)
            if group.idle:
                self._busy.discard(number)


def ideal_hits(prompts: Iterable[Sequence[int]], block_size: int) -> list[int]:
    """Cached tokens of each prompt with one cache that never forgets."""
    known: set[ContentId] = set()
    found = []
    for prompt in prompts:
        ids = content_ids(salted("ideal"), token_bytes(prompt), block_size)
        most = (len(prompt) - 1) // block_size
        count = next((place for place, one in enumerate(ids[:most]) if one not in known), most)
        found.append(count * block_size)
        known.update(ids)
    return found
