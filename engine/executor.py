"""Executor: runs steps on the ranks of a group, one or many."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from kvasir.engine.codec import decode_result, encode_step
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import Hub, RankError
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError, UnavailableError
from kvasir.engine.exchange import Exchange
from kvasir.engine.grammar import Grammars, GrammarSource
from kvasir.engine.graphs import graphs_of
from kvasir.engine.lender import OnAsk
from kvasir.engine.load import Loaded, check_ranks, load
from kvasir.engine.memory import resolve_device
from kvasir.engine.mesh import Mesh, Place, host_store, join
from kvasir.engine.outcome import Outcome
from kvasir.engine.processes import Processes
from kvasir.engine.processors import Processors
from kvasir.engine.rank import Rank
from kvasir.engine.reach import UnreachableError, check_reach
from kvasir.engine.remote_grammars import RemoteGrammars
from kvasir.engine.step import Result, Step
from kvasir.engine.tiers import Tiers
from kvasir.engine.warm_up import warm_up, warm_up_vectors

LOCALHOST = "127.0.0.1"
ABORT_S = 1.0
"""So long it is waited for what a group that is given up has on its device: a kernel that waits for another rank may never end."""


class Executor(Protocol):
    """`launch` steps, and `collect` their results in the same order. At most `depth` are executed at once: a step begins when
    the `depth`-th before it is over. Launching more costs nobody any time."""

    loaded: Loaded
    depth: int
    ahead: bool
    """One step more is planned and launched before a result is awaited. On a CPU without stages that costs more than it hides:
    two threads share the cores, and who comes meanwhile waits for a step more."""
    grammars: GrammarSource
    """Compiled where tokens are sampled."""
    fetched: queue.SimpleQueue[tuple[int, int]]
    """(ticket, count): what a rank has read of what a step's fetch asked for."""
    rank: Rank
    """The one of this process."""

    def serve_blocks(self, host: str, secret: str, on_ask: OnAsk) -> tuple[Exchange, list[str]] | None:
        """Before the first step: exchange blocks with other groups -> (rank 0's part, where each rank lends). None: the
        configuration doesn't let it."""

    def launch(self, step: Step) -> None: ...
    def collect(self) -> Result: ...
    def close(self) -> None: ...


class Lane:
    """Executes steps one after another; after an error it does nothing more, and everybody who collects gets the error.
    apart: in a thread of its own, that begins with the first step; else `launch` executes."""

    def __init__(self, execute: Callable[[Step], Outcome | None], *, apart: bool) -> None:
        self._execute = execute
        """None: somebody else `put`s the result."""
        self._apart = apart
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Outcome | Result | BaseException] = queue.SimpleQueue()
        self._closing = False
        self._thread: threading.Thread | None = None

    def launch(self, step: Step) -> None:
        if not self._apart:
            self._do(step)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kvasir-rank", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def collect(self) -> Result:
        found = self._done.get()
        if isinstance(found, BaseException):
            self._done.put(found)
            raise found
        return found if isinstance(found, Result) else found.result()

    def put(self, result: Outcome | Result | BaseException) -> None:
        """Any thread, in the order of the steps."""
        self._done.put(result)

    def close(self, limit_s: float | None = None) -> None:
        """Wait for the step that is being executed; those behind it never are, and who waits for one is told."""
        self._closing = True
        self._steps.put(None)
        if self._thread is not None:
            self._thread.join(limit_s)
        self._done.put(UnavailableError("the engine was shut down"))

    def _work(self) -> None:
        while (step := self._steps.get()) is not None and not self._closing and self._do(step):
            pass

    def _do(self, step: Step) -> bool:
        """False: it failed."""
        try:
            outcome = self._execute(step)
        except BaseException as error:  # the thread's border: who collects raises it
            self.put(error)
            return False
        if outcome is not None:
            self.put(outcome)
        return True


