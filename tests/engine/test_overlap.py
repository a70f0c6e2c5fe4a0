"""A step that is planned while the one before it is executed: the engine with and without, on real models."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kvasir.engine import mesh
from kvasir.engine.codec import decode_step
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.executor import GroupExecutor
from kvasir.engine.llm import LLM
from kvasir.engine.outcome import Copy, Patience
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.step import Result, Step

MIX = (
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(temperature=0.8, seed=1, max_tokens=30, n=3, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12, n=2, use_beam_search=True),
    SamplingParams(temperature=1.0, seed=2, top_p=0.9, repetition_penalty=1.2, max_tokens=25, min_tokens=5),
    SamplingParams(temperature=1.0, seed=3, mirostat=2, max_tokens=20, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=4, max_tokens=40, structured_outputs=StructuredOutput(regex="[a-z ]{3,20}")),
    SamplingParams(temperature=0, max_tokens=30, bad_words=["the", " was"], repeat_last_n=8, frequency_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=40, stop=["."]),
)


def said(llm: LLM, prompts: Sequence[str]) -> list[Any]:
    """Everything that the outputs hold."""
    outputs = llm.generate(list(prompts), list(MIX), use_tqdm=False)
    return [
        (one.prompt_logprobs, [(c.token_ids, c.text, c.logprobs, c.finish_reason) for c in one.outputs])
        for one in outputs
    ]


@pytest.mark.parametrize("which", ["skald", "model-stories260k/hf"])
def test_outputs_are_the_same(which: str, data: Callable[[str], Path]) -> None:
    model = which if which == "skald" else str(data(which))
    prompts = ["Once upon a time there was a little girl. " * 3 + word for word in ("She", "Tom", "a", "The") * 2]
    found, counts = [], []
    for ahead in (True, False):
        options = {"dtype": "float32", "block_size": 8, "num_threads": 1, "enable_prefix_caching": False}
        llm = LLM(model, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 21, **options)
        executor = llm.engine._executor
        executor.ahead = executor._lane._apart = executor.rank.lags = ahead  # type: ignore[attr-defined]  # as on a GPU, as on a CPU
        executor.rank.sampler.constraints._apart = ahead  # type: ignore[attr-defined]
        found.append(said(llm, prompts))
        ended = time.monotonic()
        while llm.engine.stats_at <= ended:  # what is told is a little old
            time.sleep(0.01)
        stats = llm.engine.stats()
        counts.append(
            (stats.prompt_tokens, stats.ended)
        )  # stop strings are found outside: what was made by then varies
        assert llm.engine.pool.check() == []
        llm.shutdown()
    assert found[0] == found[1]
    assert counts[0] == counts[1]


def test_chunks_of_one_prompt_are_in_both_stages_at_once(data: Callable[[str], Path]) -> None:
    llm = LLM(
        str(data("model-stories260k/hf")), pipeline_parallel_size=2, max_num_batched_tokens=16, dtype="float32",
        num_threads=1,
    )  # fmt: skip
    happened: list[str] = []
    executor = llm.engine._executor
    launch, collect = executor.launch, executor.collect

    def launched(step: Step) -> None:
        happened.append(f"{step.slices[0].start}" if step.slices else "-")
        launch(step)

    def collected() -> Result:
        happened.append("result")
        return collect()

    executor.launch, executor.collect = launched, collected  # type: ignore[method-assign]
    try:
        sampling = SamplingParams(temperature=0, max_tokens=1)
        llm.generate([{"prompt_token_ids": [5] * 64}], sampling, use_tqdm=False)
    finally:
        llm.shutdown()
    assert happened[:7] == ["0", "16", "32", "result", "48", "result", "result"]


LAGGING = "from kvasir.engine import mesh\nmesh.LAGGING = ('cpu',)\n"
"""What is sampled is read a step later on every rank, as on GPUs."""
COMMON: dict[str, Any] = {"dtype": "float32", "block_size": 8, "num_threads": 1, "max_num_batched_tokens": 48}
Make = Callable[..., LLM]


@pytest.fixture
def lagging(data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`lagging(**options)`: a group of two tensor-parallel ranks, or of those of a `layout` (tp, pp), that launches a step
    before the last one's tokens are known; the other ranks run the code `other` first."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mesh, "LAGGING", ("cpu",))
    made: list[LLM] = []

    def make(other: str = "", layout: tuple[int, int] = (2, 1), **options: Any) -> LLM:
        (tmp_path / "sitecustomize.py").write_text(LAGGING + other)
        sizes = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]}
        llm = LLM(str(data("model-stories260k/hf")), **COMMON, **sizes, **options)
        made.append(llm)
        executor = group(llm)
        executor.ahead = executor._lane._apart = True
        if (sampler := executor.rank.sampler) is not None:
            sampler.constraints._apart = True
        return llm

    yield make
    for llm in made:
        llm.shutdown()


def group(llm: LLM) -> GroupExecutor:
    executor = llm.engine._executor
    assert isinstance(executor, GroupExecutor)
    return executor


def gathered(llm: LLM, after: int = 0, act: Callable[[], object] = list) -> list[Event]:
    """All events from now on. Once there are more than `after` it acts, in the engine's thread, which plans no step meanwhile."""
    events: list[Event] = []

    def deliver(new: Sequence[Event]) -> None:
        few = len(events) <= after
        events.extend(new)
        if few and len(events) > after:
            act()

    llm.engine._deliver = deliver
    return events


