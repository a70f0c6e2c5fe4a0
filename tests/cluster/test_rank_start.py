"""Ray takes its time to start a rank's process: the log says whose, and it isn't waited for without end."""

from __future__ import annotations

import asyncio

import pytest
import ray

from kvasir.cluster.rank_actor import FollowerActor, RankSetup
from kvasir.cluster.rank_start import UnstartedError, started
from kvasir.engine.config import EngineConfig


def notes(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kvasir.cluster.rank_start"]


def test_a_process_that_comes_late_is_named_until_it_is_there(caplog):
    async def main():
        process = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(started(process, "rank 3 of 'm'", note_s=0.01))
        while len(notes(caplog)) < 2:
            await asyncio.sleep(0.005)
        process.set_result(("node", 7))
        return await waiting

    assert asyncio.run(main()) == ("node", 7)
    assert notes(caplog)[0].startswith("Ray hasn't started the process of rank 3 of 'm' for 0 s: pending. ")
    assert "`ray list actors`" in notes(caplog)[0]


def test_one_that_is_there_is_no_news(caplog):
    async def main():
        async def process():
            return "node", 7

        return await started(process(), "rank 3 of 'm'")

    assert asyncio.run(main()) == ("node", 7)
    assert not notes(caplog)


def test_what_goes_wrong_is_told_at_once():
    async def process():
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        asyncio.run(started(process(), "rank 3 of 'm'"))


@pytest.mark.ray
def test_an_actor_for_which_ray_has_no_room(serve_on_ray, caplog):
    actor = ray.remote(FollowerActor).options(num_cpus=0, resources={"absent": 1})
    rank = actor.remote(EngineConfig(model="m"), RankSetup())
    with pytest.raises(
        UnstartedError, match=r"started the process of rank 1 of 'm' for \d+ s, and is waited for no longer"
    ):
        asyncio.run(started(rank.where.remote(), "rank 1 of 'm'", note_s=0.1, limit_s=0.5))
    assert notes(caplog)
    ray.kill(rank)
