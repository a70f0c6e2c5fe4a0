"""Hidden states between stages of one node: any size, in order, never more than fits, and an end for who waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.engine import hand_over as module
from kvasir.engine import node_memory
from kvasir.engine.board import SLOT_BYTES
from kvasir.engine.hand_over import MOST_BYTES, HandOver, hand_over
from kvasir.engine.mesh import Mesh
from kvasir.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
OnRanks = Callable[[int, int, Callable[[Mesh], Any]], list[Any]]
HOST = "127.0.0.1"


def ends(timeout_s: float = 60.0) -> tuple[HandOver, HandOver]:
    """(who gives, who takes)"""
    store = torch.distributed.HashStore()
    return HandOver(store, timeout_s, gives=True), HandOver(store, timeout_s, gives=False)


def sent() -> list[Tensor]:
    """Of no rows and of many, up to more than goes this way."""
    rows = (1, 4, 0, 37, 512, 1, 3000, 8, 513, 2)
    return [torch.randn(count, 512, generator=torch.Generator().manual_seed(count)).bfloat16() for count in rows]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_every_stage_gets_what_the_one_before_gave(on_ranks: OnRanks, tp: int, stages: int) -> None:
    assert max(x.nbytes for x in sent()) > MOST_BYTES > SLOT_BYTES

    def work(mesh: Mesh) -> Any:
        place = mesh.place
        assert (mesh.inward is None, mesh.onward is None) == (place.first, place.last)
        found = []
        for x in sent() * 2:
            got = x + place.tp_rank if place.first else mesh.receive(len(x), 512, x.dtype, x.device)
            if not place.last:
                mesh.send(got)
            found.append(got.clone())
            if not place.last and mesh.onward.takes(got):
                got.zero_()  # what was sent is the other's own; gloo reads it where it lies
        return found

    found = on_ranks(tp, stages, work)
    for rank in range(tp * (stages - 1), tp * stages):
        assert all(torch.equal(x, y) for x, y in zip(found[rank], found[rank % tp], strict=True))


def test_who_gives_waits_for_room_and_loses_nothing() -> None:
    giver, taker = ends()
    parts = [torch.full((SLOT_BYTES,), number % 250, dtype=torch.uint8) for number in range(40)]
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: [(begun.set(), giver.give(x)) for x in parts])
        assert begun.wait(60)
        for x in parts:
            taker.take(found := torch.empty_like(x))
            assert torch.equal(found, x)
        job.result(60)


@pytest.mark.parametrize("end", ["giver", "taker"])
@pytest.mark.parametrize("how", ["late", "abort"])
def test_who_waits_in_vain_gets_an_error(end: str, how: str) -> None:
    giver, taker = ends(0.3 if how == "late" else 60.0)
    x = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    one = giver if end == "giver" else taker
    timer = threading.Timer(0.1, one.abort)
    if how == "abort":
        timer.start()
    says = "timed out: another stage says nothing" if how == "late" else "another stage is gone, or this rank gave up"
    with pytest.raises(RuntimeError, match=says):
        giver.give(x.repeat(17)) if end == "giver" else taker.take(x)
    timer.cancel()


def test_both_ends_do_without_where_one_must(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(hosts: tuple[str, str]) -> list[HandOver | None]:
        store = torch.distributed.HashStore()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(hand_over, store, hosts[gives], 20.0, gives=gives) for gives in (False, True)]
            return [job.result() for job in jobs]

    assert None not in both((HOST, HOST))
    assert both(("a", "b")) == [None, None]
    monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(node_memory, "library", lambda: None)
    assert both((HOST, HOST)) == [None, None]
