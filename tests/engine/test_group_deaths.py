"""Ranks in processes of their own that die, stop or hang: a message that says why, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from waiting import until

from kvasir.engine import worker
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Event, Token
from kvasir.engine.executor import GroupExecutor, hangs
from kvasir.engine.llm import LLM
from kvasir.engine.request import Request, SamplingParams
from kvasir.kernels.native import library

LAYOUTS = [(2, 1), (1, 2), (2, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)


def pids(llm: LLM) -> dict[int, int]:
    executor = llm.engine._executor
    assert isinstance(executor, GroupExecutor)
    return {rank: peer.pid for rank, peer in executor._hub._peers.items()}


def gone(pid: int) -> bool:
    return until(lambda: not os.path.exists(f"/proc/{pid}"))


def on_and_on(llm: LLM, sampling: SamplingParams) -> None:
    for _ in range(1000):
        llm.generate(["Once"] * 4, sampling, use_tqdm=False)


DEATHS = {
    "killed": (lambda llm, pid: os.kill(pid, signal.SIGKILL), "died: killed by SIGKILL"),
    "stopped": (lambda llm, pid: os.kill(pid, signal.SIGSTOP), "was stopped"),
    "crashed": (lambda llm, pid: os.kill(pid, signal.SIGSEGV), "died: killed by SIGSEGV"),
    "raised": (lambda llm, pid: llm.engine._executor._hub.step(b"\xff\xff\xff\xff"), "failed: ValueError"),
}


@pytest.mark.parametrize(("layout", "how"), [((2, 1), "killed"), ((1, 2), "stopped"), ((2, 2), "raised")])
def test_a_death_ends_every_request(stories: dict[str, Any], layout: tuple[int, int], how: str) -> None:
    strike, says = DEATHS[how]
    llm = LLM(**stories, tensor_parallel_size=layout[0], pipeline_parallel_size=layout[1])
    others = pids(llm)
    sampling = SamplingParams(temperature=1, seed=1, max_tokens=450, ignore_eos=True)

    def when_it_runs() -> None:
        until(lambda: llm.engine.stats().running)
        strike(llm, others[max(others)])

    striker = threading.Thread(target=when_it_runs)
    striker.start()
    with pytest.raises(UnavailableError, match=says):
        on_and_on(llm, sampling)
    striker.join()
    assert all(gone(pid) for pid in others.values())
    with pytest.raises(UnavailableError):
        llm.generate(["Once"], sampling, use_tqdm=False)
    llm.shutdown()


@pytest.mark.skipif(library() is None, reason="no compiled kernels")
def test_an_exchange_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(**stories, tensor_parallel_size=2, collective_timeout=60.0)  # starting takes seconds on a busy machine
    meeting = llm.engine._executor.loaded.decoder.mesh.meeting
    assert meeting is not None
    meeting._state.timeout_ns = 10**9  # so that nobody waits for a minute
    others = pids(llm)
    monkeypatch.setattr(llm.engine._executor._hub, "step", lambda frame: None)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"longer than 60 s .--collective-timeout.: a rank or a link hangs"):
        llm.generate(["Once"], GREEDY, use_tqdm=False)
    assert all(gone(pid) for pid in others.values())


def test_a_later_stage_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one waits for no exchange with it, only for its results."""
    llm = LLM(**stories, pipeline_parallel_size=2, collective_timeout=60.0)
    others, executor = pids(llm), llm.engine._executor
    limited = replace(executor._config, collective_timeout=1.0)  # type: ignore[attr-defined]
    monkeypatch.setattr(executor, "_config", limited)
    monkeypatch.setattr(executor._hub, "step", lambda frame: None)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"longer than 1 s .--collective-timeout.: a rank or a link hangs"):
        llm.generate(["Once"], GREEDY, use_tqdm=False)
    assert all(gone(pid) for pid in others.values())


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_first_stage_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch, behind: bool) -> None:
    """Before it hands on, so that the next stage waits, or behind that, when nobody waits for it but who launches steps."""
    llm = LLM(**stories, pipeline_parallel_size=2, collective_timeout=60.0)
    others, executor, ever = pids(llm), llm.engine._executor, threading.Event()
    assert isinstance(executor, GroupExecutor)
    monkeypatch.setattr(executor, "_config", replace(executor._config, collective_timeout=1.0))
    forward = executor.rank.forward

    def stands_still(*args: Any) -> None:
        if behind:
            forward(*args)
        ever.wait(60)

    monkeypatch.setattr(executor.rank, "forward", stands_still)
    try:
        with pytest.raises(UnavailableError, match=r"longer than 1 s .--collective-timeout.: a rank or a link hangs"):
            llm.generate(["Once"], GREEDY, use_tqdm=False)
    finally:
        ever.set()
    assert all(gone(pid) for pid in others.values())