def over(llm: LLM) -> bool:
    """The engine has failed, and told everyone."""
    return not llm.engine._thread.is_alive()


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2), (1, 3)], ids=str)
def test_ranks_take_tokens_where_they_lie(layout: tuple[int, int], lagging: Make, data: Callable[[str], Path]) -> None:
    """A step is sent before the tokens that it follows are known, and the outputs are one rank's: all kinds of sampling,
    branches, beams, grammars, stops, preempted ones, hits in the prefix cache."""
    stages = layout[1]
    prompts = ["Once upon a time there was a little girl. " * 3 + word for word in ("She", "Tom", "a", "The") * 2]
    llm = lagging(layout=layout, kv_cache_memory_bytes=(1 << 18) // stages)
    executor, early = group(llm), 0
    step, batch = executor._hub.step, executor.rank.batch

    def sent(frame: bytes) -> None:
        nonlocal early
        assert stages > 1 or decode_step(frame)[1] == []
        unknown = executor._unknown >= stages if stages > 1 else (batch.known < batch.lengths).any()
        early += bool(unknown)
        step(frame)

    executor._hub.step = sent  # type: ignore[method-assign]
    found = words(said(llm, prompts))
    assert early > 20
    assert until(lambda: llm.engine.stats().preemptions)  # what is told is a little old
    assert llm.engine.pool.check() == []
    one = LLM(str(data("model-stories260k/hf")), **COMMON)
    assert found == words(said(one, prompts))
    one.shutdown()


def words(said: list[Any]) -> list[Any]:
    """Without scores: sums over ranks are rounded otherwise than one rank's."""
    return [[(tokens, text, why) for tokens, text, _, why in outputs] for _, outputs in said]


def test_streams_are_cancelled_while_two_steps_fly(lagging: Make) -> None:
    """Whoever is left gets what it would have got alone; each ends once."""
    llm = lagging(kv_cache_memory_bytes=1 << 20)
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [[1, 2, 3 + number] for number in range(6)]
    wanted = [llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    engine = llm.engine
    events = gathered(llm, 30, lambda: [engine.abort(f"c{number}") for number in (1, 3, 5)])
    with engine._wake:  # all begin at once
        for number, prompt in enumerate(prompts):
            engine.submit(Request(request_id=f"c{number}", prompt_token_ids=prompt, sampling=sampling))
    assert until(lambda: sum(isinstance(event, Finished) for event in events) == 6)
    for number, tokens in enumerate(wanted):
        own = [event for event in events if event.request_id == f"c{number}"]
        got = [token for event in own if isinstance(event, Token) for token in event.token_ids]
        assert got == list(tokens)[: len(got)]
        assert isinstance(own[-1], Finished)
        assert own[-1].reason == ("abort" if number % 2 else "length")
    assert until(lambda: engine.pool.num_used == 0)
    assert engine.pool.check() == []


HELD = """
import threading
import kvasir.engine.answers
import kvasir.engine.rank as module

launch, result, news, last = module.Rank.launch, module.Outcome.result, threading.Condition(), 0

def launched(rank, step):
    global last
    outcome = launch(rank, step)
    with news:
        last = step.id
        news.notify_all()
    return outcome

def told(outcome):
    with news:
        if 8 <= outcome.step < 20 and not news.wait_for(lambda: last >= outcome.step + 2, 20):
            raise RuntimeError(f"step {outcome.step + 2} waits for what {outcome.step} gave")
    return result(outcome)

module.Rank.launch, module.Outcome.result = launched, told
"""
"""Nobody is told what a step gave before the second one behind it, which follows its tokens, is launched in the last stage."""


def test_stages_are_launched_before_any_host_knows_what_they_follow(lagging: Make) -> None:
    llm = lagging(HELD, (1, 2), kv_cache_memory_bytes=1 << 20)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3], [1, 2, 4]], sampling, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_a_rank_that_dies_under_two_steps_is_told_to_each_stream_once(layout: tuple[int, int], lagging: Make) -> None:
    llm = lagging(layout=layout, kv_cache_memory_bytes=1 << 20)
    (peer,) = group(llm)._hub._peers.values()
    events = gathered(llm, 30, lambda: os.kill(peer.pid, signal.SIGKILL))
    sampling = SamplingParams(temperature=1, seed=1, max_tokens=450, ignore_eos=True)
    for number in range(3):
        llm.engine.submit(Request(request_id=f"d{number}", prompt_token_ids=[1, 2, 3], sampling=sampling))
    assert until(lambda: over(llm))
    ends = [event for event in events if not isinstance(event, Token)]
    assert sorted(event.request_id for event in ends) == ["d0", "d1", "d2"]
    assert all(isinstance(end, Failed) and "rank 1" in end.message and "SIGKILL" in end.message for end in ends)


