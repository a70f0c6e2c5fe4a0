"""What is below the cache: host memory and a disk, each written and read by a thread of its own, without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from waiting import until

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.disk import Disk
from kvasir.engine.disk_folder import claim
from kvasir.engine.errors import ConfigError
from kvasir.engine.host import Host
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.open_tiers import disk_root, open_tiers
from kvasir.engine.spec import Layer, Spec
from kvasir.engine.step import Moves
from kvasir.engine.tiers import Tiers

SPEC = Spec(vocab=9, hidden=8, heads=4, kv_heads=2, head_dim=6, ffn=8, eps=1e-5, max_len=64, layers=(Layer(), Layer()))


@pytest.fixture
def tiers() -> Iterator[tuple[KVCache, Tiers, list[tuple[int, int]]]]:
    cache = KVCache(SPEC, 6, 4, torch.float32, torch.device("cpu"))
    for layer in (0, 1):
        for tensor in cache.layer(layer):
            assert tensor is not None
            tensor.normal_()
    found = Tiers(cache, Host(cache.bytes_per_block, 1 << 20), None)
    answers: list[tuple[int, int]] = []
    found.on_fetched = lambda *said: answers.append(said)
    yield cache, found, answers
    found.close()


def test_what_a_block_holds_comes_back_into_another(tiers: tuple[KVCache, Tiers, list[tuple[int, int]]]) -> None:
    cache, found, answers = tiers
    before = cache.read([1, 3]).clone()
    found.save([(1, b"a"), (3, b"b")])
    cache.arena.zero_()  # the step's own work
    until(lambda: found.knows(b"b"))
    found.apply(Moves(fetches=[(7, [b"b", b"a", b"missing", b"a"])]))
    until(lambda: answers == [(7, 2)])
    found.apply(Moves(loads=[(7, 0, 5), (7, 1, 2)], ended=[7]))
    assert torch.equal(cache.read([2, 5]), before)
    assert not cache.read([0, 1, 3, 4]).any()
    assert not any(fetches.staged for fetches in found._fetches)
    found.forget([b"a"])
    until(lambda: not found.knows(b"a"))


def test_a_writer_that_is_behind_gets_no_more_than_it_can_hold(
    tiers: tuple[KVCache, Tiers, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, found, _ = tiers
    monkeypatch.setattr("kvasir.engine.tiers.STAGED_BYTES", 3 * cache.bytes_per_block)
    assert found._host is not None
    write, go = found._host.write, threading.Event()
    monkeypatch.setattr(found._host, "write", lambda *a: go.wait() and write(*a))
    for number in range(6):
        found.save([(number, bytes([number]))])
    go.set()
    until(lambda: found.counts()["host_stored"] == 3)
    found.save([(5, b"later")])
    until(lambda: found.knows(b"later"))


def test_fetches_wait_for_room_and_for_nothing_that_ended(
    tiers: tuple[KVCache, Tiers, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, found, answers = tiers
    found.save([(number, bytes([number])) for number in range(6)])
    until(lambda: found.knows(b"\5"))
    monkeypatch.setattr("kvasir.engine.tiers.STAGED_BYTES", 3 * cache.bytes_per_block)
    found.apply(Moves(fetches=[(1, [b"\0", b"\1"]), (2, [b"\2", b"\3"]), (3, [b"\4"]), (4, [b"\5"])]))
    until(lambda: answers == [(1, 2)])
    time.sleep(0.05)
    assert answers == [(1, 2)]
    found.apply(Moves(ended=[2]))  # which is answered, too: else it would count as overdue for ever
    until(lambda: answers == [(1, 2), (2, 0), (3, 1)])
    found.apply(Moves(ended=[1]))
    until(lambda: answers == [(1, 2), (2, 0), (3, 1), (4, 1)])


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[KVCache, Tiers, list[tuple[int, int]], threading.Event]]:
    """Host memory and a disk that holds b"d" * 16 and hangs until the event."""
    cache = KVCache(SPEC, 6, 4, torch.float32, torch.device("cpu"))
    own = claim(tmp_path, "ab" * 16, 0)
    assert own is not None
    go = threading.Event()

    class Hanging(Disk):
        def write(self, content: bytes, data: memoryview) -> bool:
            return go.wait(60) and super().write(content, data)

        def read(self, content: bytes, into: memoryview) -> bool:
            return go.wait(60) and super().read(content, into)

    disk = Hanging(own, b"m" * 16, cache.bytes_per_block, 1 << 20)
    found = Tiers(cache, Host(cache.bytes_per_block, 1 << 20), disk)
    found.wait_until_scanned()
    assert Disk.write(disk, b"d" * 16, memoryview(bytes(cache.bytes_per_block)))
    answers: list[tuple[int, int]] = []
    found.on_fetched = lambda *said: answers.append(said)
    yield cache, found, answers, go
    go.set()
    found.close()


Hanging = tuple[KVCache, Tiers, list[tuple[int, int]], threading.Event]


def test_host_memory_is_filled_and_read_while_the_disk_hangs(hanging: Hanging) -> None:
    _, found, answers, go = hanging
    found.apply(Moves(fetches=[(1, [b"d" * 16]), (2, [b"d" * 16])]))
    names = [bytes([number]) * 16 for number in range(6)]
    for number, name in enumerate(names):
        found.save([(number, name)])
    until(lambda: all(map(found.has_at_hand, names)))
    found.apply(Moves(fetches=[(3, names)]))
    until(lambda: answers == [(3, 6)])
    found.apply(Moves(ended=[1, 2, 3]))
    assert answers == [(3, 6), (2, 0)]  # the second wasn't begun
    assert not found.has_at_hand(b"d" * 16)
    go.set()
    until(lambda: found.counts()["disk_stored"] == 7)
    until(lambda: answers == [(3, 6), (2, 0), (1, 0)] or answers == [(3, 6), (2, 0), (1, 1)])
    found.apply(Moves(fetches=[(4, [*names, b"d" * 16])]))
    until(lambda: answers[-1] == (4, 7))


def test_what_left_host_memory_while_it_was_asked_for_comes_from_the_disk(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found, answers, go = hanging
    go.set()
    monkeypatch.setattr(found, "has_at_hand", lambda content: True)
    found.apply(Moves(fetches=[(1, [b"d" * 16])]))
    until(lambda: answers == [(1, 1)])


def test_a_tier_that_hangs_is_told_no_more_than_a_limit(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, found, _, go = hanging
    monkeypatch.setattr("kvasir.engine.lane.MOST_WAITING", 20)
    monkeypatch.setattr("kvasir.engine.tiers.STAGED_BYTES", 6 * cache.bytes_per_block)
    host, disk = found._lanes
    for number in range(100):
        found.save([(0, number.to_bytes(16, "big"))])
        found.apply(Moves(used=[(1, [b"d" * 16] * 5)]))
        found.forget([b"e" * 16])
        until(lambda: not host.waiting and not host._work.qsize())
        assert disk.waiting <= 3 * cache.bytes_per_block
        assert disk._work.qsize() <= 20
    assert found.counts()["host_stored"] == 100
    found.forget([b"d" * 16])
    assert not found.knows(b"d" * 16)
    go.set()
    until(lambda: b"d" * 16 not in disk.tier.shelf)
    until(lambda: found.counts()["disk_stored"] == 1 + 3 and not disk.waiting)
    assert not disk._forgotten


def test_a_lane_and_a_fetch_outlive_what_they_could_not_do(
    tiers: tuple[KVCache, Tiers, list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, found, answers = tiers
    assert found._host is not None
    (lane,) = found._lanes
    with monkeypatch.context() as patch:
        for name in ("write", "read", "forget"):
            patch.setattr(found._host, name, _broken)
        for number in range(3):
            found.save([(number, b"lost")])
            found.forget([b"lost"])
            found.apply(Moves(fetches=[(number, [b"lost"])], ended=[number - 1]))
            until(lambda number=number: answers[-1:] == [(number, 0)])  # type: ignore[misc]
        until(lambda: not lane.waiting and not lane._forgotten)
    assert 0 < caplog.text.count("can't be kept below the cache") <= 1
    assert caplog.text.count("can't be read from below the cache") == 1
    found.save([(1, b"kept")])
    until(lambda: found.knows(b"kept"))
    found.apply(Moves(fetches=[(7, [b"kept"])]))
    until(lambda: answers[-1] == (7, 1))


def _broken(*_: object) -> bool:
    raise MemoryError("whatever it is")


def test_where_auto_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_root("auto") == tmp_path / "kvasir" / "kv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk_root("auto") == Path.home() / ".cache" / "kvasir" / "kv"
    assert disk_root("~/kv") == Path.home() / "kv"


@pytest.mark.parametrize(
    ("given", "causal", "words"),
    [
        ({"kv_offloading_size": 1e-7}, True, "--kv-offloading-size 1e-07: no KV blocks are kept in host memory"),
        ({"kv_disk_path": "{tmp}", "kv_disk_size": 100}, True, "--kv-disk-size: no KV blocks are kept in {tmp}"),
        ({"kv_disk_size": 100}, True, "--kv-disk-size 100: no effect without --kv-disk-path"),
        ({"kv_disk_path": "{tmp}", "enable_prefix_caching": False}, True, "--kv-disk-path: no effect"),
        ({"kv_offloading_size": 1.0, "kv_disk_size": 9}, False, "--kv-offloading-size, --kv-disk-size: no effect"),
        ({"kv_disk_path": "auto", "enable_prefix_caching": False}, True, ""),  # as `kvasir serve` has it anyway
        ({"kv_disk_path": "auto"}, False, ""),
        ({}, True, ""),
    ],
)
def test_tiers_that_keep_nothing_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any], causal: bool, words: str
) -> None:
    given = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in given.items()}
    share: Any = SimpleNamespace(full=SimpleNamespace(causal=causal), mesh=Mesh(Place()))
    files: Any = SimpleNamespace(path=tmp_path, config={})
    cache = KVCache(SPEC, 6, 4, torch.float32, torch.device("cpu"))
    found = open_tiers(EngineConfig(model="m", **given), files, share, cache)
    if found is not None:
        found.wait_until_scanned()
        found.close()
    assert words.format(tmp=tmp_path) in caplog.text
    assert len(caplog.records) == bool(words)


@pytest.mark.parametrize(("name", "value"), [("kv_offloading_size", -1.0), ("kv_disk_size", -1)])
def test_sizes_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least 0"):
        LLM(**{name: value})
