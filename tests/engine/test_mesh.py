"""Exchanges between ranks: sums, rows and columns over gloo and over connections of our own; GPUs' shared memory by a fake."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.engine import mesh as mesh_module
from kvasir.engine import rows, symmetric
from kvasir.engine.errors import ConfigError
from kvasir.engine.links import Links
from kvasir.engine.mesh import Mesh, Place, join, process_group
from kvasir.engine.rows import DealtRows, WholeRows, rows_of
from kvasir.engine.symmetric import BUFFER, Memory, SharedSum, agreed_sum, one_shot_bytes
from kvasir.kernels.measured import Measured

CPU = torch.device("cpu")
OnRanks = Callable[[int, int, Callable[[Mesh], Any]], list[Any]]


def part(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def refused(*_: object) -> Any:
    raise OSError("no memory")


@pytest.mark.parametrize("way", ["memory", "links", "gloo"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_rows(on_ranks: OnRanks, size: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "links":
        monkeypatch.setattr(mesh_module, "NodeLinks", refused)

    def work(mesh: Mesh) -> Any:
        assert isinstance(mesh.links, Links) == (way == "links")
        if way == "gloo":
            mesh.one_shot = None
        rank = mesh.place.rank
        x = part(rank, 2 * size, 5)
        total, own = mesh.reduce(x.clone()), mesh.scatter_sum(x.clone())
        return total, own, mesh.gather_rows(own), mesh.traffic

    wanted = sum(part(rank, 2 * size, 5) for rank in range(size))
    for rank, (total, own, whole, traffic) in enumerate(on_ranks(size, 1, work)):
        torch.testing.assert_close(total, wanted)
        torch.testing.assert_close(own, wanted[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(whole, wanted)
        everything = 2 * size * 5 * 4
        once = (size - 1) / size * everything  # of a half: each rank's part to, or from, all others
        sums = (size - 1) * everything if way != "gloo" else 2 * once
        assert (traffic.calls, traffic.bytes) == (3, pytest.approx(sums + 2 * once))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_whose_order_is_the_ranks(on_ranks: OnRanks, dtype: torch.dtype) -> None:
    """As several GPUs do with --deterministic: a row's sum is the same however many rows are beside it."""

    def work(mesh: Mesh) -> Any:
        mesh.one_shot = mesh.links = None
        mesh.invariant = True
        x = part(mesh.place.rank, 3000, 9).to(dtype)
        return mesh.reduce(x.clone()), mesh.reduce(x[1234:1235].clone()), mesh.traffic

    parts = [part(rank, 3000, 9).to(dtype).float() for rank in range(3)]
    wanted = (parts[0] + parts[1] + parts[2]).to(dtype)
    for whole, alone, traffic in on_ranks(3, 1, work):
        assert torch.equal(whole, wanted)
        assert torch.equal(alone, wanted[1234:1235])
        assert (traffic.calls, traffic.bytes) == (2, 2 * 3001 * 9 * dtype.itemsize)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_tally_of_all_ranks(on_ranks: OnRanks, tp: int, pp: int) -> None:
    """One adds after the other: what they find the least of is where they wait for each other."""

    def work(mesh: Mesh) -> Any:
        found = []
        for rank in range(mesh.place.size):
            if rank == mesh.place.rank:
                mesh.tally("late", 10 + rank)
            mesh.least(0)
            found.append(mesh.tally("late"))
            mesh.least(0)
        if mesh.place.rank == 0:
            mesh.forget("late")
        mesh.least(0)
        return [*found, mesh.tally("late")]

    wanted = [10, 21][: tp * pp]
    assert on_ranks(tp, pp, work) == [[*wanted, 0]] * (tp * pp)


