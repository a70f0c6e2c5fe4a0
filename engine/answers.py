"""Answers: what steps gave, told to rank 0 by the rank that samples."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvasir.engine.codec import encode_result

if TYPE_CHECKING:
    from kvasir.engine.outcome import Outcome
    from kvasir.engine.spoke import Spoke


class Answers:
    """apart: in a thread of its own, which waits for the device while the next step is launched; else `tell` waits. `failed` is
    called there if that is in vain; nothing more is told then."""

    def __init__(self, spoke: Spoke, failed: Callable[[BaseException], object], *, apart: bool) -> None:
        self._spoke, self._failed, self._apart = spoke, failed, apart
        self._outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        if apart:
            threading.Thread(target=self._work, name="kvasir-answers", daemon=True).start()

    def tell(self, outcome: Outcome) -> None:
        """In the order of the steps."""
        if self._apart:
            self._outcomes.put(outcome)
        else:
            self._spoke.send("result", encode_result(outcome.result()))

    def close(self) -> None:
        """End the thread, behind what is to be told."""
        self._outcomes.put(None)

    def _work(self) -> None:
        try:
            while (outcome := self._outcomes.get()) is not None:
                self._spoke.send("result", encode_result(outcome.result()))
        except Exception as error:  # the thread's border: whatever it is, rank 0 must hear of it
            with contextlib.suppress(OSError):  # unless it is gone
                self._failed(error)
