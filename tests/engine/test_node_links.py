"""Exchanges through shared memory: right for any size, the same bits everywhere, and an end for who waits in vain."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.engine import mesh as mesh_module
from kvasir.engine import node_links
from kvasir.engine.cache import KVCache
from kvasir.engine.links import Links
from kvasir.engine.mesh import Mesh, Place, cpu_links
from kvasir.engine.node_links import NodeLinks
from kvasir.engine.share import share_of
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.weights import random_decoder
from kvasir.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
CPU = torch.device("cpu")
Work = Callable[[NodeLinks], Any]


def together(size: int, work: Work, timeout_s: float = 60.0) -> list[Any]:
    """What `work` gives on every rank; an error is given, not raised."""
    store = torch.distributed.HashStore()

    def rank(number: int) -> Any:
        try:
            return work(NodeLinks(store, number, size, timeout_s))
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def part(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_size(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts smaller than a vector, of one turn, of two, of many; sums, dealt sums, gathered rows and columns in any order."""
    monkeypatch.setattr(node_links, "CAPACITY", 1 << 16)
    shapes = [(size, 1), (size, 17), (2 * size, 100), (size, 5000), (3 * size, 8200)]

    def work(links: NodeLinks) -> Any:
        found = []
        for shape in shapes * 3:
            x = part(links.own, dtype, *shape)
            columns = links.gather(x)
            own = links.scatter_sum(x)
            found.append((links.sum(x), own, links.gather_rows(own), columns))
        return found

    for rank, found in enumerate(together(size, work)):
        for shape, (total, own, whole, columns) in zip(shapes * 3, found, strict=True):
            parts = [part(number, dtype, *shape) for number in range(size)]
            wanted = sum(x.float() for x in parts).to(dtype)  # added in float32, rounded once
            assert torch.equal(total, wanted)
            assert torch.equal(whole, wanted)
            assert torch.equal(own, wanted.chunk(size)[rank])
            assert len(columns) == (0 if rank else size)
            assert all(map(torch.equal, columns, parts))


def test_who_only_gives_may_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't overwrite what rank 0 still reads."""
    monkeypatch.setattr(node_links, "CAPACITY", 256)

    def work(links: NodeLinks) -> list[float]:
        found = []
        for turn in range(200):
            columns = links.gather(torch.full((300,), float(turn)))
            if links.own == 0:
                os.sched_yield()
                found.append(float(columns[1].sum()) / 300)
        return found

    assert together(2, work)[0] == [float(turn) for turn in range(200)]


def test_a_rank_that_says_nothing() -> None:
    def work(links: NodeLinks) -> None:
        if links.own == 0:
            links.sum(torch.ones(4))

    assert together(2, work, 0.3) == ["timed out: another rank of the stage says nothing", None]


def test_all_who_wait_are_freed() -> None:
    waiting = threading.Semaphore(0)

    def work(links: NodeLinks) -> None:
        if links.own:
            waiting.release()
            links.sum(torch.ones(4))
        for _ in range(2):
            waiting.acquire()
        links.abort()

    assert together(3, work)[1:] == ["another rank of the stage is gone, or gave up"] * 2


SPEC = Spec(
    vocab=300, hidden=64, heads=8, kv_heads=2, head_dim=16, ffn=256, eps=1e-5, max_len=256,
    layers=(Layer(Rope(1e4, 16)),) * 3, qk_norm="head", qkv_bias=True, o_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
def test_one_call_is_the_layers_one_by_one(size: int, on_ranks: Any, ragged: Any) -> None:
    """Not a bit of a rank's logits changes; and what is counted as sent is the same."""
    step = ragged([([0, 1], 0, 20), ([2], 0, 1), ([3], 0, 9)], 16)
    tokens, rows = torch.arange(30), torch.tensor([19, 20, 29])

    def work(mesh: Mesh) -> Any:
        share = share_of(SPEC, mesh)
        decoder = random_decoder(SPEC, torch.bfloat16, CPU, share=share)
        found = []
        for in_one in (True, False):
            cache = KVCache(share.spec, 4, 16, torch.bfloat16, CPU, layers=share.layers)
            decoder._stack = None if in_one else (cache, None)
            mesh.traffic.calls, mesh.traffic.bytes = 0, 0.0
            logits = decoder(tokens, step, cache, rows)
            called = decoder._stack is not None and decoder._stack[1] is not None
            found.append((called, logits, mesh.traffic.calls, mesh.traffic.bytes))
        return found

    for rank, ((called, ours, *sent), (one_by_one, wanted, *counted)) in enumerate(on_ranks(size, 1, work)):
        assert (called, one_by_one) == (True, False)
        assert sent == counted
        assert rank or torch.equal(ours, wanted)


def refused(*_: object) -> Any:
    raise OSError("no memory")


@pytest.fixture
def asked() -> Iterator[Callable[..., list[Any]]]:
    """`asked(hosts)`: the links that two ranks on these take."""
    made: list[Any] = []

    def ask(*hosts: str) -> list[Any]:
        store = torch.distributed.HashStore()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(cpu_links, store, Place(2, 1, r), host, 20.0, "s") for r, host in enumerate(hosts)]
            made.extend(job.result() for job in jobs)
        return made

    yield ask
    for links in made:
        links.close()


def test_connections_where_ranks_are_on_several_nodes(asked: Any) -> None:
    assert [type(links) for links in asked("127.0.0.1", "127.0.0.2")] == [Links, Links]


def test_connections_where_one_rank_gets_no_memory(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "NodeLinks", refused)
    assert [type(links) for links in asked("127.0.0.1", "127.0.0.1")] == [Links, Links]


def test_another_process_s_memory_isn_t_taken(tmp_path: Path) -> None:
    """A rank in another container, say, where the number of rank 0's process is somebody else's."""
    store = torch.distributed.HashStore()
    with open(tmp_path / "other", "w+b") as file:
        file.truncate(1 << 23)
        for where in (f"{os.getpid()} {file.fileno()} {'ab' * 16}", "0 0 0", f"{os.getpid()} 10000 {'ab' * 16}"):
            store.set("memory", where)
            with pytest.raises(OSError, match=r"isn't to be had here|No such file"):
                NodeLinks(store, 1, 2, 1.0)
