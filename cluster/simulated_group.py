"""A simulated group: hashes and block pool are the real ones; the model is replaced by how long its steps take.

It does what the engine's scheduler does: sequences that stream come first, what is left of a step's budget is shared
evenly among prompts, blocks are found, taken, committed and freed in a real pool. Other than there, a sequence takes the
blocks of its whole output at once, so none is ever preempted.

Blocks that a request's route says to fetch come over the links of both groups, that carry one transfer at a time; then the
request takes its turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.router import Route
from kvasir.engine.blocks import BlockPool, ContentId, chain_start, content_ids, salted, token_bytes
from kvasir.engine.config import Role
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

LETTER = 65
"""The token that simulated groups always say."""


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
    prefill_budget: int = 2048
    """The same where nothing streams for long: in groups for prompts."""
    token_bytes: float = 0.0
    """Keys and values of a token; 0: nothing is fetched from peers."""
    fetch_floor_s: float = 0.005
    fetch_bytes_per_s: float = 100e9
    """Of a group's links: a quarter of what eight times 400 Gbit/s could carry."""

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
            block_bytes=int(self.token_bytes * self.block_size),
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
    ready_at: float = 0.0
    """Blocks from a peer are here."""
    fetched: Sequence[ContentId] = ()
    heir: Run | None = None
    """What went on with it elsewhere."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def last(self) -> Run:
        """The one that ended it."""
        return self.heir.last if self.heir is not None else self

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
        self.role: Role = "both"
        self.link_free = 0.0
        """When its link has carried all transfers."""
        self._on_tokens = on_tokens
        self._fetching: list[Run] = []
        self._loaded = self._served = 0
        self._waiting: deque[Run] = deque()
        self._prompts: list[Run] = []
        self._streams: list[Run] = []
        self._expected = 0
        """Tokens of waiting requests that were cached when they came."""
        self._context = 0
        self._steps = self._step_tokens = self._generated = self._ended = self._hits = self._queries = 0

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._prompts or self._streams or self._fetching)

    @property
    def budget(self) -> int:
        return self.shape.prefill_budget if self.role == "prefill" else self.shape.budget

    def submit(self, run: Run, now: float, peer: SimulatedGroup | None = None, told: int = 0) -> None:
        """A request comes, that fetches blocks from `peer`, or so many tokens' from one elsewhere; a step that is being
        computed doesn't know it yet."""
        self.now = max(self.now, now)
        start = chain_start(self.info.salt, run.request.cache_salt, run.request.adapter, False)
        run.ids = content_ids(start, token_bytes(run.request.prompt_token_ids), self.shape.block_size)
        held = peer._match(run) if peer is not None else min(told // self.shape.block_size, self._most(run))
        if held and self._fetch(run, held, peer, now):
            self._fetching.append(run)
        else:
            self._queue(run)

    def _queue(self, run: Run) -> None:
        run.cached = self._match(run) * self.shape.block_size
        self._expected += run.cached
        self._waiting.append(run)

    def _fetch(self, run: Run, held: int, peer: SimulatedGroup | None, now: float) -> bool:
        """Begin; False when the peer has no block that is lacking."""
        own = self._match(run)
        if held <= own:
            return False
        run.fetched = run.ids[own:held]
        seconds = len(run.fetched) * self.shape.token_bytes * self.shape.block_size / self.shape.fetch_bytes_per_s
        begin = max(now, self.link_free, peer.link_free if peer is not None else 0.0)
        self.link_free = begin + seconds
        if peer is not None:
            peer.link_free = begin + seconds
            peer._served += len(run.fetched)
        run.ready_at = begin + seconds + self.shape.fetch_floor_s
        return True

    def _land(self) -> None:
        """What was fetched until now is in the cache, as far as there is room."""
        for run in [run for run in self._fetching if run.ready_at <= self.now]:
            self._fetching.remove(run)
            lacking = run.fetched[: self.pool.num_free]
            blocks = self.pool.take(len(lacking))
            for block, content in zip(blocks, lacking, strict=True):
                self.pool.commit(block, content)
            self.pool.free(blocks)
            self._loaded += len(lacking)
            self._queue(run)

    def abort(self, run: Run) -> None:
        """It ends now, wherever it is."""
        if run in self._waiting:
            self._waiting.remove(run)
            self._expected -= run.cached
            self._ended += 1
        elif run in self._fetching:
            self._fetching.remove(run)
            self._ended += 1
        elif run in self._prompts or run in self._streams:
            self._leave(run)

    def advance(self, until: float) -> None:
        """Compute steps until `until`; the last may end later."""
        while self.now < until and not self.idle:
            self.step(until)

    def step(self, until: float) -> None:
        """One step; of steps that are all alike, as many as begin before `until`."""
        self._land()
        self._admit()
        if not self._prompts and not self._streams:
            if not self._fetching:
                raise RuntimeError("a request needs more blocks than the group has")
            self.now = max(self.now, min(run.ready_at for run in self._fetching))
            return
        until = min([until, *(run.ready_at for run in self._fetching)])
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
        left = sum(run.left for run in (*self._prompts, *self._waiting, *self._fetching)) - self._expected
        size, shape = self.shape.block_size, self.shape
        left -= sum(len(run.fetched) * size for run in self._fetching)
        return Stats(
            running=len(self._prompts) + len(self._streams),
            waiting=len(self._waiting) + len(self._fetching),
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            queued_prefill_tokens=left,
            prefills=len(self._prompts) + len(self._waiting) + len(self._fetching),
            decode_blocks=self.pool.num_used,
            free_blocks=self.pool.num_free,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            ended=self._ended,
            prefill_rate=self.budget / shape.step_time(self.budget, 0, 0),
            generation_tokens=self._generated,
            steps=self._steps,
            step_tokens=self._step_tokens,
            peer_loaded=self._loaded,
            peer_served=self._served,
            peer_bytes=int(self._loaded * size * shape.token_bytes),
            fetch_floor_s=shape.fetch_floor_s if shape.token_bytes else 0.0,
            fetch_bytes_per_s=shape.fetch_bytes_per_s if shape.token_bytes else 0.0,
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
        left = self.budget - min(len(self._streams), self.budget * 3 // 4)
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