class LocalExecutor:
    """One rank: this process."""

    depth = 1

    def __init__(self, config: EngineConfig, loaded: Loaded) -> None:
        self.loaded, grammars = loaded, grammars_of(loaded)
        self.grammars: GrammarSource = grammars
        self.rank = rank_of(config, loaded, grammars)
        self.fetched: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        if loaded.tiers is not None:
            loaded.tiers.on_fetched = lambda *said: self.fetched.put(said)
        self.ahead = loaded.decoder.device.type != "cpu"
        self._lane = Lane(lambda step: self.rank.launch(step), apart=self.ahead)

    def serve_blocks(self, host: str, secret: str, on_ask: OnAsk) -> tuple[Exchange, list[str]] | None:
        exchange = self.rank.exchange = self.loaded.exchange()
        if exchange is None:
            return None
        exchange.puller.on_fetched = lambda *said: self.fetched.put(said)
        return exchange, [exchange.listen(host, secret, on_ask)]

    def launch(self, step: Step) -> None:
        self._lane.launch(step)

    def collect(self) -> Result:
        return self._lane.collect()

    def close(self) -> None:
        self._lane.close()
        if self.rank.exchange is not None:
            self.rank.exchange.close()
        if self.loaded.tiers is not None:
            self.loaded.tiers.close()


