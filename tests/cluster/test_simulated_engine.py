"""Real gateways and simulated groups, over the real wire."""

from __future__ import annotations

import asyncio

import pytest
from waiting import until, until_async

from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.simulated_engine import SimulatedEngine
from kvasir.cluster.simulated_group import Shape, StepTime
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.errors import ContextLengthError
from kvasir.engine.event import Finished, Token
from kvasir.engine.request import Request, SamplingParams

FAST = Shape(num_blocks=500, step_time=StepTime(base_s=0.002, prefill_s=0.00002))


def request(name, prompt, **sampling):
    return Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))


async def fleet(count):
    groups = []
    for _ in range(count):
        service = GroupService(Tracing())
        engine = SimulatedEngine(FAST, service.deliver)
        engine.start()
        groups.append((service, engine, await service.start(engine, "127.0.0.1")))
    directory = GroupDirectory({"m": "m"})
    directory.update("m", [endpoint for _, _, endpoint in groups])
    await until_async(lambda: all(client.alive for client in directory.clients("m")))
    return groups, directory


async def end(groups, directory):
    await directory.close()
    for service, engine, _ in groups:
        await service.stop()
        engine.shutdown()
        assert not engine._group.pool.check()


def test_a_conversation_goes_to_the_group_that_holds_it():
    async def main():
        groups, directory = await fleet(3)
        homes, known = set(), directory._models["m"].router.directory
        prompt = list(range(160))
        for turn in range(4):
            placement = directory.place("m", request(f"t{turn}", prompt, max_tokens=5))
            homes.add(placement.route.member.name)
            events = [event async for event in await placement.submit()]
            assert sum(len(event.token_ids) for event in events if isinstance(event, Token)) == 5
            assert isinstance(events[-1], Finished)
            assert events[-1].cached_tokens == placement.route.cached_tokens
            prompt = prompt + list(range(1000 * turn, 1000 * turn + 160))
            await until_async(lambda turn=turn: known.num_holdings >= 10 * (turn + 1))
        assert len(homes) == 1
        assert (placement.route.prompt_tokens, placement.route.cached_tokens) == (640, 480)
        await end(groups, directory)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_many_requests_continuations_aborts_and_refusals():
    async def main():
        groups, directory = await fleet(2)

        async def one(number):
            sampling = {"max_tokens": number % 7 + 1, "n": number % 3 + 1}
            stream = await directory.place("m", request(f"r{number}", [number] * 50, **sampling)).submit()
            events = [event async for event in stream]
            assert sum(isinstance(event, Finished) for event in events) == number % 3 + 1

        await asyncio.gather(*map(one, range(60)))
        stream = await directory.place("m", request("long", [1] * 50, max_tokens=5000)).submit()
        await anext(stream)
        stream.abort()
        assert [event async for event in stream][-1].reason == "abort"
        with pytest.raises(ContextLengthError, match="8000"):
            await directory.place("m", request("big", [1] * 8000, max_tokens=50)).submit()
        await until_async(lambda: all(client.member.requests == 0 for client in directory.clients("m")))
        await end(groups, directory)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_ends_the_loop_is_the_failure():
    def deliver(events):
        raise RuntimeError("nobody listens")

    engine = SimulatedEngine(FAST, deliver)
    engine.start()
    engine.submit(request("r", [1] * 20, max_tokens=1))
    until(lambda: engine.failure is not None)
    assert str(engine.failure) == "nobody listens"
    engine.shutdown()