def test_gloo_s_interface_may_be_named(on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo, nosuch0")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME: there is no nosuch0 here, only "):
        mesh_module.gloo_devices("127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert len(mesh_module.gloo_devices("192.0.2.1")) == 1  # an address that isn't here

    def work(mesh: Mesh) -> Any:
        mesh.one_shot = None
        return mesh.reduce(torch.ones(2, 2)).tolist()

    assert on_ranks(2, 1, work) == [[[2.0, 2.0]] * 2] * 2


def test_sums_that_were_turned_off() -> None:
    """--disable-custom-all-reduce: the process group alone; logits still come over connections of our own."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        places = [Place(2, 1, rank) for rank in range(2)]
        meshes = list(pool.map(lambda place: join(place, store, CPU, "127.0.0.1", 60.0, one_shot=False), places))
        found = list(pool.map(lambda mesh: mesh.reduce(torch.ones(2, 2) + mesh.place.rank), meshes))
    assert [(mesh.one_shot, mesh.links is None) for mesh in meshes] == [(None, False)] * 2
    assert all(each.tolist() == [[3.0, 3.0]] * 2 for each in found)
    for mesh in meshes:
        mesh.close()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_dealt_rows(on_ranks: OnRanks, count: int) -> None:
    """Counts that don't divide, and fewer rows than ranks."""

    def work(mesh: Mesh) -> Any:
        held = DealtRows(mesh, count)
        whole = torch.arange(count * 2.0).view(count, 2)
        kept = held.own(whole)
        return kept, held.count(), held.spread(kept), held.spread(held.summed(whole))

    for kept, size, whole, doubled in on_ranks(2, 1, work):
        assert len(kept) == size == -(-count // 2)
        assert whole.tolist() == torch.arange(count * 2.0).view(count, 2).tolist()
        assert doubled.tolist() == (2 * whole).tolist()


def test_where_rows_are_dealt_out() -> None:
    """Many rows on several GPUs."""
    alone, cpu = Mesh(), Mesh(Place(2, 1, 0))
    gpus = Mesh(Place(8, 1, 0), device=torch.device("cuda", 0))
    assert isinstance(rows_of(alone, 8192, 8192), WholeRows)
    assert isinstance(rows_of(cpu, 8192, 8192), WholeRows)
    assert isinstance(rows_of(gpus, 256, 8192), WholeRows)
    assert isinstance(rows_of(gpus, 8192, 8192), DealtRows)
    gpus.invariant = True  # who deals out adds up in an order that depends on the number of rows
    assert isinstance(rows_of(gpus, 8192, 8192), WholeRows)
    gpus.invariant = False
    assert not rows.dealing_wins(gpus, 500, 8192)
    assert rows.dealing_wins(gpus, 600, 8192)


# -- sums through memory that GPUs share


class FakeMemory:
    """What `size` threads show each other in place of GPUs."""

    def __init__(self, size: int, *, multicast: bool = False) -> None:
        self.multicast, self.ran = multicast, ""
        self._shown: list[Tensor] = []
        self._barrier = threading.Barrier(size)

    def one_shot(self, x: Tensor) -> Tensor:
        return self._run("one_shot", x)

    def multimem(self, x: Tensor) -> Tensor:
        return self._run("multimem", x)

    def _run(self, name: str, x: Tensor) -> Tensor:
        self.ran = name
        self._shown.append(x)
        self._barrier.wait(60)
        return torch.stack(self._shown).sum(0)


def together(size: int, make: Callable[[int], Memory], hosts: Callable[[int], str]) -> list[SharedSum | None]:
    """What each of `size` ranks agrees to."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(size) as pool:
        jobs = [
            pool.submit(agreed_sum, lambda rank=rank: make(rank), store, rank, size, hosts(rank), 10.0)
            for rank in range(size)
        ]
        return [job.result() for job in jobs]


@pytest.mark.parametrize(("multicast", "kernel"), [(False, "one_shot"), (True, "multimem")])
def test_a_sum_through_shared_memory(multicast: bool, kernel: str) -> None:
    memory = FakeMemory(2, multicast=multicast)
    sums = together(2, lambda rank: memory, lambda rank: "a")
    with ThreadPoolExecutor(2) as pool:
        meshes = [Mesh(Place(2, 1, r), tensor=object(), one_shot=s) for r, s in enumerate(sums)]
        found = list(pool.map(lambda mesh: mesh.reduce(torch.full((2, 8), 1.0 + mesh.place.rank)), meshes))
    assert all(each.tolist() == [[3.0] * 8] * 2 for each in found)
    assert memory.ran == kernel


def test_what_is_too_large_or_odd_goes_over_nccl() -> None:
    two, four = (SharedSum(FakeMemory(size), size) for size in (2, 4))
    switched = SharedSum(FakeMemory(4, multicast=True), 4)
    rows = torch.empty(64, 8192, dtype=torch.bfloat16)
    assert two.takes(rows)
    assert four.takes(rows)
    large = torch.empty(128, 8192, dtype=torch.bfloat16)
    assert (two.takes(large), four.takes(large), switched.takes(large)) == (True, False, True)
    assert not two.takes(torch.empty(BUFFER + 16, dtype=torch.uint8).view(torch.float32))
    assert not two.takes(torch.empty(7, dtype=torch.bfloat16)), "kernels read 16 bytes at once"
    assert not two.takes(torch.empty(8, dtype=torch.float16)), "torch's kernels don't add these"
    assert [one_shot_bytes(size) >> 10 for size in (2, 4, 8)] == [8192, 1464, 418]


def test_a_measurement_on_the_same_gpus_says_what_goes_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Measured("2026-12-01", "NVIDIA H200", "2.13.0", "3.6.0", {}, {"4": 1 << 16, "8": 1 << 30, "2": 0})
    monkeypatch.setattr(symmetric, "measured", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    most = {size: SharedSum(FakeMemory(size, multicast=True), size).most for size in (2, 4, 6, 8)}
    assert most == {2: 0, 4: 1 << 16, 6: BUFFER, 8: BUFFER}
    assert symmetric.border(4) == "shared memory up to 65536 bytes, NCCL beyond: measured"
    assert "not measured on these GPUs" in symmetric.border(6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert SharedSum(FakeMemory(4), 4).most == one_shot_bytes(4)


def test_all_ranks_send_the_same_sums_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them was measured, the other not."""
    most = iter((BUFFER, 1 << 16))
    monkeypatch.setattr(symmetric, "measured_bytes", lambda size, default: next(most))
    assert [each and each.most for each in together(2, lambda rank: FakeMemory(2), lambda rank: "a")] == [1 << 16] * 2


def test_every_rank_falls_back_where_one_must(caplog: pytest.LogCaptureFixture) -> None:
    def make(rank: int) -> Memory:
        if rank == 2:
            raise RuntimeError("peer access is\nnot supported")
        return FakeMemory(3)

    with caplog.at_level(logging.WARNING, symmetric.__name__):
        assert together(3, make, lambda rank: "a") == [None] * 3
    (line,) = caplog.messages
    assert line == "sums between GPUs go over NCCL alone, not through shared memory: peer access is not supported"


def test_ranks_on_several_nodes_share_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def make(rank: int) -> Memory:
        made.append(rank)
        return FakeMemory(2)

    with caplog.at_level(logging.WARNING, symmetric.__name__):
        assert together(2, make, "node {}".format) == [None] * 2
    assert made == []
    assert "are on 2 nodes" in caplog.text


def test_a_process_group_that_torch_s_operators_find() -> None:
    store = torch.distributed.HashStore()
    group = process_group(store, 0, 1, CPU, "127.0.0.1", 10.0)
    found = symmetric.registered(group, torch.distributed.PrefixStore("shared", store), 0, 1, CPU)
    assert torch._C._distributed_c10d._resolve_process_group(found.group_name).size() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_reason_to_fall_back(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real maker, where there is none."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    store, device = torch.distributed.HashStore(), torch.device("cuda", 0)
    group = process_group(torch.distributed.PrefixStore("stage", store), 0, 1, CPU, "127.0.0.1", 10.0)
    with caplog.at_level(logging.WARNING, symmetric.__name__):
        assert symmetric.shared_sum(group, store, 0, 1, device, "a", 10.0) is None
    assert len(caplog.messages) == 1