class Never:
    """A device's event that is never reached: a kernel waits for another rank."""

    def query(self) -> bool:
        return False


def test_a_device_that_is_never_done_is_given_up(lagging: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream is told within the limit, and the other rank's process ends."""
    llm = lagging(kv_cache_memory_bytes=1 << 20)
    events, executor = gathered(llm), group(llm)
    (peer,) = executor._hub._peers.values()
    patience = Patience(0.2)
    executor.rank.mesh.patience = patience

    def stuck(copy: Copy, tensor: Any, patience: Any = None) -> None:
        copy._host, copy._arrived, copy._patience = tensor, Never(), patience  # type: ignore[assignment]

    monkeypatch.setattr(Copy, "__init__", stuck)
    # the second one's rules look at tokens on the host while a step is launched
    for number, sampling in enumerate((MIX[0], MIX[6])):
        llm.engine.submit(Request(request_id=f"h{number}", prompt_token_ids=[1, 2, 3], sampling=sampling))
    assert until(lambda: over(llm))
    assert [type(event) for event in events] == [Failed, Failed]
    assert all("--collective-timeout" in event.message for event in events if isinstance(event, Failed))
    assert until(lambda: not os.path.exists(f"/proc/{peer.pid}"))


STUCK = """
import kvasir.engine.rank as module

class Stuck(module.Copy):
    made = 0  # the first ones, of the start, arrive

    def __init__(self, tensor, patience):
        super().__init__(tensor, type(patience)(0.2))
        Stuck.made += 1
        self._arrived = self if Stuck.made > 9 else None

    def query(self):
        return False

module.Copy = Stuck
"""


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_another_rank_whose_device_is_never_done_says_so_and_ends(layout: tuple[int, int], lagging: Make) -> None:
    llm = lagging(STUCK, layout, kv_cache_memory_bytes=1 << 20)
    events, executor = gathered(llm), group(llm)
    (peer,) = executor._hub._peers.values()
    llm.engine.submit(Request(request_id="h", prompt_token_ids=[1, 2, 3], sampling=MIX[0]))
    assert until(lambda: over(llm))
    last = events[-1]
    assert isinstance(last, Failed)
    assert re.search(r"rank 1 .* failed: RuntimeError: timed out: .* 0.2 s .--collective-timeout", last.message)
    assert until(lambda: not os.path.exists(f"/proc/{peer.pid}"))


def test_a_launch_that_never_ends_is_given_up(lagging: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all that waits for a device can be interrupted."""
    llm = lagging(kv_cache_memory_bytes=1 << 20)
    events, executor, ever = gathered(llm), group(llm), threading.Event()
    limited = replace(executor._config, collective_timeout=0.2)
    monkeypatch.setattr(executor, "_config", limited)
    monkeypatch.setattr(executor.rank, "launch", lambda step: ever.wait())
    llm.engine.submit(Request(request_id="h", prompt_token_ids=[1, 2, 3], sampling=MIX[0]))
    try:
        assert until(lambda: over(llm))
        (event,) = events
        assert isinstance(event, Failed)
        assert "longer than 0.2 s (--collective-timeout)" in event.message
    finally:
        ever.set()


def test_who_waits_for_a_device_is_told_that_its_group_is_given_up() -> None:
    patience = Patience(60)
    threading.Timer(0.01, patience.end).start()
    with pytest.raises(RuntimeError, match="another rank is gone"):
        patience.wait(Never())  # type: ignore[arg-type]
    freed = type("Freed", (), {"query": lambda _: True})()  # since exchanges that are aborted end the kernels
    with pytest.raises(RuntimeError, match="another rank is gone"):
        patience.wait(freed)
    Patience(60).wait(freed)