class GroupExecutor:
    """Rank 0 of several: this process. The others connect to `hub`; `kill` ends them at once, whatever they do."""

    def __init__(self, config: EngineConfig, hub: Hub, kill: Callable[[], None], *, own_gpus: bool) -> None:
        self._config, self._hub, self._kill = config, hub, kill
        self._mesh = Mesh()
        self._tiers: Tiers | None = None
        self.ahead = config.pipeline_parallel_size > 1 or resolve_device(config, 0).type != "cpu"
        self._lane = Lane(self._execute, apart=self.ahead)
        self._arrived: queue.SimpleQueue[Outcome | Result | BaseException] = queue.SimpleQueue()
        hub.on_failure = self._free
        try:
            self._mesh = _meet(config, hub, own_gpus)
            self._mesh.assemble = hub.assemble
            self.loaded = load(config, self._mesh)
            grammars = grammars_of(self.loaded)
            self.rank = rank_of(config, self.loaded, grammars)
            self.grammars: GrammarSource = grammars
            self.fetched = hub.fetched
            self._tiers = self.loaded.tiers
            if self._tiers is not None:
                self._tiers.on_fetched = lambda *said: hub.fetched.put(said)
            hub.all_ready()
        except RuntimeError as error:  # torch's, when another rank is gone
            verdict = hub.verdict(_symptom(error, config))
            self.close()
            raise verdict from error
        except Exception:
            self.close()
            raise
        self.depth = config.pipeline_parallel_size
        self._samples = self.rank.place.samples
        self._unknown = 0
        """Steps that were begun and whose results this rank hasn't learnt."""
        self._landing: set[int] = set()
        """Steps behind which each rank says what of a peer's blocks didn't come in time."""
        self._launching: float | None = None
        """Since when this rank launches a step."""
        self._handed_on = self._answered = 0
        self._moved = time.monotonic()
        """When the last step was handed on, or answered: the next stage's exchanges with this rank don't wait for it."""
        hub.overdue = self._overdue
        if not self._samples:
            sampling = (config.pipeline_parallel_size - 1) * config.tensor_parallel_size
            remote = self.grammars = RemoteGrammars(self.grammars.words, lambda frame: hub.grammar(sampling, frame))
            hub.on_grammar, hub.on_result = remote.told, self._receive

    def serve_blocks(self, host: str, secret: str, on_ask: OnAsk) -> tuple[Exchange, list[str]] | None:
        others = self._hub.serve(host, secret)
        exchange = self.rank.exchange = self.loaded.exchange()
        if exchange is None or not all(others):
            return None
        exchange.puller.on_fetched = lambda *said: self._hub.fetched.put(said)
        return exchange, [exchange.listen(host, secret, on_ask), *others]

    def launch(self, step: Step) -> None:
        if _lands(step):
            self._landing.add(step.id)
        self._lane.launch(step)

    def collect(self) -> Result:
        try:
            result = self._lane.collect()
        except RuntimeError as error:
            raise self._hub.verdict(_symptom(error, self._config)) from error
        if result.step in self._landing:
            self._landing.discard(result.step)
            result = replace(result, spoiled=sorted(self._hub.spoiled()))
        return result

    def close(self) -> None:
        self._lane.close(None if self._hub.failure is None else ABORT_S)
        self._hub.close()
        if (rank := getattr(self, "rank", None)) is not None:
            rank.forward = rank.decoder  # NCCL waits for the end of graphs that have recorded its exchanges
            if rank.exchange is not None:
                rank.exchange.close()
        if self._tiers is not None:
            self._tiers.close()  # meanwhile the others write what they have left
        self._kill()
        _apart(self._mesh.close)

    def _execute(self, step: Step) -> Outcome | None:
        """What the lane does. Others hear what was sampled where it is known; before they get a step that follows it, if it
        doesn't reach the device of those who need it."""
        news: list[Result] = []
        while (not self.rank.lags and self._unknown == self.depth) or not self._arrived.empty():
            news.append(self._learn(self._arrived.get()))
        self._hub.step(encode_step(step, news))
        self._unknown += 1
        self._launching = time.monotonic()
        outcome = self.rank.launch(step)
        self._launching = None
        if _lands(step):
            self._hub.spoil(outcome.spoiled)
        if not self._samples:
            self._moved, self._handed_on = time.monotonic(), self._handed_on + 1
            return None
        if not self.rank.promises:
            self._arrived.put(outcome)
        return outcome

    def _learn(self, found: Outcome | Result | BaseException) -> Result:
        if isinstance(found, BaseException):
            raise found
        self._unknown -= 1
        sampled = Result(found.step, found.token_ids)
        self.rank.learn(sampled.step, sampled.token_ids)
        return sampled

    def _receive(self, frame: bytes) -> None:
        """Where another rank samples, in the hub's thread: a step's result."""
        try:
            result: Result | BaseException = decode_result(frame)
        except BaseException as error:  # who waits for a result raises it
            result = error
        self._moved, self._answered = time.monotonic(), self._answered + 1
        self._arrived.put(result)
        self._lane.put(result)

    def _overdue(self) -> str | None:
        """A step that this rank is done with has no result: a later stage hangs. Or it is never done with one: a launch waits
        for nothing but the device, whose kernels wait for another rank's, or is computed on a CPU, for which the next stage
        waits no longer either. Kernels were warmed up, so it waits for no compiler; a CPU's sums have their own limits."""
        since = self._moved if self._handed_on > self._answered else None
        limited = self.rank.lags or self._config.pipeline_parallel_size > 1
        if limited and (launching := self._launching) is not None:
            since = launching
        late = since is not None and time.monotonic() - since > self._config.collective_timeout
        return hangs(self._config) if late else None

    def _free(self) -> None:
        """The group failed: whoever waits for the rank that is gone, this process included, gets an error."""
        if self._hub.failure is not None:
            self._arrived.put(self._hub.failure)
            self._lane.put(self._hub.failure)
        self._kill()
        _apart(self._mesh.abort)


