"""Planning ahead changes nothing: the scheduler with results that come late against the one that waits for each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import ALL_NEAR, WINDOWS, World

from kvasir.engine.event import Failed, Finished, Pooled, Token
from kvasir.engine.layout import Layout
from kvasir.engine.request import PoolingParams
from kvasir.engine.scheduler import ONE_GROUP

Ask = tuple[int, dict[str, Any]]
"""(turns after the one before it, what `World.add` takes)"""


@st.composite
def asks(draw: st.DrawFn) -> list[Ask]:
    found: list[Ask] = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = [5] * draw(st.sampled_from((0, 3, 17, 30))) + draw(
            st.lists(st.integers(8, 40), min_size=1, max_size=9)
        )
        fields: dict[str, Any] = {"prompt": prompt, "priority": draw(st.sampled_from((0, 0, 1)))}
        kind = draw(st.sampled_from(("one", "one", "many", "beams", "scored", "pooled")))
        if kind == "pooled":
            fields["pooling"] = PoolingParams()
        else:
            fields |= {"max_tokens": draw(st.sampled_from((1, 2, 9, 30))), "ignore_eos": draw(st.booleans())}
            fields["prompt_logprobs"] = 0 if kind == "scored" else None
        if kind in ("many", "beams"):
            fields |= {"n": draw(st.integers(1, 4)), "use_beam_search": kind == "beams"}
        found.append((draw(st.sampled_from((0, 0, 1, 4))), fields))
    return found


def told(world: World) -> dict[tuple[str, int], list[Any]]:
    """What each continuation was told, without what depends on when: times, hits in the cache, preemptions."""
    found: dict[tuple[str, int], list[Any]] = {}
    for event in world.events:
        said = found.setdefault((event.request_id, getattr(event, "index", 0)), [])
        if isinstance(event, Token):
            said.append((event.token_ids, event.logprobs, event.prompt_logprobs))
        elif isinstance(event, Finished):
            said.append((event.reason, event.stop_token_id, event.prompt_tokens, event.output_tokens))
        elif isinstance(event, Pooled):
            said.append(event.values)
    return found


def served(wanted: list[Ask], **options: Any) -> World:
    world = World(limit=80, pool_last=True, **options)
    for number, (turns, fields) in enumerate(wanted):
        for _ in range(turns):
            world.step()
        world.add(f"r{number}", **fields)
    world.run()
    return world


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, ALL_NEAR], ids=["one", "windows", "near"])
@given(wanted=asks(), depth=st.integers(1, 3), seats=st.sampled_from((1, 3, 20)), data=st.data())
@settings(max_examples=30)
def test_the_same_is_told(layout: Layout, wanted: list[Ask], depth: int, seats: int, data: st.DataObject) -> None:
    size, budget = data.draw(st.sampled_from((1, 4, 16))), data.draw(st.sampled_from((1, 7, 64)))
    blocks = max(-(-80 // size) + 1, layout.peak(80, size, budget)) + data.draw(st.sampled_from((0, 3, 200)))
    options = {
        "layout": layout, "seats": seats, "size": size, "budget": budget, "blocks": blocks,
        "stretch_len": data.draw(st.sampled_from((None, 20))),
    }  # fmt: skip
    plain = served(wanted, **options)
    ahead = served(wanted, **options, depth=depth, ahead=True)
    assert told(ahead) == told(plain)
    for world in (plain, ahead):
        for name in world.requests:
            world.check(name)
    names = ("prompt_tokens", "generation_tokens", "ended")
    assert [getattr(ahead.scheduler.stats(), name) for name in names] == [
        getattr(plain.scheduler.stats(), name) for name in names
    ]


@given(
    wanted=asks(),
    depth=st.integers(1, 2),
    cuts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12), st.sampled_from((None, 0, 1))), max_size=6),
    late=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 12)), max_size=3),
    blocks=st.sampled_from((22, 60)),
)
@settings(max_examples=60)
def test_every_request_ends_once_whatever_is_cut(
    wanted: list[Ask],
    depth: int,
    cuts: list[tuple[int, int, int | None]],
    late: list[tuple[int, int]],
    blocks: int,
) -> None:
    """Aborts and deadlines at any moment: blocks come back, and what was told before is a beginning of the whole."""
    world = World(blocks=blocks, size=4, seats=5, budget=20, limit=80, pool_last=True, depth=depth, ahead=True)
    for number, (_, fields) in enumerate(wanted):
        deadlines = [float(turns) for which, turns in late if which == number]
        world.add(f"r{number}", **fields, deadline_s=min(deadlines, default=None))
    for turn in range(14):
        for which, when, index in cuts:
            if when == turn:
                world.events += world.scheduler.abort(f"r{which}", index, now=world.now)
                assert not world.pool.check()
        world.step()
    world.run()
    ends = Counter(e.request_id for e in world.events if isinstance(e, (Failed, Finished, Pooled)))
    for name, request in world.requests.items():
        if not any(isinstance(end, Failed) for end in world.ends(name)):
            world.check(name)
        assert 1 <= ends[name] <= request.sampling.n


def test_a_stream_is_computed_while_its_last_token_is_sampled() -> None:
    world = World(budget=8, ahead=True)
    world.add("a", [1] * 20, max_tokens=4, ignore_eos=True)
    slices = []
    while (step := world.step()) is not None:
        slices += [(part.start, part.count, part.sample) for part in step.slices]
    assert slices == [(0, 8, False), (8, 8, False), (16, 4, True), (20, 1, True), (21, 1, True), (22, 1, True)]
    world.run()
    assert world.scheduler.stats().step_tokens == 23


def test_chunks_of_one_prompt_are_in_several_stages_at_once() -> None:
    world = World(budget=8, depth=3, ahead=True)
    world.add("a", [1] * 40, max_tokens=1)
    for count in range(1, 5):
        step = world.step()
        assert step is not None
        assert [(part.start, part.count) for part in step.slices] == [(8 * (count - 1), 8)]
    assert len(world.flying) == 3  # of four that were planned the first is committed
    world.run()
    world.check("a")


def test_a_prompt_that_fits_into_one_step_is_cut_for_the_stages() -> None:
    world = World(blocks=200, budget=512, depth=2, ahead=True, limit=300)
    world.add("a", [1] * 256, max_tokens=1)
    slices = []
    while (step := world.step()) is not None:
        slices += [(part.start, part.count) for part in step.slices]
    assert slices == [(0, 64), (64, 64), (128, 64), (192, 64)]
    world.run()
    world.check("a")


@pytest.mark.parametrize(("length", "depth"), [(1, 2), (6, 2), (1, 3), (20, 3)])
def test_prompts_that_come_together_are_dealt_out_over_the_stages(length: int, depth: int) -> None:
    """Each step from then on has its part of the streams; together they would be in one stage at a time."""
    world = World(blocks=200, budget=256, seats=6, depth=depth, ahead=True, limit=100)
    for number in range(6):
        world.add(f"r{number}", [number] * length, max_tokens=8, ignore_eos=True)
    sampled = []
    while (step := world.step()) is not None:
        sampled.append(sum(part.sample for part in step.slices))
    assert [count for count in sampled if count] == [6 // depth] * (8 * depth)
    world.run()
    for number in range(6):
        world.check(f"r{number}")


def test_a_token_is_awaited_where_its_stage_is_far() -> None:
    """In three stages a sequence streams in every third step."""
    world = World(depth=3, ahead=True)
    world.add("a", [1] * 5, max_tokens=3, ignore_eos=True)
    planned = []
    while world.scheduler.has_work:
        step = world.step()
        planned.append(step is not None and bool(step.slices))
    assert world.rank.tokens == 7
    world.check("a")


def test_what_follows_an_end_is_thrown_away_and_not_counted() -> None:
    world = World(ahead=True)
    stops = list(range(50))
    world.add("a", [1], max_tokens=20, min_tokens=3, stop_token_ids=stops)
    world.run()
    world.check("a")
    assert world.output("a") == world.output("a")[:3]
    assert world.rank.tokens == 4  # one for nothing
    stats = world.scheduler.stats()
    assert (stats.step_tokens, stats.generation_tokens, stats.ended) == (3, 3, 1)


@pytest.mark.parametrize(
    "fields", [{"n": 3}, {"n": 2, "use_beam_search": True}, {"logits_processors": {"any": "{}"}}], ids=str
)
def test_what_is_decided_by_the_token_waits_for_it_and_others_go_on(fields: dict[str, Any]) -> None:
    world = World(ahead=True)
    world.add("plain", [2], max_tokens=6, ignore_eos=True)
    world.add("waits", [1] * 6, max_tokens=3, ignore_eos=True, **fields)
    first, second = world.step(), world.step()
    assert first is not None
    assert second is not None
    assert [part.count for part in first.slices] == [1, 6]
    assert [part.count for part in second.slices] == [1]
    world.run()
    for name in world.requests:
        world.check(name)


def test_who_lacks_blocks_waits_for_results_before_anybody_gives_up_its_own() -> None:
    world = World(blocks=8, size=4, budget=32, limit=30, ahead=True)
    for number in range(3):
        world.add(f"r{number}", [number] * 7, max_tokens=12, ignore_eos=True)
    world.run()
    for number in range(3):
        world.check(f"r{number}")
    assert world.scheduler.stats().preemptions > 0
    preempted = [end.preemptions for n in range(3) for end in world.ends(f"r{n}") if isinstance(end, Finished)]
    assert preempted[0] == 0  # the most important one
