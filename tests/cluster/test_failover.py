"""Streams over groups that die: what a client gets is what one living group would have given."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time

import httpx
import pytest
from fake_fleet import Fleet, check, draw, halfway, held, outcome, read, request, run, some
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until_async

from kvasir.cluster import failover
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.failover import LastingStream
from kvasir.engine.errors import ClientError, OverloadedError, UnavailableError
from kvasir.engine.event import Failed, Finished, Pooled
from kvasir.engine.request import PoolingParams


@settings(max_examples=25)
@given(
    n=st.sampled_from([1, 1, 2, 3]),
    max_tokens=st.integers(1, 40),
    seed=st.sampled_from([0, 7, 2**63 - 1, -(2**63)]),
    more=st.sampled_from([0, 0, 2]),
    scores=st.booleans(),
    deaths=st.lists(st.tuples(st.floats(0, 0.03), st.sampled_from(["crash", "fail"])), max_size=4),
    chance=st.integers(0, 2**32),
)
def test_deaths_at_any_moment_change_nothing(group_of_fakes, n, max_tokens, seed, more, scores, deaths, chance):
    """With best_of `more` are made than are delivered: all of them reach whoever chooses."""
    sampling = {"n": n, "max_tokens": max_tokens, "seed": seed, "best_of": n + more}
    n += more
    sampling |= {"logprobs": 1, "prompt_logprobs": 1} if scores else {}

    async def main():
        rng = random.Random(chance)
        async with Fleet(group_of_fakes, 2, 0.001) as fleet:
            stream = LastingStream(request(**sampling), fleet.failover())
            await stream.start()
            reader = asyncio.ensure_future(read(stream))
            for pause, how in deaths:
                await asyncio.sleep(pause)
                if reader.done():
                    break
                await fleet.kill(rng.choice(fleet.serving() or fleet.groups), how)
                if rng.random() < 0.7 or not fleet.groups:
                    await fleet.add()
            if not fleet.groups:
                await fleet.add()
            return outcome(await reader, n)

    check(run(main()), n, max_tokens, seed, scores)


def test_the_only_group_comes_back(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.002) as fleet:
            stream, events = await halfway(fleet)
            first = stream.placement.client.name
            await fleet.kill(fleet.groups[0])
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.3)
            assert not reader.done()
            await fleet.add()
            events += await reader
            assert outcome(events, 1)[0][0] == [draw(7, position) for position in range(40)]
            assert stream.placement.client.name != first
            again = fleet.groups[0].engine.submitted[0]
            assert again.sampling == request().sampling
            assert 5 <= len(again.resume_token_ids) < 40
            timing = events[-1].timing
            assert timing.queued <= timing.scheduled <= timing.first_token < timing.finished - 0.3

    run(main())


def test_no_group_in_time(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.002) as fleet:
            stream, _ = await halfway(fleet, timeout_s=0.2)
            await fleet.kill(fleet.groups[0])
            began = time.monotonic()
            (failed,) = [event for event in await read(stream) if isinstance(event, Failed)]
            assert time.monotonic() - began > 0.05
            assert failed.code == "unavailable"
            assert "died while it served this request" in failed.message
            assert "--failover-timeout" in failed.message

    run(main())


def test_what_was_begun_waits_for_a_group_of_its_version(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.002) as fleet:
            lasting, brief = (
                LastingStream(dataclasses.replace(request(), request_id=str(limit)), fleet.failover(limit))
                for limit in (60.0, 0.2)
            )
            let_go = held(fleet.groups[0])
            for stream in (lasting, brief):
                await stream.start()
            await until_async(lambda: len(fleet.groups[0].engine.requests) == 2)
            let_go(10)  # five tokens of each
            events = [await some(stream) for stream in (lasting, brief)]
            await fleet.add(version=b"new")
            await fleet.kill(fleet.groups[0])
            reader = asyncio.ensure_future(read(lasting))
            events[1] += await read(brief)
            failed = events[1].pop()
            assert "all groups of 'm' that are left have other weights" in failed.message
            assert "--failover-timeout" in failed.message
            assert not fleet.groups[0].engine.submitted
            await fleet.add()
            events[0] += await reader
            assert outcome(events[0], 1)[0][0] == [draw(7, position) for position in range(40)]
            assert not fleet.groups[0].engine.submitted

    run(main())


def test_what_was_not_begun_takes_any_version(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 10.0) as fleet:
            stream = LastingStream(request(n=2), fleet.failover())
            await stream.start()
            fleet._step_s = 0.002
            await fleet.add(version=b"new")
            await fleet.kill(fleet.groups[0])
            assert [one[0] for one in outcome(await read(stream), 2)] == [
                [draw(7 + i, p) for p in range(40)] for i in (0, 1)
            ]

    run(main())


def test_turned_off(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.002) as fleet:
            stream, _ = await halfway(fleet, timeout_s=0)
            await fleet.kill(fleet.serving()[0])
            assert isinstance((await read(stream))[-1], Failed)

    run(main())


def test_what_kills_groups_ends(group_of_fakes):
    """A request that no group survives takes three down, not all of them."""

    async def main():
        async with Fleet(group_of_fakes, 5, 10.0) as fleet:
            stream = LastingStream(request(), fleet.failover())
            await stream.start()
            reader = asyncio.ensure_future(read(stream))
            while not reader.done():
                for group in fleet.serving():
                    await fleet.kill(group)
                await asyncio.sleep(0.01)
            assert len(fleet.groups) == 5 - failover.MAX_DEATHS
            assert (await reader)[-1].code == "unavailable"

    run(main())


def test_what_is_done_about_the_answer_counts(group_of_fakes):
    """One continuation was told to stop when its group died: it has ended. The others go on."""

    async def main():
        async with Fleet(group_of_fakes, 1, 0.005) as fleet:
            stream, events = await halfway(fleet, request(n=3))
            fleet.groups[0].engine.abort = lambda *_: None  # the group dies before it hears of it
            stream.abort(1, "stop")
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.02)
            await fleet.kill(fleet.groups[0])
            fleet._step_s = 0.2  # none ends before it is told to
            await fleet.add()
            await until_async(lambda: len(fleet.groups[0].engine.submitted) == 2)
            stream.abort(2, "stop")
            fleet.groups[0].engine.step_s = 0.001
            found = outcome(events + await reader, 3)
            assert found[0][3] == [("length", 40)]
            assert found[1][3] == [("stop", len(found[1][0]))]
            assert found[2][3][0][0] == "stop"
            assert len(fleet.groups[0].engine.submitted) == 2

    run(main())


def test_what_was_ended_while_it_waited_ends(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.005) as fleet:
            stream, events = await halfway(fleet, request(n=2, max_tokens=200))
            await fleet.kill(fleet.groups[0])
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.1)
            stream.abort(1, "stop")
            await fleet.add()
            found = outcome(events + await reader, 2)
            assert found[0][3] == [("length", 200)]
            assert found[1][3][0][0] == "stop"
            assert len(found[1][0]) < 100

    run(main())


def test_a_full_group_is_waited_for(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.002) as fleet:
            stream, _ = await halfway(fleet)
            dying = fleet.serving()[0]
            (other,) = [group for group in fleet.groups if group is not dying]
            other.engine.refusal = OverloadedError("the queue is full", retry_after_s=1.0)
            await fleet.kill(dying)
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.2)
            other.engine.refusal = None
            assert isinstance((await reader)[-1], Finished)

    run(main())


def test_a_refusal_is_told(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.002) as fleet:
            stream, _ = await halfway(fleet)
            dying = fleet.serving()[0]
            for group in fleet.groups:
                group.engine.refusal = ClientError("no such adapter")
            await fleet.kill(dying)
            failed = (await read(stream))[-1]
            assert (failed.code, failed.message) == ("invalid_request_error", "no such adapter")

    run(main())


def test_deadlines_go_on(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.002) as fleet:
            stream, _ = await halfway(fleet, dataclasses.replace(request(), deadline_s=0.4))
            await fleet.kill(fleet.groups[0])
            assert (await read(stream))[-1].code == "deadline_exceeded"

    run(main())


def test_a_stream_that_is_closed_waits_for_nobody(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.002) as fleet:
            stream, _ = await halfway(fleet, request(n=2))
            await fleet.kill(fleet.groups[0])
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.05)
            stream.close()
            await asyncio.wait_for(reader, 60)
            await fleet.add()
            await asyncio.sleep(0.6)
            assert not fleet.groups[0].engine.requests

    run(main())


def test_a_group_that_dies_while_it_is_asked(group_of_fakes):
    """Its engine has stopped, its process lives on: another one is asked, and it is asked last from then on."""

    async def main():
        async with Fleet(group_of_fakes, 2, 0.002) as fleet:
            broken = fleet.groups[0]
            broken.engine.refusal = UnavailableError("the engine has stopped")
            for number in range(6):
                stream = LastingStream(dataclasses.replace(request(), request_id=f"r{number}"), fleet.failover())
                await stream.start()
                assert isinstance((await read(stream))[-1], Finished)
            assert not broken.engine.submitted

    run(main())


def test_vectors_too(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.002) as fleet:
            let_go = {group: held(group) for group in fleet.groups}
            stream = LastingStream(dataclasses.replace(request(), pooling=PoolingParams()), fleet.failover())
            await stream.start()
            await until_async(fleet.serving)
            (old,) = fleet.serving()
            await fleet.kill(old)
            let_go[fleet.groups[0]]()
            (event,) = await read(stream)
            assert isinstance(event, Pooled)

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_over_http(live_gateway, stream):
    """Every four tokens the group dies: text, stop strings, scores and counts are those of one that doesn't."""
    body = {"model": "bytes", "prompt": "Hi", "n": 2, "stop": ["rld"], "logprobs": 2, "seed": 3, "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}

    def ask(gateway):
        return httpx.post(gateway.url + "/v1/completions", json=body, timeout=60)

    with live_gateway(GatewayConfig()) as gateway:
        undisturbed = _shown(ask(gateway))
        gateway.group.dies_after = 4
        found = _shown(ask(gateway))
        metrics = gateway.desk.metrics.render().decode()
        run(until_async(lambda: gateway.desk.running == gateway.group.running == 0))
    assert found == undisturbed
    assert found["texts"] == ["Hello, wö"] * 2
    assert 'kvasir:failovers_total{model_name="bytes"}' in metrics


def _shown(reply):
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("application/json"):
        parts = [reply.json()]
    else:
        frames = [frame for frame in reply.text.split("\n\n") if frame.startswith("data: {")]
        parts = [json.loads(frame[6:]) for frame in frames]
    assert not any("error" in part for part in parts)
    choices = [choice for part in parts for choice in part["choices"]]
    mine = [[choice for choice in choices if choice["index"] == index] for index in (0, 1)]
    return {
        "texts": ["".join(choice["text"] for choice in own) for own in mine],
        "scored": [[t for c in own if c["logprobs"] for t in c["logprobs"]["tokens"]] for own in mine],
        "ends": [[c["stop_reason"] for c in own if c["finish_reason"]] for own in mine],
        "usage": parts[-1]["usage"]["completion_tokens"],
    }
