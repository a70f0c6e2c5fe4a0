"""What becomes of requests at every stage: deadlines, ends, refusals, counts."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_world import VOCABULARY, World, seats_of

from kvasir.engine.errors import ClientError
from kvasir.engine.event import Failed, Finished
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.step import Result


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_deadlines_hold_at_every_stage(steps: int) -> None:
    """Waiting, in its prompt, streaming."""
    world = World(budget=8, seats=1 if steps == 0 else 4)
    if steps == 0:
        world.add("before", [1], max_tokens=30, ignore_eos=True)
    world.add("late", [2] * 20, max_tokens=50, ignore_eos=True, deadline_s=steps + 0.5, n=2)
    world.run()
    (end,) = world.ends("late")
    assert isinstance(end, Failed)
    assert end.code == "deadline_exceeded"


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_cancelling_at_every_stage(steps: int, index: int | None) -> None:
    world = World(budget=8)
    world.add("a", [1] * 20, n=2, max_tokens=10, ignore_eos=True)
    for _ in range(steps):
        world.step()
    events = world.scheduler.abort("a", index, now=world.now)
    assert {e.index for e in events} == ({0, 1} if index is None else {index})
    assert not world.scheduler.abort("a", index, now=world.now)
    assert not world.scheduler.abort("unknown")
    world.events += events
    world.run()
    world.check("a")


def test_an_abort_while_the_step_runs_gives_blocks_back_at_its_commit() -> None:
    world = World()
    world.add("a", [1] * 10, max_tokens=4)
    step = world.scheduler.plan(0.0)
    assert step is not None
    assert world.scheduler.abort("a")
    assert world.pool.num_used == 3
    assert world.scheduler.commit(step, world.rank.run(step), 0.0) == []
    world.run()


def test_a_stop_string_found_outside_ends_a_continuation() -> None:
    world = World()
    world.add("a", [1], max_tokens=50, ignore_eos=True)
    world.step()
    (end,) = world.scheduler.abort("a", 0, "stop")
    assert isinstance(end, Finished)
    assert end.reason == "stop"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 95, "max_tokens": 10}, "--max-model-len"),
        ({"prompt": [1] * 100, "max_tokens": None}, "100 prompt tokens"),
        ({"prompt": [1] * 60, "max_tokens": 30, "blocks": 10}, "--kv-cache-memory-bytes"),
        ({"prompt": [1], "resume": [2], "n": 2}, "n = 1"),
        ({"prompt": [1], "resume": [2, 3], "max_tokens": 2}, "resume_token_ids"),
    ],
)
def test_requests_that_can_never_run_are_refused(fields: dict[str, Any], says: str) -> None:
    world = World(blocks=fields.pop("blocks", 64))
    with pytest.raises(ClientError, match=says):
        world.add("a", **fields)
    assert not world.scheduler.has_work


def test_an_id_is_used_once() -> None:
    world = World()
    world.add("a", [1])
    with pytest.raises(ClientError, match="in use"):
        world.add("a", [1])


def test_a_step_costs_the_same_however_long_the_context_is() -> None:
    """Planning a token touches no old token: tokens behind a sentinel that explodes when it is copied or sliced."""

    class Untouchable(list[int]):
        def __getitem__(self, key: Any) -> Any:
            assert not isinstance(key, slice) or (key.stop or 0) - (key.start or 0) <= 4
            return super().__getitem__(key)

        def __iter__(self) -> Any:
            raise AssertionError("all tokens were read")

    world = World(blocks=400, size=4, limit=1500, budget=2000)
    world.add("a", [1] * 1000, max_tokens=100, ignore_eos=True)
    world.step()
    ((_, sequence),) = world.scheduler._seats.running
    sequence.tokens = Untouchable(sequence.tokens)
    for _ in range(20):
        step = world.scheduler.plan(0.0)
        assert step is not None
        world.scheduler.commit(step, Result(step.id, [1]), 0.0)
    assert len(sequence.tokens) == 1021


def test_stats_count_tokens() -> None:
    world = World(budget=8)
    world.add("a", [1] * 20, max_tokens=3, ignore_eos=True)
    assert world.scheduler.stats().queued_prefill_tokens == 20
    world.step()
    stats = world.scheduler.stats()
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (1, 0, 12)
    assert stats.kv_usage == 5 / 64
    world.run()
    stats = world.scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.step_tokens, stats.kv_usage) == (20, 3, 22, 0)


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    world = World()
    for i in range(200):
        world.add(str(i), [1], max_tokens=1, deadline_s=1e6)
    world.run()
    world.add("one more", [1], max_tokens=1, deadline_s=1e6)
    assert len(world.scheduler._deadlines) == 1


def test_a_deadline_belongs_to_one_request_even_if_its_id_is_used_again() -> None:
    world = World()
    world.add("a", [1], max_tokens=1, deadline_s=5)
    world.run()
    world.add("a", [1], max_tokens=30, ignore_eos=True)
    world.run()
    assert all(isinstance(end, Finished) for end in world.ends("a"))


@pytest.mark.parametrize(("blocks", "limit"), [(100, 64), (2, 64)], ids=["context", "cache"])
def test_more_resumed_tokens_than_fit_are_refused(blocks: int, limit: int) -> None:
    """Accepted, they would overrun the ranks' rows, or wait for ever and let nobody pass."""
    world = World(blocks=blocks, size=16, limit=limit)
    with pytest.raises(ClientError, match="leave no room"):
        world.add("a", [1] * 10, resume=[2] * 100, max_tokens=None)
    world.add("b", [1], max_tokens=1)
    world.run()
    world.check("b")


def test_cached_tokens_are_tokens_of_the_prompt() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1)
    world.run()
    world.add("b", [1] * 4, resume=[1] * 12, max_tokens=13, ignore_eos=True)
    world.run()
    (end,) = world.ends("b")
    assert isinstance(end, Finished)
    assert (end.prompt_tokens, end.cached_tokens) == (4, 4)


def test_an_adapter_has_blocks_of_its_own() -> None:
    world = World(blocks=40, size=4, budget=64)
    for name, adapter in (("a", "x"), ("b", "y")):
        world.scheduler.add(
            Request(request_id=name, prompt_token_ids=[1] * 16, sampling=SamplingParams(max_tokens=1), adapter=adapter), 0.0
        )  # fmt: skip
        assert seats_of(world.step()) == [(0, 0, 16)]


def test_no_stop_before_min_tokens() -> None:
    """The sampler mutes stop tokens; the scheduler wouldn't take one either."""
    world = World()
    world.add("a", [1], max_tokens=20, min_tokens=6, stop_token_ids=list(range(VOCABULARY)))
    world.run()
    assert len(world.output("a")) == 6


def test_a_sequence_that_grows_too_long_starts_again_stretched() -> None:
    world = World(blocks=60, size=4, budget=64, limit=100, stretch_len=20)
    world.add("a", [5] * 16, max_tokens=10, ignore_eos=True)
    stretched = []
    while world.scheduler.has_work:
        step = world.step()
        stretched += [new.stretched for new in step.new] if step else []
    assert stretched == [False, True]
    world.check("a")
    (end,) = world.ends("a")
    assert isinstance(end, Finished)
    assert end.preemptions == 0
