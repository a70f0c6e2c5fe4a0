"""Links between ranks are tried at the start, and every one that is broken is named, on every rank."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvasir.engine import reach
from kvasir.engine.mesh import Place
from kvasir.engine.reach import UnreachableError, check_reach

Connect = Callable[..., socket.socket]


def answers(hosts: list[str], **options: Any) -> list[str | None]:
    """What each rank is told."""
    store = torch.distributed.HashStore()

    def rank(number: int) -> str | None:
        try:
            check_reach(store, Place(len(hosts), 1, number), hosts[number], 60.0, **options)
        except UnreachableError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(rank, range(len(hosts))))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts to which somebody connects; 127.0.0.3 answers nobody, and 127.0.0.4 refuses."""
    found: list[str] = []
    connect: Connect = socket.create_connection

    def fenced(address: tuple[str, int], limit_s: float) -> socket.socket:
        found.append(address[0])
        if address[0] == "127.0.0.3":
            raise TimeoutError("timed out")
        if address[0] == "127.0.0.4":
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(address, limit_s)

    monkeypatch.setattr(reach.socket, "create_connection", fenced)
    return found


def test_links_that_stand(tried: list[str]) -> None:
    assert answers(["127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2"]) == [None] * 4
    assert sorted(tried) == ["127.0.0.1"] * 3 + ["127.0.0.2"], "ranks of one node aren't tried"


def test_every_broken_link_is_named_on_every_rank(tried: list[str]) -> None:
    one, *others = answers(["127.0.0.1", "127.0.0.3", "127.0.0.4", "127.0.0.2"])
    assert others == [one] * 3
    assert one is not None
    assert one.splitlines() == [
        "rank 2 on 127.0.0.4 can't reach rank 1 on 127.0.0.3: no answer within 10 s",
        "rank 3 on 127.0.0.2 can't reach rank 1 on 127.0.0.3: no answer within 10 s",
        "rank 3 on 127.0.0.2 can't reach rank 2 on 127.0.0.4: Connection refused",
        reach.ADVICE,
    ]


def test_nobody_waits_once_the_group_has_failed() -> None:
    def failed() -> None:
        raise ZeroDivisionError

    store = torch.distributed.HashStore()
    with pytest.raises(ZeroDivisionError):
        check_reach(store, Place(2, 1, 0), "127.0.0.1", 60.0, going=failed)
    with pytest.raises(UnreachableError, match=r"rank 1 of 2 said nothing for 0\.01 s"):
        check_reach(store, Place(2, 1, 0), "127.0.0.1", 0.01)


def test_ranks_of_one_node_have_nothing_to_try() -> None:
    check_reach(None, Place(4, 2, 3, local_ranks=8), "127.0.0.1", 60.0)
