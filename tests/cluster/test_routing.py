"""Two groups with a real model: what the router expects to be cached is what the engine finds."""

from __future__ import annotations

import asyncio

import pytest
from waiting import until_async

from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Finished, Token
from kvasir.engine.request import Request, SamplingParams


async def ask(directory, engines, name, prompt, **fields):
    """(route, tokens, cached tokens as the engine counts them), once the gateway knows of all blocks that are stored."""
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    placement = directory.place("m", Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields))
    events = [event async for event in await placement.submit()]
    tokens = [token for event in events if isinstance(event, Token) for token in event.token_ids]
    assert isinstance(events[-1], Finished)
    known = directory._models["m"].router.directory
    await until_async(lambda: known.num_holdings == sum(len(engine.pool._found) for engine in engines))
    return placement.route, tokens, events[-1].cached_tokens


@pytest.mark.parametrize("policy", ["cost", "prefix"])
def test_expected_hits_are_hits(data, policy):
    from kvasir.engine.engine import Engine

    config = EngineConfig(
        model=str(data("model-stories260k/hf")), max_model_len=512, kv_cache_memory_bytes=2**21, num_threads=1
    )

    async def main():
        services = [GroupService(Tracing()) for _ in range(2)]
        engines = [Engine(config, service.deliver) for service in services]
        for engine in engines:
            engine.start()
        directory = GroupDirectory({"m": "m"}, policy=policy)
        directory.update("m", [await s.start(e, "127.0.0.1") for s, e in zip(services, engines, strict=True)])
        await until_async(lambda: all(client.alive for client in directory.clients("m")))
        homes = []
        for talk in range(2):
            prompt, groups = [5 + talk] * 100, set()
            for turn in range(4):
                route, tokens, cached = await ask(directory, engines, f"{talk}/{turn}", prompt)
                assert cached == route.cached_tokens == (len(prompt) - 21) // 16 * 16 * (turn > 0)
                groups.add(route.member.name)
                prompt = prompt + tokens + [7] * 20
            homes.append(groups)
        assert [len(groups) for groups in homes] == [1, 1]
        route, _, cached = await ask(directory, engines, "salted", prompt, cache_salt="tenant")
        assert cached == route.best_tokens == 0
        await directory.close()
        for service, engine in zip(services, engines, strict=True):
            await service.stop()
            engine.shutdown()
            assert not engine.pool.check()

    asyncio.run(asyncio.wait_for(main(), 60))
