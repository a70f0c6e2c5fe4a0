"""Simulated fleets: time, blocks and reports add up, and the router's policies do what they are for."""

from __future__ import annotations

import dataclasses
import random

import pytest

from kvasir.cluster.router import Router
from kvasir.cluster.simulated_group import Run, Shape, SimulatedGroup, StepTime
from kvasir.cluster.simulator import Arrival, Simulation, ideal_hits
from kvasir.engine.request import Request, SamplingParams

SMALL = Shape(step_time=StepTime(base_s=0.01, prefill_s=0.001, stream_s=0.0, context_s=0.0), num_blocks=100, budget=100)


def run(name, prompt, output):
    return Run(Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams()), output, 0.0)


def finish(group):
    group.advance(float("inf"))
    assert group.idle
    assert not group.pool.check()
    assert group.pool.num_used == 0


def test_one_request_takes_the_time_of_its_steps():
    group, one = SimulatedGroup("g", SMALL), run("a", [1] * 250, 11)
    group.submit(one, 5.0)
    finish(group)
    assert one.first_token == pytest.approx(5.0 + 3 * 0.01 + 0.25)
    assert one.finished == pytest.approx(one.first_token + 10 * 0.01)
    assert group.stats().generation_tokens == 11
    assert group.stats().step_tokens == 260


def test_prompts_share_a_step_evenly_and_streams_come_first():
    group, long, short = SimulatedGroup("g", SMALL), run("long", [1] * 1000, 2), run("short", [2] * 100, 2)
    group.submit(long, 0.0)
    group.submit(short, 0.0)
    finish(group)
    assert short.first_token == pytest.approx(2 * 0.11)
    assert long.first_token == pytest.approx(11 * 0.01 + 1.1, abs=0.02)


def test_a_second_request_finds_the_blocks_of_the_first():
    group, one, two = SimulatedGroup("g", SMALL), run("a", [1] * 160, 4), run("b", [1] * 160, 4)
    group.submit(one, 0.0)
    finish(group)
    group.submit(two, 10.0)
    assert group.stats().queued_prefill_tokens == 16
    finish(group)
    assert (one.cached, two.cached) == (0, 144)


def test_who_lacks_blocks_or_a_seat_waits():
    group = SimulatedGroup("g", Shape(step_time=SMALL.step_time, num_blocks=20, budget=100, max_num_seqs=2))
    runs = [run(str(number), [number] * 100, 20) for number in range(4)]
    for one in runs:
        group.submit(one, 0.0)
    group.advance(0.15)
    assert (group.stats().running, group.stats().waiting) == (2, 2)
    finish(group)
    assert runs[2].first_token > min(runs[0].finished, runs[1].finished)
    assert group.stats().ended == 4


def test_aborts_give_everything_back():
    group = SimulatedGroup("g", Shape(step_time=SMALL.step_time, num_blocks=20, budget=100, max_num_seqs=2))
    runs = [run(str(number), [number] * 100, 20) for number in range(4)]
    for one in runs:
        group.submit(one, 0.0)
    group.advance(0.25)
    for one in runs:
        group.abort(one)
    finish(group)
    assert group.stats().ended == 4
    assert group.stats().queued_prefill_tokens == 0


@pytest.mark.parametrize("seed", range(5))
def test_steps_in_one_go_are_steps_one_by_one(seed):
    ends = []
    for pause in (0.001, 0.07, 100.0):
        draw, group = random.Random(seed), SimulatedGroup("g", SMALL)
        runs = [run(str(i), [draw.randrange(3)] * draw.randrange(1, 200), draw.randrange(1, 30)) for i in range(20)]
        for one in runs:
            group.submit(one, 0.0)
        clock = 0.0
        while not group.idle:
            clock += pause
            group.advance(clock)
        ends.append([round(one.finished, 6) for one in runs])
    assert ends[0] == ends[1] == ends[2]


def test_ideal_hits():
    assert ideal_hits([[1] * 40, [1] * 40, [1] * 20 + [2] * 20, [1] * 32], 16) == [0, 32, 16, 16]


def conversations(count, turns, rate, seed=0):
    """Conversations that grow by 320 tokens a turn, behind a common system prompt."""
    draw, found = random.Random(seed), []
    for number in range(count):
        at, prompt = draw.uniform(0, count / rate), [9] * 512
        for turn in range(turns):
            prompt = prompt + [number * turns + turn + 10] * 320
            found.append(Arrival(at, prompt, 20))
            at += draw.uniform(2, 10)
    return sorted(found, key=lambda one: one[0])


SHAPE = Shape(num_blocks=4000, step_time=StepTime(prefill_s=0.0005), budget=64)


