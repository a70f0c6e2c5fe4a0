"""The scheduler over a cache with tiers below it: blocks are loaded, saved and lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scheduler_world import ALL_NEAR, WINDOWS, FakeTiers, World

from kvasir.engine.event import Finished
from kvasir.engine.layout import Layout
from kvasir.engine.scheduler import ONE_GROUP


def tiered(**options: Any) -> tuple[World, FakeTiers]:
    """A world whose cache was emptied after a prompt of 40 tokens, of which the tiers have 10 blocks of each group."""
    tiers = FakeTiers()
    world = World(blocks=60, size=4, budget=16, limit=200, tiers=tiers, **options)
    world.add("first", PROMPT, max_tokens=1)
    world.run()
    assert len(tiers.held) == 10 * len(options.get("layout", ONE_GROUP).groups)
    world.pool.reset()
    world.rank.slots.clear()
    return world, tiers


PROMPT = [random.Random(1).randrange(9, 40) for _ in range(40)]


def cached(world: World, name: str) -> int:
    (end,) = world.ends(name)
    assert isinstance(end, Finished)
    return end.cached_tokens


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, ALL_NEAR], ids=["one", "windows", "near"])
def test_a_prompt_starts_behind_what_the_tiers_have(layout: Layout) -> None:
    world, tiers = tiered(layout=layout)
    world.add("again", [*PROMPT, 1, 2], max_tokens=3, ignore_eos=True)
    assert world.step() is not None  # asks
    assert world.scheduler.loading
    assert world.scheduler.stats().waiting == world.scheduler.num_waiting == 1
    world.run()
    world.check("again")
    assert cached(world, "again") == 40
    assert tiers.loaded <= len(tiers.held)
    if layout is not ONE_GROUP:
        assert tiers.loaded < 10 * len(layout.groups)  # what no later row sees stays where it is


def test_others_compute_while_one_loads() -> None:
    world, tiers = tiered()
    tiers.answers = list  # type: ignore[method-assign]
    world.add("slow", [*PROMPT, 1], max_tokens=1)
    world.add("other", [5] * 30, max_tokens=1)
    for _ in range(8):
        world.step()
    world.check("other")
    assert world.scheduler.loading
    world.run()  # it doesn't wait for ever
    world.check("slow")
    assert cached(world, "slow") == 0
    world.pool.reset()
    world.add("next", [*PROMPT, 2], max_tokens=1)  # a tier that hangs isn't asked again
    step = world.step()
    assert step is not None
    assert step.slices
    world.scheduler.fetched(1, 10)  # it has come round
    world.pool.reset()
    world.add("last", [*PROMPT, 3], max_tokens=1)
    world.step()
    assert world.scheduler.loading


def test_who_waits_for_a_seat_has_its_blocks_read_meanwhile() -> None:
    world, tiers = tiered(seats=1)
    world.add("long", [6], max_tokens=100, ignore_eos=True)
    world.step()
    world.add("next", [*PROMPT, 1], max_tokens=1)
    world.step()
    world.step()
    assert tiers.staged
    assert not world.scheduler.loading
    world.run()
    assert cached(world, "next") == 40


def test_a_fetch_is_cut_to_what_may_be_staged() -> None:
    world, tiers = tiered()
    tiers.most_fetched = 3
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    assert cached(world, "again") == 40


@pytest.mark.parametrize("when", [0, 1, 2])
def test_ending_at_every_stage_of_a_load(when: int) -> None:
    world, tiers = tiered()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    for _ in range(when):
        world.step()
    world.scheduler.abort("again", now=world.now)
    world.run()
    assert not tiers.staged
    assert not tiers.asked


def test_what_one_rank_lacks_is_written_again() -> None:
    world, tiers = tiered()
    tiers.ranks = world.scheduler._loads._ranks = 2
    tiers.answers = lambda: [(t, n) for t in list(tiers.asked) if tiers.staged.setdefault(t, [
        tiers.held[c] for c in tiers.asked.pop(t)]) for n in (10, 4)]  # type: ignore[method-assign]  # fmt: skip
    tiers.saved.clear()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    assert cached(world, "again") == 16
    assert len(tiers.saved) == 6


def test_use_is_told_tail_first_and_what_was_lost_below_is_saved_again() -> None:
    world, tiers = tiered()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    chain = [*tiers.held][:10]
    assert tiers.used[-1] == (10, chain[::-1])
    assert tiers.used[-2] == (0, chain[::-1])
    tiers.held.clear()
    tiers.saved.clear()
    world.add("warm", [*PROMPT, 2], max_tokens=1)  # out of the cache
    world.run()
    assert tiers.saved == chain


def test_what_is_cached_does_not_make_room_for_what_follows_it() -> None:
    tiers = FakeTiers()
    world = World(blocks=12, size=4, budget=16, limit=48, tiers=tiers)
    for name, prompt in (("whole", PROMPT), ("head", PROMPT[:21]), ("other", [5] * 24), ("again", PROMPT)):
        if name == "head":
            world.pool.reset()
        world.add(name, prompt, max_tokens=1)
        world.run()
    assert tiers.loaded == 5 + 4
    assert cached(world, "again") == 36


def test_a_preempted_sequence_asks_the_tiers() -> None:
    tiers = FakeTiers()
    world = World(blocks=12, size=4, seats=4, budget=16, limit=48, tiers=tiers)
    for name in "ab":
        world.add(name, [ord(name)] * 14, max_tokens=20, ignore_eos=True)
    world.run()
    assert world.scheduler.stats().preemptions > 0
    assert tiers.loaded > 0
    for name in "ab":
        world.check(name)