def test_an_exchange_that_was_waited_for_in_vain_names_its_limit() -> None:
    """Whoever waits is not to blame, and no line of its code is."""
    said = worker._explained(
        RuntimeError("[buffer.cc:78] Timed out waiting 5000ms for recv"), EngineConfig(collective_timeout=5)
    )
    assert said == {"why": hangs(EngineConfig(collective_timeout=5)), "final": False}
    assert "5 s (--collective-timeout): a rank or a link hangs" in said["why"]


SCRIPT = """
import json, os, sys, time
from kvasir.engine import LLM
llm = LLM(**json.loads(sys.argv[1]), tensor_parallel_size=3)
print(*(peer.pid for peer in llm.engine._executor._hub._peers.values()), flush=True)
time.sleep(60)
"""


def test_ranks_end_with_their_rank_0(stories: dict[str, Any]) -> None:
    """Where somebody would continue it, also one that stands still."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(stories)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        others = [int(pid) for pid in process.stdout.readline().split()]
        if sys.platform == "linux":
            os.kill(others[0], signal.SIGSTOP)
        process.kill()  # before it sees that
    try:
        assert len(others) == 2
        assert all(gone(pid) for pid in others)
    finally:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def watched(llm: LLM) -> tuple[list[str], Counter[str]]:
    """(requests that the engine took, how often each of them ended), of one sequence each"""
    asked: list[str] = []
    ends: Counter[str] = Counter()
    submit, deliver = llm.engine.submit, llm.engine._deliver

    def ask(request: Request) -> None:
        submit(request)
        asked.append(request.request_id)

    def take(events: Sequence[Event]) -> None:
        ends.update(event.request_id for event in events if not isinstance(event, Token))
        deliver(events)

    llm.engine.submit, llm.engine._deliver = ask, take  # type: ignore[method-assign]
    return asked, ends


WAYS = [*sorted(DEATHS), "raise", "out of memory"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos(
    stories: dict[str, Any], orders: Any, segments: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 groups die (and seven more as actors, tests/cluster/test_group_ranks.py, which hang, too): any rank but this process, at
    any moment, in any way. Every request ends once, and nothing is left behind."""
    monkeypatch.syspath_prepend(orders.path)
    rng = random.Random(0)
    before = segments()
    for how in WAYS * 4:
        tp, pp = rng.choices(LAYOUTS, (2, 2, 1))[0]  # of four ranks three start beside this process
        llm = LLM(**stories, tensor_parallel_size=tp, pipeline_parallel_size=pp)
        others, asked, ends = pids(llm), *watched(llm)
        strike = DEATHS[how][0] if how in DEATHS else lambda _, pid, how=how: orders.give(pid, how)
        timer = threading.Timer(rng.random() * 0.5, strike, (llm, rng.choice(sorted(others.values()))))
        timer.start()
        with pytest.raises(UnavailableError):
            on_and_on(llm, SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
        timer.join()
        assert all(gone(pid) for pid in others.values()), how
        llm.shutdown()
        assert ends == Counter(asked), how
    assert until(lambda: segments() <= before), segments()
