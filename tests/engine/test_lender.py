"""What a lender reads from below the cache: a disk that hangs keeps nobody waiting who doesn't need it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvasir.engine.channels import Portion
from kvasir.engine.lender import Lend, Lender
from kvasir.engine.parts import Form, Part

FORM = Form(Part(range(1), range(1)), ((0,),), 1, 2, 16, 4, 0)


def portion(content: bytes) -> Portion:
    return Portion(0, torch.zeros(0, FORM.block_bytes, dtype=torch.uint8), [0], FORM, None, [(0, content)], None, [])


def test_a_disk_that_hangs_keeps_few_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir.engine.lender.MOST_READING", 2)
    monkeypatch.setattr("kvasir.engine.lender.SLOW_S", 0.05)
    go, begun = threading.Event(), threading.Semaphore(0)

    def read(content: bytes, into: memoryview) -> bool:
        if content == b"slow":
            begun.release()
            return go.wait(60)
        into[:] = bytes([7]) * len(into)
        return True

    cache: Any = SimpleNamespace(arena=torch.empty(0))
    lender = Lender(cache, FORM, 0, read)
    slow, quick, late = portion(b"slow"), portion(b"quick"), portion(b"quick")
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(lender._fill, slow, Lend(1, 0.0, "tcp"))
        assert begun.acquire(timeout=60)
        pool.submit(lender._fill, quick, Lend(1, 0.0, "tcp")).result(60)
        assert (quick.good, quick.rows.unique().tolist()) == (1, [7])
        other = pool.submit(lender._fill, portion(b"slow"), Lend(1, 0.0, "tcp"))
        assert begun.acquire(timeout=60)
        pool.submit(lender._fill, late, Lend(1, 0.0, "tcp")).result(60)
        assert late.good == 0  # it is computed
        go.set()
        hanging.result(60)
        other.result(60)
    assert slow.good == 1
