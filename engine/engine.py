"""Engine: a model, its scheduler and its rank, in one thread of their own. Token ids in, events out."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from kvasir.engine.blocks import BlockPool, Changes, ContentId, Tier
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError, KvasirError, OverloadedError, UnavailableError
from kvasir.engine.event import Event, Failed, FinishReason
from kvasir.engine.exchange import Exchange
from kvasir.engine.executor import Executor, LocalExecutor, executor_of
from kvasir.engine.grammar_queue import Compiling
from kvasir.engine.load import Loaded
from kvasir.engine.memory import token_budget
from kvasir.engine.peer_wire import Ask, Offer, RefusedError
from kvasir.engine.pooling import check_dimensions
from kvasir.engine.prices import KEEP, Prices
from kvasir.engine.processors import Processors
from kvasir.engine.pulls import Pulls
from kvasir.engine.request import PoolingParams, Request, SamplingParams
from kvasir.engine.scheduler import Scheduler, Stats
from kvasir.engine.step import NewSequence, Slice, Step, first_blocks

logger = logging.getLogger(__name__)
Deliver = Callable[[Sequence[Event]], None]
OnBlocks = Callable[[Tier, Changes], None]
IDLE_S = 0.2
"""The loop turns at least this often, so that its heartbeat shows that it lives."""
LOADING_S = 0.001
"""The same while it has nothing to do but wait for blocks from a lower tier."""
STATS_PERIOD_S = 0.05
MAX_RETRY_S = 60.0
BEFORE = 1000
"""More steps than are run before the scheduler's first."""
MEASURED_TOKENS, MEASURED_S = 32, 0.1
"""Prompts grow from so many tokens until their step takes so long, so that a large model on a CPU starts soon, too."""


