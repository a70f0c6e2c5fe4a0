"""Groups of real ranks as Ray actors: one rank's answers, deaths that are messages, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal

import pytest
import ray
from kvasir_server import child_of
from ray.serve import RunTarget
from replicas import told
from waiting import until, until_async

from kvasir.cluster import application, group_client
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.rank_actor import RankSetup
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Failed, Finished, Token
from kvasir.engine.request import Peer, Request, SamplingParams

pytestmark = pytest.mark.ray
LONG = SamplingParams(temperature=1.0, seed=1, max_tokens=20_000, ignore_eos=True)
"""Tens of seconds, with ROOM for four at once: the model's own 512 tokens are over in a tenth of one."""
ROOM = {"hf_overrides": {"max_position_embeddings": 1 << 15}, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture
def deployed(serve_on_ray, data, monkeypatch):
    """`deployed(tensor_parallel_size=2, ...)`: a handle of the Group of a small trained model, running."""
    monkeypatch.setattr(group_client, "SILENCE_S", 30.0)  # coordinators may get no processor here for longer

    def deploy(log_level="info", **options):
        options = {"dtype": "float32", "num_threads": 1, "kv_cache_memory_bytes": 1 << 22} | options
        engine = EngineConfig(model=str(data("model-stories260k/hf")), **options)
        setup = RankSetup(host="127.0.0.1", log_level=log_level)
        target = application.group_deployment("stories", engine, 0, "info").bind(engine, "stories", 0, setup)
        run = RunTarget(target, name="test", route_prefix=None)
        serve_on_ray.run_many([run], wait_for_applications_running=True)
        return serve_on_ray.get_app_handle("test")

    yield deploy
    serve_on_ray.delete("test")


def endpoints(handle):
    """Of groups that serve."""
    return [where for where, _ in told(handle, "endpoint") if where is not None]


def endpoint(handle, last=None):
    """Of the only group, once it serves; after the one that was the last."""
    return until(lambda: (found := endpoints(handle)) and found[0] != last and found[0])


def pids(handle):
    """Of the only group's ranks."""
    return until(lambda: next(filter(None, told(handle, "rank_pids")), None))


async def connected(where):
    client = GroupClient(where, max_stream_buffer=LONG.max_tokens)  # one stream is read after the other
    client.start()
    await until_async(lambda: client.alive)
    return client


async def asked(client, prompt, sampling, **more):
    """The stream of a request of its own."""
    request = Request(request_id=str(random.random()), prompt_token_ids=prompt, sampling=sampling, **more)
    return await client.submit(request)


async def tokens(client, prompt, sampling, **more):
    """(token ids, the last event)"""
    return await rest(await asked(client, prompt, sampling, **more))


async def rest(stream):
    """The same of what is left of one."""
    events = [event async for event in stream]
    assert sum(not isinstance(event, Token) for event in events) == 1, "a request ends once"
    return [token for event in events if isinstance(event, Token) for token in event.token_ids], events[-1]


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ],
)
def test_documented_tokens(deployed, data, layout):
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    handle = deployed(**layout)

    where = endpoint(handle)

    async def main():
        client = await connected(where)
        found, last = await tokens(client, known["prompt_ids"], SamplingParams(temperature=0, max_tokens=256))
        assert isinstance(last, Finished)
        await client.close()
        return found

    found = asyncio.run(main())
    assert [*known["prompt_ids"], *found][: len(known["greedy_ids"])] == known["greedy_ids"]


def test_copies_of_a_model(deployed):
    """--data-parallel-size: groups of their own, each with ranks of its own."""
    handle = deployed(data_parallel_size=2, pipeline_parallel_size=2)
    found = until(lambda: len(both := endpoints(handle)) == 2 and both)
    assert found[0].incarnation != found[1].incarnation
    one, other = until(lambda: len(both := told(handle, "rank_pids")) == 2 and both)
    assert len({*one, *other}) == 4


def test_any_rank_s_death_is_told_and_mended(deployed, segments):
    """A rank is killed, then another one stopped, then the coordinator alone is killed: streams fail at once and say why, new ranks
    serve, the old are gone."""
    before = segments()
    handle = deployed(tensor_parallel_size=2, pipeline_parallel_size=2, **ROOM)
    where = endpoint(handle)
    for number, why in ((signal.SIGKILL, "died"), (signal.SIGSTOP, "stopped"), ("coordinator", "died")):
        ranks = pids(handle)
        victim = child_of(os.getpid(), "ray::ServeReplica:test:Group") if number == "coordinator" else ranks[-1]

        async def main(where=where, victim=victim, number=number):
            client = await connected(where)
            streams = [await asked(client, [1, 5 + i], LONG) for i in range(4)]
            assert all([isinstance(await anext(stream), Token) for stream in streams])
            os.kill(victim, signal.SIGKILL if number == "coordinator" else number)
            ends = [last for _, last in [await rest(stream) for stream in streams]]
            await client.close()
            return ends

        ends = asyncio.run(main())
        assert all(isinstance(end, Failed) and end.code == "unavailable" for end in ends)
        assert any(why in end.message or "gone" in end.message for end in ends), ends
        until(lambda ranks=ranks: not any(os.path.exists(f"/proc/{pid}") for pid in ranks))
        where = endpoint(handle, where)
    until(lambda: placement_groups() == 1)
    until(lambda: segments() <= before)


