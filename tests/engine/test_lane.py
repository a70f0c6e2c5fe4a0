"""A lane of steps that is closed, fetches that come too late to their turn, and greetings that never end."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from kvasir.engine import peer_wire
from kvasir.engine.errors import UnavailableError
from kvasir.engine.executor import Lane
from kvasir.engine.layout import LayerGroup
from kvasir.engine.parts import Form, Part
from kvasir.engine.puller import Puller
from kvasir.engine.step import Pull, Result, Step


def test_who_waits_for_a_step_behind_the_end_is_told() -> None:
    begun, go = threading.Event(), threading.Event()

    def execute(step: Step) -> Any:
        begun.set()
        go.wait(60)
        return Result(step.id, ())

    lane = Lane(execute, apart=True)
    lane.launch(Step(1))
    lane.launch(Step(2))
    assert begun.wait(60)
    closing = threading.Thread(target=lane.close)
    closing.start()
    go.set()
    closing.join(60)
    assert lane.collect().step == 1
    for _ in range(2):
        with pytest.raises(UnavailableError, match="shut down"):
            lane.collect()


def test_a_fetch_whose_time_is_over_before_its_turn_is_no_fault_of_the_peer() -> None:
    part = Part(range(1), range(1))
    form, groups = Form(part, ((0,),), 1, 2, 16, 4, 0), (LayerGroup((0,)),)
    puller = Puller(b"", form, groups, (part,), 0, ("tcp",), torch.device("cpu"))
    said, came = [], threading.Event()

    def fetched(ticket: int, blocks: int) -> None:
        said.append((ticket, blocks))
        came.set()

    puller.on_fetched = fetched
    puller.start(Pull(7, "127.0.0.1:1", "s", "f", b"", b"", 0, 16, 0.0))
    assert came.wait(60)
    puller.close()
    assert said == [(7, 0)]


def test_a_greeting_has_a_deadline_however_it_trickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_wire, "HELLO_S", 0.3)
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.05):
            ours.sendall(b"k")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            peer_wire.is_greeted(theirs, "secret")
    finally:
        stop.set()
        thread.join()
        ours.close()
        theirs.close()
