"""Two groups with a real model: what one holds the other fetches where that pays, and answers stay what they were."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
from waiting import until_async

from kvasir.cluster.failover import Failover, LastingStream
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.arrivals import Arrivals
from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Finished, Token
from kvasir.engine.prices import Prices
from kvasir.engine.request import Request, SamplingParams
from tests.engine.test_peers import Proxy


class Pair:
    """Two groups of a small model in this process, that serve blocks to each other."""

    def __init__(self, model, way="auto", through=lambda engine, address: address, sizes=(16, 16)):
        """through: where others find what an engine serves at `address`; sizes: of their blocks."""
        self.config = EngineConfig(
            model=model, dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**22, num_threads=1, kv_transfer=way
        )
        self.through, self.sizes = through, sizes

    async def __aenter__(self):
        from kvasir.engine.engine import Engine

        self.directory = GroupDirectory({"m": "m"})
        self.services = [GroupService(Tracing()) for _ in range(2)]
        self.engines = [
            Engine(dataclasses.replace(self.config, block_size=size), service.deliver)
            for size, service in zip(self.sizes, self.services, strict=True)
        ]
        endpoints = []
        for service, engine in zip(self.services, self.engines, strict=True):
            engine.start()
            address, secret = engine.serve_blocks("127.0.0.1")
            endpoint = await service.start(engine, "127.0.0.1")
            address = self.through(engine, address)
            endpoints.append(dataclasses.replace(endpoint, kv_address=address, kv_secret=secret))
        self.directory.update("m", endpoints)
        self.clients = self.directory.clients("m")
        await until_async(lambda: all(client.alive for client in self.clients))
        return self

    async def __aexit__(self, *_):
        await self.directory.close()
        for service, engine in zip(self.services, self.engines, strict=True):
            await service.stop()
            engine.shutdown()
            assert not engine.pool.check()

    async def ask(self, name, prompt, at, **sampling):
        """(route, tokens, cached tokens) at group `at`, as if the router had no other."""
        sampling = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, **sampling}
        request = Request(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))
        known = self.directory._models["m"]
        placement = self.directory._placed(known, [self.clients[at]], request, "")
        events = [event async for event in await placement.submit()]
        assert isinstance(events[-1], Finished)
        blocks = self.directory.blocks()["m"]
        await until_async(lambda: blocks.num_holdings == sum(len(engine.pool._found) for engine in self.engines))
        tokens = [token for event in events if isinstance(event, Token) for token in event.token_ids]
        return placement.route, tokens, events[-1].cached_tokens

    async def has_fetched(self, tokens):
        """Both together, so many; they say so a moment later."""
        await until_async(lambda: 16 * sum(engine.stats().peer_loaded for engine in self.engines) == tokens)


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 200))


SYSTEM, DOCUMENTS = [9 + n % 80 for n in range(160)], [[11 + (n * 7 + d) % 90 for n in range(96)] for d in range(3)]
PROMPTS = {
    "system": [SYSTEM + [100 + user] * 20 for user in range(3)],
    "documents": [DOCUMENTS[0] + DOCUMENTS[1] + [50], DOCUMENTS[0] + DOCUMENTS[2] + [51]],
    "chat": [],
}


@pytest.mark.parametrize("kind", [*PROMPTS])
def test_blocks_of_a_peer_change_no_answer(data, kind):
    async def main():
        async with Pair(str(data("model-stories260k/hf"))) as pair:
            prompts, prompt = PROMPTS[kind], SYSTEM
            fetched = 0
            for turn in range(4) if kind == "chat" else range(len(prompts)):
                prompt = prompt if kind == "chat" else prompts[turn]
                route, tokens, cached = await pair.ask(f"{turn}", prompt, turn % 2)
                fetched += route.fetched_tokens
                await pair.has_fetched(fetched)
                assert cached == route.cached_tokens + route.fetched_tokens
                cold = await cold_run(pair.config, prompt)
                assert tokens == cold
                if kind == "chat":
                    prompt = [*prompt, *tokens, *[7 + turn] * 20]
            assert fetched > 0
            assert not any(engine.stats().peer_failed for engine in pair.engines)

    run(main())


@pytest.mark.parametrize("how", ["garble", "stop", "cut"])
def test_a_link_that_breaks_between_two_layers_changes_no_answer(data, monkeypatch, how):
    """Gateway's router, groups, links: a step that has begun on the first layers is computed once more."""
    begun, begin = [], Arrivals.begin
    monkeypatch.setattr(Arrivals, "begin", lambda self, *landing: (begun.append(landing), begin(self, *landing)))
    monkeypatch.setattr(Prices, "step_s", lambda self, tokens: 1000.0)
    monkeypatch.setattr("kvasir.engine.lends.LEAST_SLAB", 1)
    monkeypatch.setattr("kvasir.engine.lends.LEAST_PIECE", 1)
    monkeypatch.setattr("kvasir.engine.prices.LIMIT_S", (2.0, 2.0))
    proxies = []

    def through(engine, address):
        size = engine._exchange.form.block_bytes * len(SYSTEM) // 16
        proxies.append(Proxy(address, size * 3 // 4, how))
        return proxies[-1].address

    async def main():
        async with Pair(str(data("model-stories260k/hf")), "tcp", through) as pair:
            await pair.ask("first", [*SYSTEM, 7], 0)
            prompt = SYSTEM + [8] * 20
            route, tokens, cached = await pair.ask("second", prompt, 1)
            assert route.fetched_tokens == 160
            assert begun
            assert cached == 0
            assert tokens == await cold_run(pair.config, prompt)
            assert (await pair.ask("third", prompt, 1))[1] == tokens
            assert pair.engines[1].stats().peer_failed == 10

    run(main())
    for proxy in proxies:
        proxy.close()


async def cold_run(config, prompt):
    """What an engine says that has never heard of it."""
    from kvasir.engine import LLM

    llm = LLM(config.model, dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**22, num_threads=1,
              enable_prefix_caching=False)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (found,) = await asyncio.to_thread(llm.generate, [prompt], sampling)
    llm.shutdown()
    return [*found.outputs[0].token_ids]


def test_below_the_crossover_it_computes(data):
    async def main():
        async with Pair(str(data("model-stories260k/hf"))) as pair:
            await pair.ask("a", SYSTEM, 0)
            member = pair.clients[1].member
            member.fetch_floor, member.fetch_token = 100.0, 0.5
            known = pair.directory._models["m"]
            for length, pays in ((161, False), (480, True)):
                prompt = [5 + n % 100 for n in range(length)]
                await pair.ask(f"first {length}", prompt, 0)
                member.fetch_floor, member.fetch_token = 100.0, 0.5
                request = Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams())
                route = pair.directory._placed(known, [pair.clients[1]], request, "").route
                assert bool(route.peers) == pays
                route.reservation.settle()

    run(main())


@pytest.mark.parametrize(
    ("how", "sizes", "sampling"),
    [
        ("drain", (16, 16), {"temperature": 1.0, "seed": 5, "n": 2, "logprobs": 1}),
        ("prefill", (32, 16), {"temperature": 0}),
    ],
)
def test_eight_streams_move_and_every_token_is_what_it_was(data, how, sizes, sampling):
    async def main():
        async with Pair(str(data("model-stories260k/hf")), sizes=sizes) as pair:
            moves = []
            failover = Failover(
                lambda request, begun: pair.directory.place("m", request, begun),
                5.0,
                move=lambda request, source: pair.directory.move("m", request, source),
                moved=lambda why, to, seconds: moves.append(why),
            )

            async def all_of(name, disturb):
                sampled = SamplingParams(max_tokens=150, ignore_eos=True, **sampling)
                streams = [
                    LastingStream(
                        Request(request_id=f"{name}{n}", prompt_token_ids=[20 + n, *SYSTEM], sampling=sampled,
                                cache_salt=name), failover)
                    for n in range(8)
                ]  # fmt: skip
                for stream in streams:
                    await stream.start()
                tasks = [asyncio.ensure_future(told(stream, sampled.n)) for stream in streams]
                if disturb:
                    await until_async(lambda: all(stream._first_token for stream in streams))
                    await disturb()
                return await asyncio.gather(*tasks)

            async def disturb():
                if how == "drain":
                    await asyncio.wait_for(pair.services[0].drain(60.0), 70)
                else:
                    pair.services[0].set_role("prefill")

            expected = await all_of("undisturbed", None)
            rank = pair.engines[0]._executor.rank
            launch = rank.launch
            rank.launch = lambda step: (time.sleep(0.02), launch(step))[1]  # streams last until they have moved
            found = await all_of("moved", disturb)
            assert found == expected
            assert moves
            assert pair.engines[1].stats().peer_loaded > 0

    run(main())


async def told(stream, n):
    """Tokens of each continuation, and how it ended."""
    tokens, ends = [[] for _ in range(n)], {}
    while events := await stream.batch():
        for event in events:
            if isinstance(event, Token):
                tokens[event.index] += event.token_ids
            else:
                assert isinstance(event, Finished), event
                ends[event.index] = (event.reason, event.output_tokens)
    return tokens, ends
