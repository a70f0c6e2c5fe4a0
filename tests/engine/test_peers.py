"""Groups that fetch blocks from each other: the same tokens, whatever the layouts, and whatever happens to the peer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from small_models import FAMILIES
from waiting import until

from kvasir.engine.blocks import chain_start, token_bytes
from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.errors import ConfigError
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.hub import locate
from kvasir.engine.layout import LayerGroup
from kvasir.engine.nixl_channel import agent
from kvasir.engine.parts import Part
from kvasir.engine.peer_wire import LENGTHS, Ask, Get, encode_ask, encode_get, greet
from kvasir.engine.prices import Prices
from kvasir.engine.request import Peer, Request, SamplingParams
from kvasir.engine.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [random.Random(2).randrange(3, 90) for _ in range(150)]


class Group:
    """An engine that lends and fetches."""

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.events: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
        base = {"dtype": "float32", "num_threads": 1, "block_size": 8, "skip_tokenizer_init": True, "max_num_seqs": 8}
        base |= {"kv_cache_memory_bytes": 1 << 21, "max_num_batched_tokens": 48}
        self.engine = Engine(EngineConfig(model=str(model), **{**base, **options}), self.events.put)
        self.address, self.secret = self.engine.serve_blocks("127.0.0.1")
        self.engine.start()
        self._names = iter(range(10**6))

    def peer(self, tokens: int = 10**6, address: str = "") -> Peer:
        return Peer(address or self.address, self.secret, tokens, ordered=True)

    def ask(self, prompt: Sequence[int] = PROMPT, *peers: Peer, **more: Any) -> tuple[list[int], int]:
        """(tokens, how many of the prompt's were cached)"""
        name, tokens = str(next(self._names)), list[int]()
        request = Request(request_id=name, prompt_token_ids=prompt, sampling=GREEDY, peers=peers, **more)
        self.engine.submit(request)
        while True:
            for event in self.events.get(timeout=60):
                assert not isinstance(event, Failed), event
                if isinstance(event, Token):
                    tokens += event.token_ids
                elif isinstance(event, Finished):
                    assert self.engine.pool.check() == []
                    return tokens, event.cached_tokens

    def collect(self, *names: str) -> dict[str, list[int]]:
        """The tokens of requests that were submitted, when they have ended."""
        found, left = {name: list[int]() for name in names}, {*names}
        while left:
            for event in self.events.get(timeout=60):
                assert not isinstance(event, Failed), event
                if isinstance(event, Token):
                    found[event.request_id] += event.token_ids
                elif isinstance(event, Finished):
                    left.discard(event.request_id)
        assert self.engine.pool.check() == []
        return found

    def stats(self) -> Any:
        return self.engine.stats()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Group]]:
    monkeypatch.setattr("kvasir.engine.prices.LIMIT_S", (60.0, 60.0))  # a busy machine is no slow peer
    with contextlib.ExitStack() as stack:

        def make(model: str | Path, **options: Any) -> Group:
            found = Group(model, **options)
            stack.callback(found.engine.shutdown)
            return found

        yield make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks wait for layers as long as it takes, those in processes of their own, too."""
    monkeypatch.setattr("kvasir.engine.arrivals.LATE_S", 60.0)
    (tmp_path / "sitecustomize.py").write_text("from kvasir.engine import arrivals\n\narrivals.LATE_S = 60.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., tuple[Path, Any]]) -> Path:
    return checkpoint("Llama")[0]


@pytest.mark.parametrize("way", ["auto", "shm", "tcp", "gloo", "nixl"])
def test_blocks_come_from_a_peer(llama: Path, group: Callable[..., Group], way: str) -> None:
    if way == "nixl":
        pytest.importorskip("nixl")
    one, other = group(llama, kv_transfer=way), group(llama, kv_transfer=way)
    cold = one.ask()
    assert cold[1] == 0
    assert other.ask(PROMPT, one.peer()) == (cold[0], 144)
    assert other.engine._pulls.loaded == 18


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "blocks of 32": {"block_size": 32},
}


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")])
def test_every_layout_to_every_layout(
    data: Callable[[str], Path],
    group: Callable[..., Group],
    dtype: str,
    kept: str,
    patient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks, stages and block sizes: what one group has computed the other takes, in one piece or layer by layer, and says
    the same; and it goes on with a stream that moves to it."""
    monkeypatch.setattr(Prices, "step_s", lambda self, tokens: 1000.0)
    for name in ("LEAST_SLAB", "LEAST_PIECE"):
        monkeypatch.setattr(f"kvasir.engine.lends.{name}", 1)
    known = json.loads((data("model-stories260k") / "greedy_256.json").read_text())
    prompt = known["greedy_ids"][:200]
    model = data("model-stories260k") / "hf"
    types = {"dtype": dtype, "kv_cache_dtype": kept, "block_size": 16}
    groups = {name: group(model, **{**types, **more}) for name, more in LAYOUTS.items()}
    for one, lender in groups.items():
        for other, borrower in groups.items():
            salt = f"{one} to {other}"
            cold, _ = lender.ask(prompt, cache_salt=salt)
            assert dtype != "float32" or cold == known["greedy_ids"][200:212]
            for layered in (True, False):
                monkeypatch.setattr(Prices, "layers_pay", lambda self, layered=layered: layered)
                if borrower is not lender:
                    borrower.engine.pool.reset()
                tokens, cached = borrower.ask(prompt, lender.peer(), cache_salt=salt)
                assert (salt, tokens, cached) == (salt, cold, 192)
            if borrower is not lender:
                borrower.engine.pool.reset()
            moved = borrower.ask(prompt, lender.peer(), cache_salt=salt, resume_token_ids=cold[:5])
            assert (salt, *moved) == (salt, cold[5:], 192)


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_from_every_layout_s_tiers_and_computed_again_in_every_layout(
    data: Callable[[str], Path], group: Callable[..., Group], kept: str, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lender has below its cache alone comes, too, and then from the borrower's own tiers; of what is damaged on the way
    all that follows is computed."""
    monkeypatch.setattr("kvasir.engine.prices.WARY_S", 0.0)
    known = json.loads((data("model-stories260k") / "greedy_256.json").read_text())
    prompt, more = known["greedy_ids"][:200], {"kv_offloading_size": 0.02, "kv_transfer": "tcp"}
    model, types = data("model-stories260k") / "hf", {"dtype": "bfloat16", "kv_cache_dtype": kept, "block_size": 16}
    groups = {name: group(model, **{**types, **LAYOUTS[name], **more}) for name in ("tp1", "tp2", "pp2")}
    alone = {name: each.ask(prompt, cache_salt="alone")[0] for name, each in groups.items()}
    for (one, lender), (other, borrower) in permutations(groups.items(), 2):
        salt, held = f"{one} to {other}", [each.stats().host_stored for each in (lender, borrower)]
        cold, _ = lender.ask(prompt, cache_salt=salt)
        assert (salt, cold) == (salt, alone[one])
        forget(lender, held[0] + 13)
        assert (salt, *borrower.ask(prompt, lender.peer(), cache_salt=salt)) == (salt, cold, 192)
        forget(borrower, held[1] + 13)
        before = borrower.stats().peer_loaded
        assert (salt, *borrower.ask(prompt, cache_salt=salt)) == (salt, cold, 192)
        assert borrower.stats().peer_loaded == before
        lender.ask(prompt, cache_salt=f"{salt} again")
        proxy = Proxy(lender.address, 4000, "garble")
        again = borrower.ask(prompt, lender.peer(address=proxy.address), cache_salt=f"{salt} again")
        assert (salt, again[0]) == (salt, alone[other])
        assert again[1] < 192
        proxy.close()
    for each in groups.values():
        until(lambda each=each: idle_later(each))  # type: ignore[misc]


def forget(found: Group, stored: int) -> None:
    """All that its cache holds, once so many blocks have been written to host memory."""
    until(lambda: found.stats().host_stored >= stored)
    found.engine.pool.reset()


def test_skald_says_the_same(group: Callable[..., Group]) -> None:
    """A trained model in its own type, on text: blocks of 16 for one of 32."""
    one, two = (
        group("skald", dtype="auto", block_size=size, max_model_len=1024, kv_cache_memory_bytes=1 << 24)
        for size in (16, 32)
    )
    with open(__file__, encoding="utf-8") as file:
        prompt = Tokenizer.load(locate("skald")).encode(file.read())[:500]
    cold, _ = one.ask(prompt)
    assert two.ask(prompt, one.peer()) == (cold, 480)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer(
    family: str, checkpoint: Callable[..., tuple[Path, Any]], group: Callable[..., Group]
) -> None:
    """Windows, groups of layers, latent attention, between blocks of 8 and of 16 tokens, by two ranks and one."""
    folder, _ = checkpoint(family, **FAMILIES[family])
    one, two = group(folder), group(folder, block_size=16, pipeline_parallel_size=2)
    for number, (lender, borrower) in enumerate(((one, two), (two, one))):
        for length in (150, 100):
            prompt = [number + 5, *PROMPT[1:length]]
            cold, _ = lender.ask(prompt, cache_salt=str(length))
            tokens, cached = borrower.ask(prompt, lender.peer(), cache_salt=str(length))
            assert (tokens, cached) == (cold, length // 16 * 16)


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_caches_in_8_bits(llama: Path, group: Callable[..., Group], kept: str) -> None:
    one, two = group(llama, kv_cache_dtype=kept), group(llama, kv_cache_dtype=kept, block_size=16)
    cold, _ = one.ask()
    assert two.ask(PROMPT, one.peer()) == (cold, 144)
    other = group(llama)
    assert other.ask(PROMPT, one.peer())[1] == 0  # it keeps other bytes


# -- whatever happens to the peer: time, not answers


class Proxy:
    """Hands on what goes through it, `after` so many bytes towards who fetches in its own way."""

    def __init__(self, target: str, after: int, how: str) -> None:
        self._target, self._after, self._how = target, after, how
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = self.stopped = 0
        """How many came, and how many got so far."""
        self.reached = threading.Event()
        """The first to get so far."""
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                host, port = self._target.split(":")
                far = socket.create_connection((host, int(port)))
                self._sockets += (near, far)
                threading.Thread(target=self._pump, args=(near, far, 1 << 60), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, self._after), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, after: int) -> None:
        stopped = False
        with contextlib.suppress(OSError):
            while data := source.recv(1000):
                after -= len(data)
                if after < 0:
                    self.stopped += not stopped
                    stopped = True
                    self.reached.set()
                    if self._how == "stop":
                        continue
                    if self._how == "cut":
                        break
                    if self._how == "garble":
                        data, after = bytes(byte ^ 1 for byte in data), 1 << 60
                    if self._how == "slow":
                        time.sleep(0.05)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def idle(found: Group) -> bool:
    """Nothing is on its way, in no thread."""
    exchange = found.engine._exchange
    assert exchange is not None
    lender, puller = exchange.lender, exchange.puller
    busy = (puller._running, lender._lends, lender._connections, lender._bytes, found.engine._scheduler.lends._open)
    return not any(busy) and not found.engine.pool.num_used


def timer(over: Callable[[], bool]) -> type[threading.Timer]:
    """Timers whose time is over when that is true."""

    class Timer(threading.Timer):
        def run(self) -> None:
            until(lambda: self.finished.is_set() or over())
            if not self.finished.is_set():
                self.function(*self.args, **self.kwargs)

    return Timer


def idle_later(found: Group) -> bool:
    """Idle, once nobody has begun in time with what it lends."""
    assert found.engine._exchange is not None
    lender = found.engine._exchange.lender
    with lender._changed:
        for lend in lender._lends.values():
            lend.until = 0.0
    return idle(found)


@pytest.mark.parametrize("how", ["stop", "cut", "garble", "slow"])
@pytest.mark.parametrize("after", [0, 20_000])
def test_a_link_that_breaks(
    llama: Path, group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch, how: str, after: int
) -> None:
    """Answers are the same and don't come much later; a peer that failed is left alone for a while."""
    monkeypatch.setattr("kvasir.engine.prices.LIMIT_S", (60.0, 60.0))
    monkeypatch.setattr("kvasir.engine.lender.BEGIN_S", 60.0)
    one, two = group(llama, kv_transfer="tcp"), group(llama, kv_transfer="tcp")
    cold, _ = one.ask()
    proxy = Proxy(one.address, after, how)
    assert two.engine._exchange is not None
    pulls = two.engine._exchange.puller._running

    def bad() -> bool:
        return how in ("stop", "slow") and proxy.reached.is_set() and any(one.connections for one in [*pulls.values()])

    monkeypatch.setattr("threading.Timer", timer(bad))
    tokens, cached = two.ask(PROMPT, one.peer(address=proxy.address))
    assert tokens == cold
    assert proxy.reached.is_set()
    assert cached < 144
    assert how == "slow" or (cached > 0) == (after > 0)
    until(lambda: idle(two))
    asked = proxy.connections
    assert two.ask([*PROMPT[:20], 3, 4], one.peer(address=proxy.address))[0]
    assert proxy.connections == asked
    proxy.close()
    until(lambda: idle_later(one))
    assert after == 0 or two.stats().peer_failed


def test_another_peer_is_asked_when_one_fails(llama: Path, group: Callable[..., Group]) -> None:
    one, two = group(llama), group(llama)
    cold, _ = one.ask()
    closed = socket.create_server(("127.0.0.1", 0))
    nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    assert two.ask(PROMPT, one.peer(address=nobody), one.peer()) == (cold, 144)


def test_a_fetch_ends_with_its_request(llama: Path, group: Callable[..., Group]) -> None:
    one, two = group(llama, kv_transfer="tcp"), group(llama, kv_transfer="tcp")
    one.ask()
    proxy = Proxy(one.address, 20_000, "stop")
    request = Request(
        request_id="x", prompt_token_ids=PROMPT, sampling=GREEDY, peers=(one.peer(address=proxy.address),)
    )
    two.engine.submit(request)
    assert proxy.reached.wait(60)
    two.engine.abort("x")
    until(lambda: idle(two))
    until(lambda: idle(one))
    proxy.close()


PEER = """
import json, sys
from pathlib import Path
from tests.engine.test_peers import Group, PROMPT
one = Group(sys.argv[1], kv_transfer="tcp")
print(json.dumps([one.address, one.secret, one.ask()[0]]), flush=True)
sys.stdin.read()
"""


def test_a_peer_that_is_killed_while_it_sends(llama: Path, group: Callable[..., Group]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])}
    command = [sys.executable, "-c", PEER, str(llama)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        address, secret, cold = json.loads(process.stdout.readline())
        proxy = Proxy(address, 20_000, "stop")
        two = group(llama, kv_transfer="tcp")
        killer = threading.Thread(target=lambda: proxy.reached.wait(60) and process.kill())
        killer.start()
        tokens, cached = two.ask(PROMPT, Peer(proxy.address, secret, 10**6, ordered=True))
        killer.join()
        assert (tokens, cached < 144) == (cold, True)
        proxy.close()
    until(lambda: idle(two))


def test_a_way_that_is_not_there_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    agent.cache_clear()
    with pytest.raises(ConfigError, match=r"kvasir\[nixl\]"):
        Group(llama, kv_transfer="nixl")
    with pytest.raises(ConfigError, match="is for GPUs"):
        Group(llama, kv_transfer="nccl")


def test_refusals(
    llama: Path,
    checkpoint: Callable[..., tuple[Path, Any]],
    group: Callable[..., Group],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told in words, and no reason to leave the peer alone."""
    one, two = group(llama), group(llama)
    cold, _ = one.ask()
    assert two.ask(PROMPT, Peer(one.address, "wrong", 10**6, ordered=True)) == (cold, 0)
    three = group(llama, kv_transfer="gloo")
    assert three.ask(PROMPT, one.peer()) == (cold, 0)  # no way in common
    monkeypatch.setattr("kvasir.engine.lends.MOST_LENDS", 0)
    assert group(llama).ask(PROMPT, one.peer()) == (cold, 0)
    monkeypatch.undo()
    again = group(llama)
    assert again.ask([9, *PROMPT], one.peer())[1] == 0  # it hasn't got that
    assert again.ask(PROMPT, one.peer()) == (cold, 144)
    other = group(checkpoint("Llama", rms_norm_eps=0.1)[0])
    assert other.ask(PROMPT, one.peer())[1] == 0
    off = Group(llama, kv_transfer="off")
    assert (off.address, off.secret) == ("", "")
    off.engine.shutdown()
    one.engine.shutdown()
    assert again.ask([3, *PROMPT[:100]], one.peer())[1] == 0


def test_the_server_takes_any_bytes(llama: Path, group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of strangers, and of who knows the secret and says nonsense."""
    monkeypatch.setattr("kvasir.engine.lender.SLOW_S", 0.2)
    one, two = group(llama), group(llama)
    cold, _ = one.ask()
    draw = random.Random(5)
    exchange, info = one.engine._exchange, one.engine.info
    assert exchange is not None
    chain = chain_start(info.salt, "", None, stretched=False)
    ask, tokens = encode_ask(an_ask(mark=exchange._mark, chain=chain, tokens=token_bytes(PROMPT)))
    get = encode_get(Get(1, Part(range(2), range(2)), 3, "tcp"))
    for number in range(300):
        host, port = one.address.split(":")
        with socket.create_connection((host, int(port)), 5) as connection, contextlib.suppress(OSError):
            if number % 3:
                greet(connection, one.secret)
            if number % 3 == 2:
                text = json.dumps(mangled(draw, draw.choice([ask, get]))).encode()
                connection.sendall(LENGTHS.pack(len(text), len(tokens)) + text + tokens)
            else:
                connection.sendall(draw.randbytes(draw.choice([1, 8, 40, 500])))
    assert two.ask(PROMPT, one.peer()) == (cold, 144)
    until(lambda: idle(one))
    assert one.engine.failure is None


def an_ask(**changes: Any) -> Ask:
    group = (LayerGroup((0, 1)),)
    said = {"fetch": "f", "mark": b"m", "chain": b"c", "tokens": bytes(400), "block_size": 8, "first": 0, "end": 96}
    said |= {"groups": group, "readers": (Part(range(2), range(2)),), "ways": ("tcp",), "node": ""}
    return Ask(**{**said, **changes})


def mangled(draw: random.Random, said: Any) -> Any:
    """The same with something changed somewhere."""
    odd: list[Any] = [None, -1, 0, 1, 2**70, 1.5, "", "x" * 400, [], {}, [[]], True]
    if isinstance(said, (dict, list, tuple)) and said and draw.random() < 0.8:
        keys = [*said] if isinstance(said, dict) else [*range(len(said))]
        chosen = draw.choice(keys)
        pairs = {key: mangled(draw, said[key]) if key == chosen else said[key] for key in keys}
        return pairs if isinstance(said, dict) else [*pairs.values()]
    return draw.choice(odd)


# -- tiers, and what is full


def test_a_peers_disk_and_ours(llama: Path, group: Callable[..., Group], tmp_path: Path) -> None:
    """What the peer has on its disk alone comes as well, and what came is on ours."""
    one = group(llama, kv_disk_path=str(tmp_path / "one"))
    cold, _ = one.ask()
    until(lambda: one.stats().disk_stored >= 20)
    one.engine.pool.reset()
    two = group(llama, kv_disk_path=str(tmp_path / "two"))
    assert two.ask(PROMPT, one.peer()) == (cold, 144)
    until(lambda: one.stats().disk_loaded >= 18)
    until(lambda: two.stats().disk_stored >= 19)
    two.engine.pool.reset()
    assert two.ask() == (cold, 144)
    assert two.stats().peer_loaded == 18


def test_lending_gives_way(llama: Path, group: Callable[..., Group]) -> None:
    """A peer whose cache is full of running sequences computes on; who asked computes too, or gets what it can."""
    small = {"kv_cache_memory_bytes": 300_000, "max_model_len": 200}
    one, two = group(llama, **small), group(llama, **small)
    prompts = [[10 + i, *PROMPT[i : i + 140]] for i in range(6)]
    cold = [one.ask(prompt)[0] for prompt in prompts]
    for prompt, wanted in [*zip(prompts, cold, strict=True)] * 2:
        running = Request(request_id=str(random.random()), prompt_token_ids=prompts[0], sampling=GREEDY)
        one.engine.submit(running)
        assert two.ask(prompt, one.peer())[0] == wanted
        until(lambda: not one.engine.stats().running)
    until(lambda: idle(one) and idle(two))
    assert one.engine.pool.check() == two.engine.pool.check() == []


def test_layers_come_one_by_one_where_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what fetches and the steps behind them took; what wasn't tried lately is tried."""
    prices, now = Prices(1000.0), 1000.0
    monkeypatch.setattr("kvasir.engine.prices.time.monotonic", lambda: now)
    assert prices.layers_pay()
    prices.stepped(True, 1.0, 0.8)
    assert not prices.layers_pay()  # the other way now
    prices.stepped(False, 2.0, 2.0)
    assert prices.layers_pay()
    for _ in range(4):
        prices.stepped(True, 1.0, 1.5)
    assert not prices.layers_pay()
    now += 61
    assert prices.layers_pay()


def test_it_is_fetched_when_that_pays() -> None:
    prices = Prices(1000.0)
    assert prices.pays("a", 100)  # never measured: tried
    prices.computed(1000, 1.0)
    assert prices.pays("a", 100)
    prices.fetched("a", 100, 0.5, 0.1)  # half a second, and a million bytes per second behind
    assert not prices.pays("a", 100)
    assert not prices.pays("a", 100_000)
    prices.fetched("b", 100, 0.001, 0.0001)
    assert prices.pays("b", 100)
    assert not prices.pays("b", 1)
    assert prices.limit_s(1000) == 2.0
    assert prices.limit_s(10) == 0.5
    prices.failed("b")
    assert not prices.may_ask("b")
    assert prices.may_ask("a")
    said = prices.counts()
    assert said["peer_bytes"] == 200_000
    assert prices.fetch_s("b", 100) == pytest.approx(0.0011)
    assert prices.fetch_s("c", 0) == said["fetch_floor_s"]
    assert 0 < said["fetch_floor_s"] < 0.5