def share_in_time(policy, requests, groups=8, routers=1, **options):
    routed = [Router(policy, draw=random.Random(number), **options) for number in range(routers)]
    simulation = Simulation(groups, SHAPE, routed)
    runs, refused = simulation.run(requests)
    assert len(runs) + len(refused) == len(requests)
    for group in simulation.groups:
        assert not group.pool.check()
        assert group.pool.num_used == 0
    late = sum(one.first_token - one.arrived > 0.5 for one in runs)
    return 1 - late / len(runs), sum(one.cached for one in runs), runs, refused


def test_policies_in_their_order():
    requests = conversations(count=150, turns=8, rate=2.5)
    ideal = sum(ideal_hits([prompt for _, prompt, *_ in requests], 16))
    turns, turn_hits, _, _ = share_in_time("round-robin", requests)
    cost, hits, _, _ = share_in_time("cost", requests)
    assert turn_hits < 0.6 * ideal
    assert hits > 0.9 * ideal
    assert cost > turns


def test_gateways_that_know_only_reports_of_each_other_do_as_well():
    requests = conversations(count=150, turns=8, rate=2.5)
    one, _, _, _ = share_in_time("cost", requests)
    four, _, _, _ = share_in_time("cost", requests, routers=4)
    assert four > one - 0.12


def test_what_is_admitted_under_overload_is_in_time():
    requests = conversations(count=400, turns=8, rate=30.0)
    _, _, runs, refused = share_in_time("cost", requests, groups=4, max_ttft_s=0.5)
    late = sum(one.first_token - one.arrived > 0.5 for one in runs)
    assert len(refused) > 0.2 * len(requests)
    assert late < 0.03 * len(runs)


def test_what_is_admitted_at_once_is_in_time():
    """Before any group has measured how fast it is under load."""
    requests = [Arrival(number / 1000, [number + 10] * 400, 5) for number in range(100)]
    in_time, _, runs, refused = share_in_time("cost", requests, groups=4, max_ttft_s=0.5)
    assert in_time == 1.0
    assert len(runs) >= 4
    assert len(refused) > 50


def test_too_much_load_is_no_collapse():
    """As many answers a second are in time as under less, and what is admitted stays in time."""
    good = []
    for rate in (4.0, 16.0):  # the fleet carries about eight requests a second of 15 and of 26
        requests = conversations(count=250, turns=6, rate=rate)
        _, _, runs, _ = share_in_time("cost", requests, groups=4, max_ttft_s=0.5)
        in_time = sum(one.first_token - one.arrived <= 0.5 for one in runs)
        assert in_time > 0.97 * len(runs)
        good.append(in_time / requests[-1][0])
    assert good[1] > good[0]


def test_a_simulation_is_repeatable():
    requests = conversations(count=30, turns=4, rate=2.5)
    ends = [[one.finished for one in share_in_time("cost", requests)[2]] for _ in range(2)]
    assert ends[0] == ends[1]


LINKED = dataclasses.replace(SHAPE, token_bytes=1e5, fetch_bytes_per_s=1e9, fetch_floor_s=0.005)


def test_a_fetch_takes_its_time_and_then_the_blocks_are_there():
    one, two = SimulatedGroup("one", LINKED), SimulatedGroup("two", LINKED)
    first, second, third = (run(name, [1] * 1600, 4) for name in "abc")
    one.submit(first, 0.0)
    finish(one)
    two.submit(second, 100.0, one)
    two.submit(third, 100.0, one)
    finish(two)
    seconds = 99 * 16 * 1e5 / 1e9
    assert second.ready_at == pytest.approx(100.0 + seconds + 0.005)
    assert third.ready_at == pytest.approx(100.0 + 2 * seconds + 0.005)
    assert second.cached == 99 * 16
    assert second.first_token == pytest.approx(second.ready_at + LINKED.step_time(16, 0, 0))
    assert (two.stats().peer_loaded, one.stats().peer_served) == (198, 198)


@pytest.mark.parametrize("prefill", [0, 2])
def test_fleets_with_links_lose_nothing(prefill):
    requests = conversations(count=60, turns=6, rate=2.5)
    simulation = Simulation(8, LINKED, [Router(draw=random.Random(0))], prefill)
    runs, refused = simulation.run(requests)
    assert not refused
    assert len(runs) == len(requests)
    for one, (_, _, output, _) in zip(runs, requests, strict=True):
        made = one.produced + (one.heir.produced if one.heir else 0)
        assert made == output
        assert one.first_token <= one.last.finished
    for group in simulation.groups:
        assert not group.pool.check()
        assert group.pool.num_used == 0
    assert any(one.heir for one in runs) == bool(prefill)
    assert sum(group.stats().peer_loaded for group in simulation.groups) > 0