def placement_groups():
    return len([group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"])


def test_every_rank_s_blocks_survive_the_ranks(deployed, tmp_path):
    """One rank is killed, all are replaced: the prompt starts from what all of them have on the disk."""
    handle = deployed(tensor_parallel_size=2, kv_disk_path=str(tmp_path))

    async def ask(where):
        client = await connected(where)
        found, last = await tokens(client, list(range(5, 105)), SamplingParams(temperature=0, max_tokens=20))
        await client.close()
        return found, last.cached_tokens

    first, ranks = endpoint(handle), pids(handle)
    found, cached = asyncio.run(ask(first))
    assert cached == 0
    whole = lambda: [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".part"]  # noqa: E731
    until(lambda: len(whole()) == 2 * (7 + 1))
    os.kill(ranks[1], signal.SIGKILL)
    assert asyncio.run(ask(endpoint(handle, first))) == (found, 96)


SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)
WAYS = (*SIGNALS, "raise", "out of memory", "hang", "lock")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "ways"), [("tensor_parallel_size", WAYS[::2]), ("pipeline_parallel_size", WAYS[1::2])]
)
def test_chaos(deployed, orders, segments, layout, ways):
    """Seven deaths, and 24 of ranks in processes (tests/engine/test_group_deaths.py), which begin in a twentieth of the time: any
    rank, at any moment, in any way. Every request ends once, and the group serves again."""
    handle = deployed(**{layout: 2}, collective_timeout=20.0, log_level=orders.level)
    rng = random.Random(1)
    before = segments()
    where = endpoint(handle)
    for how in ways:
        ranks = pids(handle)
        victim, delay = rng.choice(ranks), rng.random() * 0.4

        def strike(victim=victim, how=how):
            os.kill(victim, how) if how in SIGNALS else orders.give(victim, how)

        async def main(where=where, strike=strike, delay=delay):
            client = await connected(where)
            running = [asyncio.ensure_future(until_it_fails(client, i)) for i in range(3)]
            await asyncio.sleep(delay)
            strike()
            ends = await asyncio.wait_for(asyncio.gather(*running), 120)
            await client.close()
            return ends

        ends = asyncio.run(main())
        assert all(isinstance(end, (KvasirError, Failed)) for end in ends)
        until(lambda ranks=ranks: not any(os.path.exists(f"/proc/{pid}") for pid in ranks))
        where = endpoint(handle, where)
    until(lambda: placement_groups() == 1)
    until(lambda: segments() <= before)


async def until_it_fails(client, number):
    """Streams one after the other, without end; how the first one ended that the group failed."""
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=480, ignore_eos=True)
    while True:
        try:
            _, last = await tokens(client, [1, 5 + number], sampling)
        except KvasirError as error:
            return error
        if isinstance(last, Failed):
            return last


def test_a_group_fetches_from_another(deployed):
    """Two groups of two ranks each, as actors: what one has computed, the other has without. A fetch has half a second, which
    ranks of a busy machine may miss; then it is computed, and the next prompt is as good."""
    handle = deployed(tensor_parallel_size=2, data_parallel_size=2, kv_disk_size=0)
    first, second = until(lambda: len(found := endpoints(handle)) == 2 and found)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    rng = random.Random(3)

    async def ask():
        one, other = await connected(first), await connected(second)
        cached = 0
        while cached < 192:  # what came in time
            prompt = [rng.randrange(3, 500) for _ in range(200)]
            cold, _ = await tokens(one, prompt, greedy)
            peer = Peer(first.kv_address, first.kv_secret, len(prompt), ordered=True)
            warm, end = await tokens(other, prompt, greedy, peers=(peer,))
            assert warm == cold
            cached = end.cached_tokens
        assert cached == 192
        await until_async(lambda: other.stats.peer_loaded >= 12 and one.stats.peer_served)
        await until_async(lambda: other.stats.peer_bytes > 0 and other.stats.fetch_bytes_per_s > 0)
        await one.close()
        await other.close()

    asyncio.run(ask())