def executor_of(config: EngineConfig) -> Executor:
    """All ranks on this node. ConfigError and RankError say what is wrong."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"--data-parallel-size {config.data_parallel_size}: copies of a model are groups of `kvasir serve`; an engine in"
            " this process is one",
            param="data_parallel_size",
        )
    if config.distributed_executor_backend == "ray":
        raise ConfigError(
            "--distributed-executor-backend ray needs `kvasir serve`; an engine in this process runs its ranks with mp",
            param="distributed_executor_backend",
        )
    if config.ranks == 1:
        return LocalExecutor(config, load(config))
    check_ranks(config)
    started: list[Processes] = []
    hub = Hub(LOCALHOST, config.ranks, ended=lambda rank: started[0].ended(rank) if started else None)
    started.append(Processes(config, hub.address, hub.token))
    return GroupExecutor(config, hub, started[0].kill, own_gpus=False)


def remote_executor(config: EngineConfig, hub: Hub) -> Executor:
    """Rank 0 of ranks that somebody else starts, when `check_ranks` says that they can be, and ends, each where it sees its own
    GPU alone."""
    return GroupExecutor(config, hub, lambda: None, own_gpus=True)


def grammars_of(loaded: Loaded) -> Grammars:
    """Of the model's vocabulary."""
    return Grammars(loaded.tokenizer, loaded.info.vocab_size, loaded.info.eos_token_ids)


def rank_of(config: EngineConfig, loaded: Loaded, grammars: Grammars) -> Rank:
    """The rank of this process."""
    rank = Rank(
        loaded.decoder,
        loaded.cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=loaded.info.max_model_len,
        pooler=loaded.pooler,
        grammars=grammars,
        tiers=loaded.tiers,
        processors=Processors(config.logits_processors),
    )
    rank.forward = graphs_of(config, loaded.decoder, loaded.cache, loaded.info.max_model_len)
    if loaded.decoder.device.type != "cpu" and isinstance(loaded.decoder, Decoder):
        given = loaded.decoder, loaded.cache, loaded.info.max_model_len
        if "generate" in loaded.info.tasks:
            warm_up(*given)
        elif loaded.pooler is not None:
            warm_up_vectors(*given, loaded.pooler)
    return rank


def places(config: EngineConfig, hosts: Mapping[int, str], *, own_gpus: bool) -> list[Place]:
    """Every rank's place. own_gpus: each process sees its GPU alone, as number 0."""
    on = Counter(hosts.values())
    seen: Counter[str] = Counter()
    found = []
    for rank in range(config.ranks):
        host = hosts[rank]
        index = 0 if own_gpus else seen[host]
        seen[host] += 1
        sizes = {"tp": config.tensor_parallel_size, "pp": config.pipeline_parallel_size}
        found.append(Place(rank=rank, local_ranks=on[host], device_index=index, **sizes))
    return found


def _meet(config: EngineConfig, hub: Hub, own_gpus: bool) -> Mesh:
    """Rank 0's place among those that have connected."""
    timeout = config.collective_timeout
    found = places(config, hub.meet(timeout), own_gpus=own_gpus)
    hub.all_awake()
    store, port = host_store(hub.host, config.ranks, timeout)
    for place in found[1:]:
        said = {name: getattr(place, name) for name in ("tp", "pp", "local_ranks", "device_index")}
        hub.welcome(place.rank, {"place": said, "store": [hub.host, port]})
    device, one_shot = resolve_device(config, found[0].device_index), not config.disable_custom_all_reduce
    try:
        check_reach(store, found[0], hub.host, timeout, going=hub.check)
    except UnreachableError as error:
        raise RankError(str(error)) from error
    return join(found[0], store, device, hub.host, timeout, hub.token, one_shot=one_shot)


def _apart(work: Callable[[], None]) -> None:
    """In a thread that nobody waits for longer than ABORT_S."""
    thread = threading.Thread(target=work, name="kvasir-abort", daemon=True)
    thread.start()
    thread.join(ABORT_S)


def _lands(step: Step) -> bool:
    return step.moves is not None and bool(step.moves.landing)


def _symptom(error: RuntimeError, config: EngineConfig) -> str:
    if "timed out" in str(error).lower():
        return hangs(config)
    return f"rank 0 failed: {type(error).__name__}: {error}"


def hangs(config: EngineConfig) -> str:
    """What to say of an exchange that was given up."""
    limit = config.collective_timeout
    return f"an exchange between ranks took longer than {limit:g} s (--collective-timeout): a rank or a link hangs"