class Engine:
    """`submit` requests from any thread; `deliver` gets every step's events, in the engine's thread.

    When a step raises, every request that is left gets a `Failed`, `failure` is set and the thread ends: a process that
    hosts an engine watches `failure` and `heartbeat`.
    """

    def __init__(
        self,
        config: EngineConfig,
        deliver: Deliver,
        loaded: Loaded | None = None,
        executor: Executor | None = None,
    ) -> None:
        if executor is None:
            executor = executor_of(config) if loaded is None else LocalExecutor(config, loaded)
        self._executor, loaded = executor, executor.loaded
        spec = loaded.decoder.spec
        caching = config.enable_prefix_caching and spec.causal
        self.config = config
        self.info = replace(loaded.info, salt=loaded.info.version if caching else b"", stretch_len=spec.stretch_len)
        self._deliver = deliver
        self._pooler, self._token_types = loaded.pooler, loaded.decoder.spec.token_types
        self._grammars = executor.grammars
        self._compiling = Compiling(self._grammars)
        self._processors = Processors(config.logits_processors)
        self.pool = BlockPool(loaded.cache.num_blocks, config.block_size, prefix_caching=caching)
        self._scheduler = Scheduler(
            block_pool=self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=token_budget(config, spec, loaded.decoder.device),
            max_model_len=loaded.info.max_model_len,
            eos_token_ids=loaded.info.eos_token_ids,
            default_seed=config.seed,
            salt=self.info.salt,
            layout=loaded.cache.layout,
            whole_prompts=not spec.causal,
            pool_last=loaded.pooler is not None and loaded.pooler.pooling.from_last,
            stretch_len=spec.stretch_len,
            depth=executor.depth,
            tiers=loaded.tiers,
            ranks=config.ranks,
        )
        self._tiers = loaded.tiers
        self._flying: deque[tuple[Step, float]] = deque()
        self._exchange: Exchange | None = None
        self._prices: Prices | None = None
        self._pulls: Pulls | None = None
        self._asks: deque[tuple[Ask, Sequence[ContentId], Future[Offer]]] = deque()
        self._collected = 0.0
        self._before = itertools.count(-BEFORE)
        """Numbers of steps before the scheduler's first: ranks that read tokens later tell them apart by these."""
        self._prefill = 0.0, 0.0
        """Tokens and seconds of steps that computed prompts; old ones fade."""
        self._telling = min(MEASURED_TOKENS, self._scheduler.budget)
        """Steps of fewer tokens say nothing of long prompts: they take as long for less."""
        self._groups = len(loaded.cache.layout.groups)
        self._wake = threading.Condition()
        self._inbox: deque[Request | tuple[str, int | None, FinishReason]] = deque()
        self._accepted: dict[str, float] = {}
        """Each with the time of its submission."""
        self._ends: deque[float] = deque(maxlen=64)
        self._stopping = False
        self._stats, self.stats_at = self._scheduler.stats(), 0.0
        self._on_blocks: OnBlocks | None = None
        self._listening = False
        self._thread = threading.Thread(target=self._loop, name="kvasir-engine", daemon=True)
        self.heartbeat = time.monotonic()
        """time.monotonic() of the loop's last turn; it turns when idle, too."""
        self.failure: BaseException | None = None

    def start(self, *, measure: bool = False) -> None:
        """Run one token through the model, so that no request pays for first-time set-up, then begin the loop. measure: and
        prompts, so that it is known from the first request how fast they are; part of a second, more on a slow CPU."""
        self._prompt_s(1)
        if measure:
            length, took = self._measure_prompts()
            self._telling = length // 2
            self._prefill = length * self._executor.depth, took  # under load all stages compute at once
            self._stats = replace(self._stats, prefill_rate=self._prefill_rate)
        if self._tiers is not None:
            self._tiers.wait_until_scanned()
        self._thread.start()

    def _measure_prompts(self) -> tuple[int, float]:
        """(tokens, seconds) of ever longer ones, each twice: the first of a length sets up what the second doesn't pay for."""
        room = self.pool.num_blocks // self._groups * self.config.block_size
        most = max(1, min(self._scheduler.budget, self.info.max_model_len - 1, room))
        length = min(MEASURED_TOKENS, most)
        while True:
            took = min(self._prompt_s(length), self._prompt_s(length))
            if took >= MEASURED_S or length == most:
                return length, took
            length = min(4 * length, most)

    def _prompt_s(self, length: int) -> float:
        """Seconds of a step that computes a prompt alone, in blocks that hold nothing yet."""
        pool = "generate" not in self.info.tasks
        pooling = PoolingParams() if pool else None
        # equal tokens would all choose the same experts
        tokens = tuple(token % self.info.vocab_size for token in range(length))
        new = NewSequence(0, tokens, length, SamplingParams(temperature=0), 0, (), pooling=pooling)
        blocks = first_blocks([length], self._groups, self.config.block_size)
        began = time.monotonic()
        slices = (Slice(0, 0, length, not pool, pool=pool),)
        self._executor.launch(Step(next(self._before), (0,), (new,), blocks, slices=slices))
        self._executor.collect()
        return time.monotonic() - began

    def serve_blocks(self, host: str) -> tuple[str, str]:
        """Before `start`: lend blocks to other groups on this node's address `host`, and fetch theirs where requests name
        them -> (where, the secret that lets them in). Two empty texts: it doesn't (--kv-transfer off)."""
        secret = secrets.token_hex(32)
        served = self._executor.serve_blocks(host, secret, self._asked) if self.info.salt else None
        if served is None:
            return "", ""
        self._exchange, addresses = served
        self._prices = self._exchange.puller.prices = Prices(self.info.block_bytes / self.info.block_size)
        step, most = self._scheduler.budget, self._exchange.most_pulled
        self._pulls = Pulls(self._scheduler.tables, addresses[0], self._prices, most, step)
        self._scheduler.use_peers(self._pulls)
        self._scheduler.lends.begin(self._exchange.terms(addresses), self._exchange.lender)
        return addresses[0], secret

    def _asked(self, ask: Ask, ids: Sequence[ContentId]) -> Future[Offer]:
        """Any thread: another group wants blocks; it is answered between two steps."""
        answer: Future[Offer] = Future()
        with self._wake:
            if self._stopping or self.failure is not None:
                answer.set_exception(RefusedError("it is shutting down"))
            else:
                self._asks.append((ask, ids, answer))
                self._wake.notify()
        return answer

    def _answer_asks(self) -> None:
        while self._asks:
            ask, ids, answer = self._asks.popleft()
            try:
                answer.set_result(self._scheduler.lends.lend(ask, ids))
            except RefusedError as error:
                answer.set_exception(error)
            except (ArithmeticError, LookupError, ValueError) as error:  # what a peer says must not end this loop
                answer.set_exception(RefusedError(f"the question makes no sense: {error}"))

    def shutdown(self) -> None:
        """End the loop; requests that are left fail with `unavailable`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():  # a finaliser runs anywhere
            self._thread.join()
        self._grammars.shutdown()
        self._fail_all("unavailable", "the engine was shut down")
        self._executor.close()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ClientError, OverloadedError or UnavailableError at once; no event follows then."""
        self.check(request)
        with self._wake:
            if self._stopping or self.failure is not None:
                raise UnavailableError("the engine has stopped")
            if request.request_id in self._accepted:
                raise ClientError(f"request id {request.request_id!r} is in use", param="request_id")
            asked = sum(isinstance(message, Request) for message in self._inbox)
            waiting = len(self._compiling) + asked + self._scheduler.num_waiting
            if waiting >= self.config.max_queue:
                raise OverloadedError(
                    f"{waiting} requests are waiting, the limit is {self.config.max_queue} (--max-queue); ask again later",
                    retry_after_s=self._retry_after(waiting),
                )
            submitted = self._accepted[request.request_id] = time.time()
            grammar = None
            if (wanted := request.sampling.structured_outputs) is not None:
                late = [m for m in self._inbox if not isinstance(m, Request) and m[0] == request.request_id]
                for message in late:  # an abort of the request that had this id before
                    self._inbox.remove(message)
                grammar = self._compiling.add(request, wanted, submitted)
            else:
                self._inbox.append(request)
            self._wake.notify()
        if grammar is not None:
            grammar.future.add_done_callback(self._compiled)

    def _compiled(self, _: object) -> None:
        with self._wake:
            self._wake.notify()

    def check(self, request: Request) -> None:
        """Raise ClientError when the request can never run here."""
        self._check_task(request)
        self._check_tokens(request)
        if request.sampling.deterministic and request.pooling is None and self.info.indeterminate:
            raise ClientError(f"deterministic can't be kept here: {self.info.indeterminate}", param="deterministic")
        self._grammars.words.check(request.sampling)
        self._processors.check(request.sampling, request.prompt_token_ids)
        self._scheduler.check(request)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End one continuation, or all that are left, at the loop's next turn. Unknown ids are no error."""
        with self._wake:
            self._inbox.append((request_id, index, reason))
            self._wake.notify()

    def stats(self) -> Stats:
        """Load, at most 0.2 s old: what was submitted before `stats_at` (time.monotonic()) is in it."""
        return self._stats

    def listen(self, on_blocks: OnBlocks) -> None:
        """From now on, after each step and in the engine's thread, tell which blocks can be found, and which no longer."""
        self._on_blocks = on_blocks

    def _check_task(self, request: Request) -> None:
        params = request.pooling
        self.info.need(params.task if params else "generate")
        if params is None or self._pooler is None:
            return
        pooling, wanted = self._pooler.pooling, params.dimensions
        if wanted is not None:
            check_dimensions(pooling, wanted, self.info.name)
        segments = request.token_type_ids
        if segments and len(segments) != len(request.prompt_token_ids):
            counts = f"{len(segments)} for {len(request.prompt_token_ids)} tokens"
            raise ClientError(
                f"token_type_ids must be as many as the prompt's tokens, got {counts}", param="token_type_ids"
            )
        if segments and self._token_types > 1 and not 0 <= min(segments) <= max(segments) < self._token_types:
            raise ClientError(f"token_type_ids must be 0 to {self._token_types - 1}", param="token_type_ids")

    def _check_tokens(self, request: Request) -> None:
        for place, ids in (("prompt", request.prompt_token_ids), ("resume_token_ids", request.resume_token_ids)):
            if ids and not (min(ids) >= 0 and max(ids) < self.info.vocab_size):
                at = next(i for i, token in enumerate(ids) if not 0 <= token < self.info.vocab_size)
                raise ClientError(
                    f"{place}: token {ids[at]} at position {at} is not in the vocabulary (0 to {self.info.vocab_size - 1})",
                    param="prompt",
                )
        for place in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            named = getattr(request.sampling, place)
            if named and max(named) >= self.info.vocab_size:
                text = f"{place} names token {max(named)}, the last one is {self.info.vocab_size - 1}"
                raise ClientError(text, param=place)
        if request.adapter is not None:
            raise ClientError(f"adapter {request.adapter!r}: adapters are not supported yet", param="adapter")

    def _retry_after(self, waiting: int) -> float:
        """Seconds until the queue is empty, by how fast the last requests ended."""
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return 1.0
        rate = (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        return min(MAX_RETRY_S, max(1.0, waiting / rate))

    # -- the engine's thread

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            while self._flying:
                self._hand_out(self._take_back())
            self._fail_all("unavailable", "the engine was shut down")
        except Exception as error:  # the process's border: whatever a step raises, no client may be left waiting
            if isinstance(error, KvasirError):  # a rank that is gone: the message says all
                logger.error("%s", error)
            else:
                logger.exception("a step failed")
            self.failure = error
            why = str(error) if isinstance(error, KvasirError) else f"{type(error).__name__}: {error}"
            self._fail_all("unavailable", f"the engine failed: {why}")
            self._executor.close()

    def _turn(self) -> None:
        self.heartbeat = time.monotonic()
        events = self._take_in()
        while not self._executor.fetched.empty():
            self._scheduler.fetched(*self._executor.fetched.get())
        self._answer_asks()
        self._publish()
        now = time.time()
        events += self._scheduler.expire(now)
        step = self._scheduler.plan(now)  # while those before it are executed
        if step is not None:
            launched = time.monotonic()
            self._executor.launch(step)
            self._flying.append((step, launched))
        if self._flying and (step is None or len(self._flying) >= self._executor.depth + self._executor.ahead):
            step = self._flying[0][0]
            events += self._take_back()
        self._hand_out(events)
        if self._on_blocks is not None:
            self._tell_blocks(self._on_blocks)
        if step is None and not self._record():
            with self._wake:
                if not self._inbox and not self._asks and not self._stopping:
                    self._wake.wait(LOADING_S if self._scheduler.loading else IDLE_S)

    def _record(self) -> bool:
        """Where no request waits, a CUDA graph that is lacking: who comes meanwhile waits for no second one. False: there was
        nothing to do."""
        if self._flying or self._scheduler.has_work or not self._executor.rank.lacks_graphs:
            return False
        self._executor.launch(Step(self._scheduler.stats().steps, record=True))
        self._executor.collect()
        return True

    def _take_back(self) -> list[Event]:
        """The oldest step's result, when it is there."""
        result = self._executor.collect()
        step, launched = self._flying.popleft()
        self._measure(step, launched)
        return self._scheduler.commit(step, result, time.time())

    def _measure(self, step: Step, launched: float) -> None:
        """How fast prompts are computed: what a request's wait is told from, and what fetching their blocks is weighed against."""
        began, self._collected = max(launched, self._collected), time.monotonic()
        counts = [part.count for part in step.slices]
        tokens, took = sum(counts), self._collected - began
        if sum(count for count in counts if count > 1) <= tokens / 2:
            return
        if tokens >= self._telling:
            self._prefill = KEEP * self._prefill[0] + tokens, KEEP * self._prefill[1] + took
        if self._prices is not None:
            self._prices.computed(tokens, took)

    @property
    def _prefill_rate(self) -> float:
        tokens, seconds = self._prefill
        return tokens / seconds if seconds else 0.0

    def _take_in(self) -> list[Event]:
        """What clients asked since the last turn."""
        with self._wake:
            messages, self._inbox = self._inbox, deque()
            now = time.time()
            ready, events = self._compiling.take(now)
        for request, submitted in ready:  # before the messages, one of which may end it
            events += self._add(request, submitted)
        for message in messages:
            if isinstance(message, Request):
                events += self._add(message, self._accepted[message.request_id])
            else:
                whole = message[1] is None  # one continuation alone isn't there before the grammar is
                if whole and (held := self._compiling.pop(message[0])) is not None:
                    self._scheduler.add(held, now)
                events += self._scheduler.abort(*message, now=now)
        return events

    def _add(self, request: Request, submitted: float) -> list[Event]:
        """Its deadline counts from when it was submitted."""
        try:
            self._scheduler.add(request, submitted)
        except KvasirError as error:
            return [Failed(request.request_id, error.code, error.message, param=error.param)]
        return []

    def _hand_out(self, events: list[Event]) -> None:
        if not events:
            return
        for event in events:
            if not self._scheduler.knows(event.request_id) and event.request_id in self._accepted:
                del self._accepted[event.request_id]
                self._compiling.end(event.request_id)
                self._ends.append(time.monotonic())
        self._deliver(events)

    def _fail_all(self, code: str, message: str) -> None:
        """Every accepted request ends, whatever state it is in."""
        with self._wake:
            self._stopping = True
            left, self._accepted = self._accepted, {}
        if left:
            self._deliver([Failed(request_id, code, message) for request_id in left])
        while self._asks:
            self._asks.popleft()[2].set_exception(RefusedError("it is shutting down"))

    def _publish(self) -> None:
        if self.heartbeat - self.stats_at > STATS_PERIOD_S or not self._scheduler.has_work:
            tiers = {} if self._tiers is None else self._tiers.counts()
            stats = replace(self._scheduler.stats(), prefill_rate=self._prefill_rate, **tiers)
            if self._exchange is not None and self._pulls is not None:
                stats = replace(stats, **self._pulls.counts(), peer_served=self._exchange.lender.served)
            self._stats, self.stats_at = stats, self.heartbeat

    def _tell_blocks(self, on_blocks: OnBlocks) -> None:
        if not self._listening:
            self._listening = True
            self.pool.listen()
            if self._tiers is not None:
                self._tiers.listen()
        if changes := self._scheduler.tables.drain():
            on_blocks("device", changes)
        if self._tiers is not None:
            for tier, changes in self._tiers.drain():
                on_blocks(tier, self._scheduler.tables.decisive(changes))
