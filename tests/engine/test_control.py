"""What ranks say of a peer's blocks behind a step: gathered from all of them, and nobody waits for one that is gone."""

from __future__ import annotations

import os

import pytest

from kvasir.engine.control import Hub, RankError
from kvasir.engine.frames import encode_tickets
from kvasir.engine.spoke import Spoke


def test_what_any_rank_lacked_counts() -> None:
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    try:
        hub.meet(30)
        for own, said in (((), ((), (7, 2**40))), ((3,), ((), ()))):
            hub.spoil(own)
            for spoke, tickets in zip(spokes, said, strict=True):
                spoke.send("spoiled", encode_tickets(tickets))
            assert sorted(hub.spoiled()) == sorted([*own, *said[0], *said[1]])
        hub.spoil(())
        spokes[0].send("spoiled", encode_tickets(()))
        spokes[1].close()
        for _ in range(2):
            with pytest.raises(RankError, match="rank 2"):
                hub.spoiled()
    finally:
        spokes[0].close()
        hub.close()
