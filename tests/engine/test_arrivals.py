"""On a CPU no step is planned ahead: who comes while one is executed takes part in the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Event, Finished
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.step import Step

STEP_S = 0.5


def test_who_comes_during_a_step_is_in_the_next_one() -> None:
    ended = threading.Event()

    def deliver(events: Sequence[Event]) -> None:
        if any(isinstance(event, Finished) and event.request_id == "stream" for event in events):
            ended.set()

    engine = Engine(EngineConfig(model="skald", max_num_seqs=4, num_threads=1), deliver)
    engine.start()
    rank, steps, begun = engine._executor.rank, list[Step](), threading.Condition()  # type: ignore[attr-defined]
    launch = rank.launch

    def slow(step: Step) -> Any:
        with begun:
            steps.append(step)
            begun.notify()
        time.sleep(STEP_S)
        return launch(step)

    rank.launch = slow
    try:
        sampling = SamplingParams(max_tokens=6, ignore_eos=True)
        engine.submit(Request(request_id="stream", prompt_token_ids=[5, 6], sampling=sampling))
        with begun:
            assert begun.wait_for(lambda: len(steps) == 4, 60)  # by now it knows how long a step takes
        engine.submit(Request(request_id="late", prompt_token_ids=[7, 8], sampling=SamplingParams(max_tokens=1)))
        assert ended.wait(60)
    finally:
        engine.shutdown()
    first = next(number for number, step in enumerate(steps) if len(step.new) and number > 0)
    assert first == 4
