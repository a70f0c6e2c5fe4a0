"""Streams that another group takes over while theirs goes on: what a client gets is what one group would have given."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from fake_fleet import Fleet, check, draw, freed, halfway, held, outcome, read, request, run, some
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until_async

from kvasir.cluster import failover
from kvasir.cluster.failover import LastingStream
from kvasir.cluster.merged import Merged
from kvasir.cluster.overlap import Differs, Overlap
from kvasir.engine.errors import OverloadedError
from kvasir.engine.event import Failed, Finished, Token, TokenLogprob
from kvasir.engine.request import PoolingParams

CHANGES = ("drain", "prefill", "decode", "both", "crash", "fail", "add")


async def change(fleet, what, rng):
    """One thing that happens to a fleet, mostly where something runs."""
    group = rng.choice(fleet.serving() or fleet.groups)
    if what in ("prefill", "decode", "both"):
        group.service.set_role(what)
    elif what == "add" or len(fleet.groups) < 2:
        await fleet.add()
    elif what == "drain":
        await fleet.drain(group)
    else:
        await fleet.kill(group, what)


@settings(max_examples=40)
@given(
    n=st.sampled_from([1, 1, 2, 3]),
    max_tokens=st.integers(1, 60),
    seed=st.sampled_from([0, 7, 2**63 - 1, -(2**63)]),
    more=st.sampled_from([0, 0, 2]),
    scores=st.booleans(),
    prefill=st.booleans(),
    changes=st.lists(st.tuples(st.floats(0, 0.03), st.sampled_from(CHANGES)), max_size=6),
    chance=st.integers(0, 2**32),
)
def test_moves_and_deaths_at_any_moment_change_nothing(
    group_of_fakes, n, max_tokens, seed, more, scores, prefill, changes, chance
):
    sampling = {"n": n, "max_tokens": max_tokens, "seed": seed, "best_of": n + more}
    n += more
    sampling |= {"logprobs": 1, "prompt_logprobs": 1} if scores else {}

    async def main():
        rng = random.Random(chance)
        async with Fleet(group_of_fakes, 2, 0.001) as fleet:
            if prefill:
                fleet.groups[0].service.set_role("prefill")
                await until_async(lambda: "prefill" in [client.member.role for client in fleet.directory.clients("m")])
            stream = LastingStream(request(**sampling), fleet.failover())
            await stream.start()
            reader = asyncio.ensure_future(read(stream))
            for pause, what in changes:
                await asyncio.sleep(pause)
                if reader.done():
                    break
                await change(fleet, what, rng)
            found = outcome(await reader, n)
            await until_async(lambda: not fleet.serving())
            return found

    check(run(main()), n, max_tokens, seed, scores)


async def begun(fleet, **sampling):
    """A stream that has delivered five tokens, and these."""
    stream = LastingStream(request(**sampling), fleet.failover())
    await stream.start()
    return stream, await some(stream)


@pytest.mark.parametrize("n", [1, 3])
def test_a_group_that_drains_is_left_before_it_ends(group_of_fakes, n):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await begun(fleet, n=n, max_tokens=200)
            (old,) = fleet.serving()
            reader = asyncio.ensure_future(read(stream))
            await asyncio.wait_for(fleet.drain(old), 60)
            assert not reader.done()
            assert fleet.serving() == fleet.groups
            assert all(request.resume_token_ids for request in fleet.groups[0].engine.submitted)
            assert fleet.moves == ["drain"]
            found = outcome(events + await reader, n)
            assert [one[0] for one in found] == [[draw(7 + i, p) for p in range(200)] for i in range(n)]

    run(main())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("by", ["reader", "group"])
def test_what_ends_before_all_is_handed_over_stays_ended(group_of_fakes, by, steps):
    """The next group makes all continuations, also the one that is no more."""

    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            let_go = {group: held(group) for group in fleet.groups}
            stream = LastingStream(request(n=3, max_tokens=60), fleet.failover())
            await stream.start()
            await until_async(fleet.serving)
            (old,) = fleet.serving()
            (new,) = [group for group in fleet.groups if group is not old]
            reader = asyncio.ensure_future(read(stream))
            draining = asyncio.ensure_future(old.service.drain(30.0))
            await until_async(lambda: new.engine.requests)
            let_go[old](steps)
            await until_async(lambda: len(stream._live[1]) == steps)
            if by == "reader":
                stream.abort(1, "stop")
            else:
                old.engine.abort(old.engine.submitted[0].request_id, 1, "stop")
            await until_async(lambda: 1 not in stream._live)
            let_go[new]()
            found = outcome(await reader, 3)
            await draining
            await until_async(lambda: not fleet.serving())
            assert fleet.moves == ["drain"]
            assert found[1][0] == [draw(8, position) for position in range(steps)]
            assert found[1][3] == [("stop", steps)]
            for index in 0, 2:
                assert found[index][0] == [draw(7 + index, position) for position in range(60)]
                assert found[index][3] == [("length", 60)]
            assert [one[1] for one in new.engine.aborted] == [1]

    run(main())


def test_a_group_that_drains_before_it_takes_over_is_left_too(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 3, 0.005) as fleet:
            stream, events = await halfway(fleet, request(max_tokens=60))
            (old,) = fleet.serving()
            let_go = {group.endpoint: held(group) for group in fleet.groups}
            reader = asyncio.ensure_future(read(stream))
            draining = asyncio.ensure_future(old.service.drain(30.0))
            await until_async(lambda: len(fleet.serving()) == 2)
            (heir,) = [group.endpoint for group in fleet.serving() if group is not old]
            next(one for one in fleet.directory.clients("m") if one.endpoint == heir)._change(True, "both")
            for endpoint, go in let_go.items():
                if endpoint != old.endpoint:
                    go(3 if endpoint == heir else 60)
            await until_async(lambda: fleet.moves == ["drain", "drain"])
            found = outcome(events + await reader, 1)
            await draining
            assert found[0][0] == [draw(7, position) for position in range(60)]

    run(main())


def test_a_death_during_a_try_that_fails_waits_for_no_second_one(group_of_fakes, monkeypatch):
    monkeypatch.setattr(failover, "MOVE_PAUSE_S", (3600.0, 3600.0))

    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await halfway(fleet, request(max_tokens=60))
            (old,) = fleet.serving()
            (new,) = [group for group in fleet.groups if group is not old]
            let_go, reader = held(new), asyncio.ensure_future(read(stream))
            client = next(one for one in fleet.directory.clients("m") if one.endpoint == old.endpoint)
            client._change(True, "both")
            await until_async(lambda: new.engine.requests)
            await fleet.kill(old)
            await until_async(lambda: stream._failed)
            new.engine.fail()
            let_go()
            await until_async(reader.done)
            assert outcome(events + await reader, 1)[0][0] == [draw(7, position) for position in range(60)]

    run(main())


def test_a_mover_that_slept_when_its_group_died_moves_the_stream_from_the_next_one(group_of_fakes, monkeypatch):
    monkeypatch.setattr(failover, "MOVE_PAUSE_S", (3600.0, 3600.0))

    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await halfway(fleet, request(max_tokens=40))
            (old,) = fleet.serving()
            (new,) = [group for group in fleet.groups if group is not old]
            held(new)  # so that the stream lasts until it has moved
            asked, submit = [], new.engine.submit
            new.engine.submit = lambda request: asked.append(request) or submit(request)
            new.engine.refusal = OverloadedError("full")
            next(one for one in fleet.directory.clients("m") if one.endpoint == old.endpoint)._change(True, "both")
            await until_async(lambda: asked and not stream._trying)
            await fleet.kill(old)
            reader = asyncio.ensure_future(read(stream))
            await until_async(lambda: len(asked) > 1)
            new.engine.refusal = None
            await until_async(lambda: new.engine.requests)
            await fleet.add()
            await asyncio.wait_for(fleet.drain(new), 60)
            assert fleet.moves == ["drain"]
            assert outcome(events + await reader, 1)[0][0] == [draw(7, position) for position in range(40)]

    run(main())


class Broken:
    """A stream with a defect."""

    async def batch(self):
        raise KeyError("index")


def test_what_a_stream_raises_reaches_who_reads_several():
    async def main():
        merged = Merged([Broken()])
        with pytest.raises(KeyError, match="index"):
            await merged.next()
        merged.close()

    run(main())


def test_who_only_computes_prompts_hands_over_after_the_first_token(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 3, 0.005) as fleet:
            prefill, *others = fleet.groups
            fleet.groups[0].service.set_role("prefill")
            others[0].service.set_role("decode")
            await until_async(
                lambda: {c.member.role for c in fleet.directory.clients("m")} == {"prefill", "decode", "both"}
            )
            client = next(c for c in fleet.directory.clients("m") if c.member.role == "prefill")
            stream = LastingStream(request(max_tokens=200), fleet.failover())
            stream._attach(placement := only(fleet, client, stream._request), await placement.submit())
            reader = asyncio.ensure_future(read(stream))
            await until_async(lambda: not prefill.engine.requests)
            assert not reader.done()
            assert stream.placement.client is not client
            assert [e.token_ids[0] for e in await reader if isinstance(e, Token)] == [draw(7, p) for p in range(200)]
            assert fleet.moves == ["prefill"]
            (first,) = prefill.engine.submitted
            assert not first.resume_token_ids

    run(main())


def only(fleet, client, wanted):
    """Placed at this one."""
    return fleet.directory._placed(fleet.directory._models["m"], [client], wanted, "")


def test_a_stream_that_is_almost_done_stays(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await halfway(fleet, request(max_tokens=12))
            (group,) = fleet.serving()
            group.service.set_role("prefill")
            await until_async(lambda: stream.placement.client.member.role == "prefill")
            freed(group)
            found = outcome(events + await read(stream), 1)
            assert len(found[0][0]) == 12
            assert not fleet.moves

    run(main())


def test_without_another_group_it_stays_until_there_is_one(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 1, 0.005) as fleet:
            stream, events = await halfway(fleet, request(max_tokens=40))
            draining = asyncio.ensure_future(fleet.drain(fleet.groups[0]))
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.2)
            assert not draining.done()
            assert not fleet.moves
            late = fleet.groups[0]
            await fleet.add()
            await draining
            assert late not in fleet.groups
            assert fleet.moves == ["drain"]
            found = outcome(events + await reader, 1)
            assert found[0][0] == [draw(7, position) for position in range(40)]

    run(main())


def test_a_group_of_another_version_takes_over_nothing(group_of_fakes):
    """It has the same name, and keeps no prefixes, as the old one."""

    async def main():
        async with Fleet(group_of_fakes, 1, 0.005) as fleet:
            stream, events = await begun(fleet, max_tokens=60)
            await fleet.add(version=b"new")
            draining = asyncio.ensure_future(fleet.drain(fleet.groups[0]))
            events += await read(stream)
            await draining
            assert outcome(events, 1)[0][0] == [draw(7, position) for position in range(60)]
            assert not fleet.moves
            assert not fleet.groups[0].engine.submitted

    run(main())


def test_a_full_group_is_asked_again(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await begun(fleet, max_tokens=300)
            (old,) = fleet.serving()
            (other,) = [group for group in fleet.groups if group is not old]
            other.engine.refusal = OverloadedError("full")
            draining = asyncio.ensure_future(fleet.drain(old))
            reader = asyncio.ensure_future(read(stream))
            await asyncio.sleep(0.2)
            assert old.engine.requests
            other.engine.refusal = None
            await draining
            assert outcome(events + await reader, 1)[0][0] == [draw(7, position) for position in range(300)]

    run(main())


@pytest.mark.parametrize("n", [1, 2])
def test_a_group_that_goes_on_otherwise_begins_again_behind_what_was_delivered(group_of_fakes, n):
    """Its tokens depend on where it was asked to go on: what the reader has is never contradicted, and nothing doubled."""

    async def main():
        async with Fleet(group_of_fakes, 2, 0.003) as fleet:
            stream, events = await begun(fleet, n=n, max_tokens=300)
            (old,) = fleet.serving()
            (other,) = [group for group in fleet.groups if group is not old]
            other.engine.token = lambda seed, position: 100 + position % 10
            other.engine.step_s = 0.05
            reader = asyncio.ensure_future(read(stream))
            await fleet.drain(old)
            other.engine.step_s = 0.001
            for index, one in enumerate(outcome(events + await reader, n)):
                seam = next(place for place, token in enumerate(one[0]) if token >= 100)
                assert one[0][:seam] == [draw(7 + index, position) for position in range(seam)]
                assert one[0][seam:] == [100 + position % 10 for position in range(seam, 300)]
                assert one[3] == [("length", 300)]

    run(main())


def test_what_waits_for_a_draining_group_moves_whole(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.2) as fleet:
            stream = LastingStream(dataclasses.replace(request(), pooling=PoolingParams()), fleet.failover())
            await stream.start()
            (old,) = fleet.serving()
            old.engine._advance = lambda name: []
            draining = asyncio.ensure_future(fleet.drain(old))
            assert len(await read(stream)) == 1
            await draining

    run(main())


@pytest.mark.parametrize("when", ["it looks for another group", "it has found one"])
def test_a_reader_that_goes_away_during_a_move_leaves_nothing(group_of_fakes, when):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, _ = await begun(fleet, n=2, max_tokens=500)
            (old,) = fleet.serving()
            looks, find = asyncio.Event(), stream._find_heirs

            def finding():
                looks.set()
                return find()

            stream._find_heirs = finding
            draining = asyncio.ensure_future(old.service.drain(30.0))
            await looks.wait()
            if when == "it has found one":
                await until_async(lambda: stream._heirs)
            stream.close()
            await draining
            await until_async(lambda: not fleet.serving())
            assert await read(stream) == []

    run(main())


def test_stops_reach_whoever_makes_the_tokens(group_of_fakes):
    async def main():
        async with Fleet(group_of_fakes, 2, 0.005) as fleet:
            stream, events = await begun(fleet, n=3, max_tokens=500)
            (old,) = fleet.serving()
            draining = asyncio.ensure_future(old.service.drain(30.0))
            stream.abort(1, "stop")
            reader = asyncio.ensure_future(read(stream))
            await draining
            stream.abort(2, "stop")
            stream.abort(0, "stop")
            found = outcome(events + await reader, 3)
            assert [ends[0][0] for _, _, _, ends in found] == ["stop"] * 3
            assert [ends[0][1] for _, _, _, ends in found] == [len(ids) for ids, _, _, _ in found]

    run(main())


def test_overlap():
    overlap = Overlap({0: [1, 2, 3], 1: [], 2: [4]})
    score = TokenLogprob(-1.0, 1)
    assert overlap.fresh(Token("r", 0, (1, 2))) is None
    assert overlap.fresh(Token("r", 1, (9,))).token_ids == (9,)
    found = overlap.fresh(Token("r", 0, (3, 5), [score, score], [None]))
    assert ([*found.token_ids], len(found.logprobs), found.prompt_logprobs) == ([5], 1, None)
    assert overlap
    assert 2 in overlap
    assert 0 not in overlap
    assert isinstance(overlap.fresh(Failed("r", "unavailable", "")), Failed)
    with pytest.raises(Differs):
        overlap.fresh(Token("r", 2, (5,)))
    with pytest.raises(Differs):
        overlap.fresh(Finished("r", 2, "length"))
    assert overlap.fresh(Token("r", 2, (4,))) is None
    assert not overlap
