"""Cancelling some of the requests that an engine runs."""

from __future__ import annotations

import threading
from typing import Any

from waiting import until

from kvasir.engine.event import Finished
from kvasir.engine.llm import LLM
from kvasir.engine.request import Request, SamplingParams


def cancelled(llm: LLM) -> None:
    """Three of six, in between: each of the six ends once, as it was told to, and gives back its blocks."""
    ended: list[Finished] = []
    done = threading.Event()
    deliver = llm.engine._deliver

    def take(events: Any) -> None:
        ended.extend(event for event in events if isinstance(event, Finished))
        if len(ended) == 6:
            done.set()

    llm.engine._deliver = take
    try:
        for i in range(6):
            sampling = SamplingParams(temperature=0, max_tokens=100 if i % 2 else 20, ignore_eos=True)
            llm.engine.submit(Request(request_id=f"c{i}", prompt_token_ids=[1, 2, 3 + i], sampling=sampling))
        for i in (1, 3, 5):
            llm.engine.abort(f"c{i}")
        assert done.wait(60)
    finally:
        llm.engine._deliver = deliver
    until(lambda: not llm.engine.pool.num_used)  # a step under way holds those that end meanwhile
    assert sorted(event.reason for event in ended) == ["abort"] * 3 + ["length"] * 3
