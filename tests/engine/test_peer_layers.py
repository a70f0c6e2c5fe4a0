"""A step that begins on the first layers of a peer's blocks: the same tokens, whatever becomes of the layers behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from waiting import until

from kvasir.engine.arrivals import Arrivals
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.prices import Prices
from kvasir.engine.puller import is_in_time
from kvasir.engine.request import Peer, Request
from tests.engine.test_peers import GREEDY, PEER, PROMPT, Group, Proxy, group, idle, idle_later

__all__ = ["group"]
LAYERS = 8


@pytest.fixture(scope="module")
def deep(checkpoint: Callable[..., tuple[Path, Any]]) -> Path:
    return checkpoint("Llama", num_hidden_layers=LAYERS)[0]


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tickets of fetches on whose first layers a step began; all do."""
    found: list[int] = []
    begin = Arrivals.begin

    def noted(self: Arrivals, ticket: int, *more: Any) -> None:
        found.append(ticket)
        begin(self, ticket, *more)

    monkeypatch.setattr(Arrivals, "begin", noted)
    monkeypatch.setattr(Prices, "step_s", lambda self, tokens: 1000.0)
    monkeypatch.setattr("kvasir.engine.lends.LEAST_SLAB", 1)
    monkeypatch.setattr("kvasir.engine.lends.LEAST_PIECE", 1)
    monkeypatch.setattr("kvasir.engine.arrivals.LATE_S", 60.0)
    monkeypatch.setattr("kvasir.engine.prices.LIMIT_S", (60.0, 60.0))
    monkeypatch.setattr("kvasir.engine.lender.BEGIN_S", 60.0)
    return found


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("tcp", {}),
    "bfloat16": ("shm", {"dtype": "bfloat16"}),
    "fp8": ("tcp", {"kv_cache_dtype": "fp8"}),
    "blocks of 16": ("shm", {"block_size": 16}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_layer_by_layer(deep: Path, group: Callable[..., Group], begun: list[int], case: str) -> None:
    way, options = OPTIONS[case]
    lent = {name: value for name, value in options.items() if name != "block_size"}
    one, two = group(deep, kv_transfer=way, **lent), group(deep, kv_transfer=way, **options)
    cold, _ = one.ask()
    assert two.ask(PROMPT, one.peer()) == (cold, 144)
    assert begun
    assert two.ask(PROMPT) == (cold, 144)
    until(lambda: idle(one) and idle(two))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_between_several_ranks(
    deep: Path,
    group: Callable[..., Group],
    begun: list[int],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    """Whole, then with the link of one rank that breaks between two layers: the others had theirs, and all compute it again;
    who streams in the same step gets its own tokens."""
    monkeypatch.setattr("kvasir.engine.prices.WARY_S", 0.0)
    monkeypatch.setattr("kvasir.engine.arrivals.LATE_S", 0.25)
    one, two = (group(deep, kv_transfer="tcp", **LAYOUTS[layout]) for _ in range(2))
    assert one.engine._exchange is not None
    lends, size = one.engine._scheduler.lends, one.engine._exchange.form.block_bytes * 18
    assert lends._terms is not None
    terms, other = lends._terms, [9, *PROMPT[:40]]
    streamed, _ = two.ask(other)
    for rank, how in product((0, 1), ("stop", "cut", "garble")):
        salt, failed = f"{how} at {rank}", two.stats().peer_failed
        begun.clear()
        cold, _ = one.ask(cache_salt=salt)
        proxy = Proxy(terms.addresses[rank], size * 3 // 4, how)
        addresses = [proxy.address if number == rank else each for number, each in enumerate(terms.addresses)]
        monkeypatch.setattr(lends, "_terms", replace(terms, addresses=addresses))
        peers = (one.peer(address=addresses[0]),)
        asked = Request(request_id=salt, prompt_token_ids=PROMPT, sampling=GREEDY, peers=peers, cache_salt=salt)
        two.engine.submit(asked)
        assert proxy.reached.wait(60)
        two.engine.submit(Request(request_id="other", prompt_token_ids=other, sampling=GREEDY))
        assert two.collect(salt, "other") == {salt: cold, "other": streamed}
        assert begun
        until(lambda failed=failed: two.stats().peer_failed == failed + 18 and not two.stats().peer_loaded)
        assert two.ask(PROMPT, cache_salt=salt) == (cold, 144)
        proxy.close()
    until(lambda: idle_later(one) and idle(two))


@pytest.mark.parametrize("asked", [1, 4])
def test_more_portions_than_were_asked_for(
    deep: Path, group: Callable[..., Group], begun: list[int], monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """A peer that cuts as it likes isn't believed: what it offers is computed."""
    monkeypatch.setattr("kvasir.engine.puller.MOST_SLABS", asked)
    if asked == 1:
        monkeypatch.setattr(Prices, "step_s", lambda self, tokens: 0.0)
    one, two = group(deep, kv_transfer="tcp"), group(deep, kv_transfer="tcp")
    cold, _ = one.ask()
    monkeypatch.setattr("kvasir.engine.lends._slabs", lambda form, *more: tuple((n, n + 1) for n in range(form.height)))
    assert two.ask(PROMPT, one.peer()) == (cold, 0)
    assert not begun
    until(lambda: two.stats().peer_failed == 18)


@pytest.mark.parametrize("how", ["stop", "cut", "garble", "slow"])
def test_layers_that_do_not_come(
    deep: Path, group: Callable[..., Group], begun: list[int], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What was computed on them is computed again; who streams in the same step gets its own tokens."""
    monkeypatch.setattr("kvasir.engine.lender.BEGIN_S", 0.5)
    monkeypatch.setattr("kvasir.engine.prices.LIMIT_S", (10.0, 10.0))
    monkeypatch.setattr("kvasir.engine.arrivals.LATE_S", 0.25)
    one, two = group(deep, kv_transfer="tcp"), group(deep, kv_transfer="tcp")
    cold, _ = one.ask()
    assert one.engine._exchange is not None
    size = one.engine._exchange.form.block_bytes * 18
    other = [9, *PROMPT[:40]]
    streamed, _ = two.ask(other)
    proxy = Proxy(one.address, size * 3 // 4, how)
    long = Request(request_id="other", prompt_token_ids=other, sampling=GREEDY)
    asked = Request(request_id="x", prompt_token_ids=PROMPT, sampling=GREEDY, peers=(one.peer(address=proxy.address),))
    two.engine.submit(asked)
    assert proxy.reached.wait(60)
    two.engine.submit(long)
    tokens = two.collect("x", "other")
    assert tokens == {"x": cold, "other": streamed}
    assert begun
    until(lambda: two.stats().peer_failed == 18 and not two.stats().peer_loaded)
    assert two.ask(PROMPT)[0] == cold
    proxy.close()
    until(lambda: idle(one) and idle(two))


SLABS = "import kvasir.engine.lends as lends\nlends.LEAST_SLAB = lends.LEAST_PIECE = 1\n"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_peer_that_is_killed_between_two_layers(
    deep: Path, group: Callable[..., Group], begun: list[int], layout: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])}
    command = [sys.executable, "-c", SLABS + PEER, str(deep)]
    two = group(deep, kv_transfer="tcp", **LAYOUTS[layout])
    assert two.engine._exchange is not None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        address, secret, cold = json.loads(process.stdout.readline())
        proxy = Proxy(address, two.engine._exchange.form.block_bytes * 14, "stop")
        ranks = two.engine.config.ranks
        killer = threading.Thread(target=lambda: until(lambda: proxy.stopped == ranks) and process.kill())
        killer.start()
        assert two.ask(PROMPT, Peer(proxy.address, secret, 10**6, ordered=True)) == (cold, 0)
        killer.join()
        proxy.close()
    assert begun
    until(lambda: idle(two))


def test_an_abort_while_layers_come(deep: Path, group: Callable[..., Group], begun: list[int]) -> None:
    one, two = group(deep, kv_transfer="tcp"), group(deep, kv_transfer="tcp")
    cold, _ = one.ask()
    assert one.engine._exchange is not None
    proxy = Proxy(one.address, one.engine._exchange.form.block_bytes * 12, "stop")
    asked = Request(request_id="x", prompt_token_ids=PROMPT, sampling=GREEDY, peers=(one.peer(address=proxy.address),))
    two.engine.submit(asked)
    threading.Thread(target=lambda: proxy.reached.wait(60) and two.engine.abort("x")).start()
    two.collect("x")
    until(lambda: idle(two))
    assert two.ask(PROMPT)[0] == cold
    proxy.close()
    until(lambda: idle(one))


class Late:
    """A puller, and a clock: what is waited for comes after so many seconds."""

    def __init__(self, after_s: float) -> None:
        self.after_s, self.now = after_s, 0.0
        self.meanwhile: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, ticket: int, layer: int, seconds: float) -> bool:
        begun = self.now
        if seconds and self.meanwhile:
            self.meanwhile.pop()()
        self.now = begun + min(seconds, self.after_s)
        return self.after_s <= seconds

    def end(self, ticket: int) -> None: ...


class Ranks:
    """Two ranks whose layers 0 and 1 come late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after_s: float) -> None:
        self.late, self.store = Late(after_s), torch.distributed.HashStore()
        monkeypatch.setattr("kvasir.engine.arrivals.LATE_S", 0.25)
        monkeypatch.setattr("kvasir.engine.arrivals.time", self.late)
        meshes = [Mesh(Place(2, 1, rank), store=self.store) for rank in range(2)]
        layout = SimpleNamespace(groups=[0])
        caches: list[Any] = [
            SimpleNamespace(layout=layout, group_of={0: 0, 1: 0}, awaited=None, put_layer=print) for _ in meshes
        ]
        puller: Any = self.late
        self.arrivals = [Arrivals(cache, puller, (0, 1), mesh) for cache, mesh in zip(caches, meshes, strict=True)]

    def begin(self) -> None:
        for each in self.arrivals:
            each.expect()
            each.begin(1, torch.zeros(0), [])

    def end(self) -> list[list[int]]:
        return [each.settle() for each in self.arrivals]


def test_ranks_wait_no_longer_together_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other; in each step anew, and nothing stays of it."""
    ranks = Ranks(monkeypatch, 60.0)
    for step in range(1, 6):
        ranks.begin()
        assert ranks.end() == [[1], [1]]
        assert ranks.late.now == pytest.approx(0.25 * step)
        assert ranks.store.num_keys() <= 2


def test_what_ranks_wait_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s twice, at both ranks, are 0.2 s."""
    ranks = Ranks(monkeypatch, 0.1)
    ranks.begin()
    for layer in range(2):
        ranks.late.meanwhile.append(partial(ranks.arrivals[1].need, layer))
        ranks.arrivals[0].need(layer)
    assert ranks.end() == [[], []]
    assert ranks.late.now == pytest.approx(0.2)


def test_when_a_step_may_begin() -> None:
    """As soon as what is left is expected to come before the forward reaches it, and never later than when all is here."""
    assert is_in_time(1, 4, 0.1, 0.81)  # each slab takes half of what a quarter of the forward takes
    assert not is_in_time(1, 4, 0.1, 0.6)
    assert is_in_time(2, 4, 0.2, 0.6)
    assert not is_in_time(3, 4, 3.0, 1.0)
