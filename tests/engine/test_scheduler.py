"""The scheduler against a cache that remembers what was written where: whatever the sizes, every output is the same."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from fuzzing import examples
from scheduler_world import ALL_NEAR, CHUNKS, RULES, VOCABULARY, WINDOWS, FakeTiers, World, seats_of

from kvasir.engine.errors import ClientError
from kvasir.engine.event import Finished, Token
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.request import PoolingParams
from kvasir.engine.scheduler import ONE_GROUP


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, CHUNKS, ALL_NEAR], ids=["one", "windows", "chunks", "near"])
@pytest.mark.parametrize("seed", range(examples(10)))
def test_outputs_do_not_depend_on_sizes_order_or_memory(seed: int, layout: Layout) -> None:
    draw = random.Random(seed)
    tiers = FakeTiers(1 + seed % 3 // 2, (1000, 3)[seed % 2], seed) if seed % 3 else None
    size, budget = draw.choice((1, 2, 4, 16)), draw.choice((1, 3, 16, 200))
    blocks = draw.choice((100, 140, 400)) // size + 1
    if layout is not ONE_GROUP:
        blocks = max(blocks, layout.peak(90, size, budget) + draw.choice((0, 1, 5)))
    world = World(
        blocks=blocks, size=size, seats=draw.choice((1, 2, 5, 20)), budget=budget, limit=90,
        prefix_caching=draw.random() < 0.8, layout=layout, stretch_len=draw.choice((None, None, 30)), pool_last=True,
        tiers=tiers, depth=draw.choice((1, 1, 2, 3)), ahead=draw.random() < 0.7,
    )  # fmt: skip
    trunk = [draw.randrange(VOCABULARY) for _ in range(40)]
    waiting = [f"r{i}" for i in range(25)]
    cut: set[str] = set()
    for _ in range(30000):
        if waiting and draw.random() < 0.3:
            prompt = trunk[: draw.randrange(41)] + [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 15))]
            if draw.random() < 0.1:
                world.add(waiting.pop(), prompt, pooling=PoolingParams())
                continue
            wanted = draw.choice((1, 2, 8, 30))
            if draw.random() < 0.25:
                width = draw.choice((1, 2, 5))
                world.add(
                    waiting.pop(), prompt, priority=draw.choice((0, 0, 1)), n=width, best_of=width + draw.choice((0, 2)),
                    use_beam_search=True, max_tokens=wanted, ignore_eos=draw.random() < 0.3,
                    early_stopping=draw.random() < 0.3, prompt_logprobs=draw.choice((None, None, 0)),
                    structured_outputs=draw.choice((None, None, RULES)),
                )  # fmt: skip
                continue
            resume = [1, 2][: draw.choice((0, 0, 2))] if wanted > 2 else []
            world.add(
                waiting.pop(), prompt, priority=draw.choice((0, 0, 1)), salt=draw.choice(("", "x")),
                n=1 if resume else draw.choice((1, 1, 2, 4)), max_tokens=wanted, resume=resume,
                min_tokens=draw.choice((0, 1)), ignore_eos=draw.random() < 0.3,
                prompt_logprobs=draw.choice((None, None, 0)), structured_outputs=draw.choice((None, RULES)),
            )  # fmt: skip
        if world.requests and draw.random() < 0.05:
            name = draw.choice(list(world.requests))
            index = draw.choice((None, 0, 1))
            world.events += world.scheduler.abort(name, index, now=world.now)
            assert not world.pool.check()
            cut.add(name)
        world.step()
        if not waiting and not world.scheduler.has_work:
            break
    world.run()
    assert tiers is None or not tiers.staged
    for name in world.requests:
        world.check(name)
        scored = [
            e.prompt_logprobs
            for e in world.events
            if isinstance(e, Token) and e.request_id == name and e.prompt_logprobs
        ]
        ended = not cut & {name} and all(isinstance(end, Finished) for end in world.ends(name))
        if world.requests[name].sampling.prompt_logprobs is not None and ended:
            (scores,) = scored
            assert [s and s.logprob for s in scores] == [
                None,
                *(-float(p) for p in range(1, len(world.requests[name].prompt_token_ids))),
            ]


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS], ids=["one", "windows"])
@pytest.mark.parametrize(("seats", "blocks", "caching"), [(1, 60, True), (8, 11, True), (8, 11, False), (2, 24, False)])
def test_beams_that_do_not_fit_at_once_wait_for_each_other(
    seats: int, blocks: int, caching: bool, layout: Layout
) -> None:
    """Those that have their offers give up their places, also for what is more important than they are."""
    blocks *= len(layout.groups)
    world = World(blocks=blocks, size=4, seats=seats, budget=20, limit=36, prefix_caching=caching, layout=layout)
    for name in ("a", "b"):
        world.add(name, [1, 2, 3] * 4, n=3, best_of=6, use_beam_search=True, max_tokens=20, ignore_eos=True)
    for _ in range(8):
        world.step()
    world.add("urgent", [5] * 9, priority=-1, max_tokens=24, ignore_eos=True)
    world.add("later", [6] * 20, max_tokens=12, ignore_eos=True)
    world.run()
    for name in world.requests:
        world.check(name)


def test_a_long_prompt_does_not_stall_streams_or_short_prompts() -> None:
    world = World(blocks=400, size=4, budget=16, limit=500)
    world.add("stream", [1], max_tokens=100, ignore_eos=True)
    world.step()
    world.add("long", [2] * 300, max_tokens=2, ignore_eos=True)
    world.step()
    world.add("short", [3] * 6, max_tokens=2, ignore_eos=True)
    for _ in range(2):
        step = world.step()
        assert step is not None
        assert step.slices[0].count == 1  # the stream, first
        assert sum(part.count for part in step.slices) == 16
    assert len(world.output("short")) >= 1
    assert not world.output("long")


def test_prompts_make_progress_however_many_streams_there_are() -> None:
    world = World(blocks=400, size=4, seats=30, budget=8, limit=200)
    for i in range(20):
        world.add(f"s{i}", [i + 1], max_tokens=60, ignore_eos=True)
    for _ in range(40):
        world.step()
    world.add("prompt", [9] * 20, max_tokens=1, ignore_eos=True)
    for _ in range(15):
        world.step()
    assert world.output("prompt")
    lengths = [len(world.output(f"s{i}")) for i in range(20)]
    assert max(lengths) - min(lengths) <= 4  # streams that don't fit together take turns


def test_streams_are_dealt_out_evenly_among_stages() -> None:
    """Each of two stages always has half of them; when some end, those that are left are dealt out anew."""
    world = World(blocks=400, size=4, budget=64, limit=200, depth=2, ahead=True)
    for i in range(8):
        world.add(f"s{i}", [i + 1], max_tokens=30 if i < 4 else 60, ignore_eos=True)
    seats = [{part.seat for part in step.slices} for step in (world.step() for _ in range(100)) if step is not None]
    steady = seats[1:50]
    assert {len(each) for each in steady} == {4}
    assert all(len(one | two) == 8 for one, two in pairwise(steady))
    assert {len(each) for each in seats[64:100]} == {2}


def test_lower_priority_numbers_go_first() -> None:
    world = World(seats=1)
    world.add("a", [1], max_tokens=1)
    world.add("late", [2], max_tokens=1, priority=5)
    world.add("soon", [3], max_tokens=1, priority=-1)
    world.run()
    assert [e.request_id for e in world.events if isinstance(e, Finished)] == ["soon", "a", "late"]


def test_a_request_that_lacks_blocks_is_not_overtaken() -> None:
    world = World(blocks=10, size=4, limit=40, budget=64)
    world.add("first", [1] * 20, max_tokens=4, ignore_eos=True)
    world.step()
    world.add("big", [2] * 30, max_tokens=4, ignore_eos=True)
    world.add("small", [3], max_tokens=1)
    world.run()
    scheduled = {e.request_id: e.timing.scheduled for e in world.events if isinstance(e, Finished)}
    assert scheduled["first"] < scheduled["big"] <= scheduled["small"]


def test_a_blocked_prompt_is_not_looked_up_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(blocks=12, size=4, limit=48, budget=64)
    world.add("first", [1] * 20, max_tokens=20, ignore_eos=True)
    world.step()
    world.add("big", [2] * 40, max_tokens=4, ignore_eos=True)
    looked: list[int] = []
    match = world.pool.match
    monkeypatch.setattr(world.pool, "match", lambda ids: looked.append(1) or match(ids))
    for _ in range(10):
        world.step()
    assert len(looked) == 1
    world.run()
    world.check("big")


def test_who_was_blocked_by_some_that_came_and_went_in_a_step_is_seated() -> None:
    """No block was taken while it looked for some, so none seems to be given back."""
    world = World(layout=ALL_NEAR, blocks=137, size=1, seats=3, budget=64, limit=80, pool_last=True)
    for number in range(3):
        world.add(f"r{number}", [10 + number] * 38, pooling=PoolingParams())
    world.run()
    assert world.scheduler.stats().ended == 3


def test_the_least_important_gives_up_its_blocks() -> None:
    world = World(blocks=8, size=4, limit=32, budget=64)
    world.add("important", [1] * 8, max_tokens=20, ignore_eos=True)
    world.add("other", [2] * 8, max_tokens=20, ignore_eos=True, priority=1)
    world.run()
    preempted = {e.request_id: e.preemptions for e in world.events if isinstance(e, Finished)}
    assert preempted["important"] == 0
    assert preempted["other"] >= 1
    for name in preempted:
        world.check(name)


def test_a_prompt_that_is_all_cached_computes_one_block() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1)
    world.run()
    world.add("b", [1] * 16, max_tokens=1)
    assert seats_of(world.step()) == [(0, 12, 4)]
    (end,) = world.ends("b")
    assert isinstance(end, Finished)
    assert end.cached_tokens == 12
    stats = world.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (32, 12)


def test_a_salt_keeps_tenants_apart() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1, salt="x")
    world.run()
    world.add("b", [1] * 16, max_tokens=1, salt="y")
    assert seats_of(world.step()) == [(0, 0, 16)]


def test_branches_share_full_blocks_and_copy_the_last() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 10, n=3, max_tokens=4, ignore_eos=True)
    world.step()
    assert world.pool.num_used == 3 + 2  # the branches have a last block of their own
    step = world.step()
    assert step is not None
    assert len(step.copies) == 2
    assert [part.start for part in step.slices] == [10, 9, 9]
    world.run()
    world.check("a")


def test_more_branches_than_seats() -> None:
    world = World(seats=2)
    world.add("a", [1] * 10, n=5, max_tokens=4, ignore_eos=True)
    world.run()
    world.check("a")


def test_prompts_share_a_step_evenly() -> None:
    world = World(blocks=400, size=4, budget=16, limit=500)
    world.add("a", [1] * 100, max_tokens=1)
    world.add("b", [2] * 100, max_tokens=1)
    assert [count for _, _, count in seats_of(world.step())] == [8, 8]


def test_a_newcomer_leaves_a_block_for_each_running_sequence() -> None:
    """Or it would be preempted at once, and its prompt computed twice."""
    world = World(blocks=8, size=4, limit=32, budget=64)
    world.add("a", [1] * 14, max_tokens=8, ignore_eos=True)
    world.step()
    world.add("b", [2] * 16, max_tokens=8, ignore_eos=True)
    world.step()
    assert world.scheduler.num_waiting == 1
    world.run()
    assert world.scheduler.stats().preemptions == 0


def test_what_no_row_sees_is_given_back() -> None:
    """A prompt of 400 tokens in a model of which only one of ten groups sees everything."""
    near = tuple(LayerGroup((i,), window=16) for i in range(1, 10))
    layout = Layout((LayerGroup((0,)), *near), 1)
    world = World(blocks=200, size=4, budget=16, limit=440, layout=layout)
    world.add("long", [random.Random(0).randrange(9, 40) for _ in range(400)], max_tokens=20, ignore_eos=True)
    most = 0
    while world.scheduler.has_work:
        world.step()
        most = max(most, world.pool.num_used)
    assert most <= 105 + 9 * 9
    world.check("long")
    assert all(isinstance(e, Finished) and not e.preemptions for e in world.ends("long"))


def test_a_hit_needs_only_what_later_rows_see() -> None:
    world = World(blocks=400, size=4, budget=16, limit=200, layout=WINDOWS)
    prompt = [random.Random(0).randrange(9, 40) for _ in range(100)]
    world.add("first", prompt, max_tokens=1)
    world.run()
    world.add("again", [*prompt, 1, 2, 3], max_tokens=1)
    world.run()
    (end,) = world.ends("again")
    assert isinstance(end, Finished)
    assert end.cached_tokens == 100
    world.check("again")


def test_whole_prompts_are_computed_in_one_step() -> None:
    world = World(blocks=60, size=4, budget=32, limit=100, prefix_caching=False, whole_prompts=True)
    for name, length in (("a", 20), ("b", 30), ("c", 1), ("d", 12), ("e", 32)):
        world.add(name, [5] * length, pooling=PoolingParams())
    with pytest.raises(ClientError, match=r"33 prompt tokens exceed the 32 tokens of a step .--max-num-batched-tokens"):
        world.add("too-long", [5] * 33, pooling=PoolingParams())
    while world.scheduler.has_work:
        step = world.step()
        assert step is not None
        assert all(part.start == 0 and part.pool and not part.sample for part in step.slices)
    for name in "abcde":
        world.check(name)
