"""A Group deployment over fake engines: start, failures of the start, deaths, the end."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import ray
from ray.serve import RunTarget
from replicas import told
from waiting import until, until_async

from kvasir.cluster import app, application, group_client
from kvasir.cluster.group import block
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.rank_actor import RankSetup
from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Failed, Finished
from kvasir.engine.request import Request, SamplingParams

pytestmark = pytest.mark.ray


@pytest.fixture
def deployed(serve_on_ray, make_engine, monkeypatch):
    """`deployed("model")`: a handle of its Group, running."""
    monkeypatch.setattr(group_client, "SILENCE_S", 30.0)  # ranks may get no processor here for longer

    def deploy(model, wait=True):
        engine = EngineConfig(model=model)
        setup = RankSetup(make_engine, host="127.0.0.1")
        target = application.group_deployment(model, engine, 0, "info").bind(engine, model, 0, setup)
        run = RunTarget(target, name="test", route_prefix=None)
        serve_on_ray.run_many([run], wait_for_applications_running=wait)
        return serve_on_ray.get_app_handle("test")

    yield deploy
    serve_on_ray.delete("test")


def endpoint(handle):
    """Where its rank is; None while there is none."""
    return next((where for where, _ in told(handle, "endpoint")), None)


def rank_pid(handle):
    return until(lambda: told(handle, "rank_pid"))[0]


async def generate(where, max_tokens):
    client = GroupClient(where)
    client.start()
    await until_async(lambda: client.alive)
    request = Request(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=max_tokens))
    stream = await client.submit(request)
    return client, stream


def test_tokens_come_and_a_killed_rank_is_replaced(deployed):
    handle = deployed("fake")
    first, pid = until(lambda: endpoint(handle)), rank_pid(handle)

    async def main():
        client, stream = await generate(first, 5)
        assert isinstance([event async for event in stream][-1], Finished)
        stream = await client.submit(
            Request(request_id="s", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=10**6))
        )
        await anext(stream)
        os.kill(pid, signal.SIGKILL)
        last = [event async for event in stream][-1]
        assert isinstance(last, Failed)
        assert last.code == "unavailable"
        await client.close()

    asyncio.run(main())
    second = until(lambda: (found := endpoint(handle)) != first and found)
    assert second.incarnation != first.incarnation

    async def again():
        client, stream = await generate(second, 5)
        assert isinstance([event async for event in stream][-1], Finished)
        await client.close()

    asyncio.run(again())


def test_an_engine_that_fails_is_replaced(deployed):
    handle = deployed("short-lived")
    first = until(lambda: endpoint(handle))  # it may be between two lives
    second = until(lambda: (found := endpoint(handle)) != first and found)
    assert second.incarnation != first.incarnation


@pytest.mark.parametrize(
    ("model", "why"),
    [("wrong", "max_model_len is 9 and the model allows 8 (see --max-model-len)"), ("broken", "no room for 3 GiB")],
)
def test_a_start_that_fails_is_told_once_and_plainly(deployed, serve_on_ray, model, why):
    deployed(model, wait=False)
    until(lambda: serve_on_ray.status().applications["test"].status == "DEPLOY_FAILED")
    text = app.failure_text(serve_on_ray.status().applications["test"])
    assert text.splitlines()[0] == f"model '{model}' could not be started"
    assert why in text
    assert "Traceback" not in text


def test_nothing_is_left_behind(deployed, serve_on_ray):
    handle = deployed("fake")
    pid = rank_pid(handle)
    serve_on_ray.delete("test")
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    until(lambda: all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()))


def test_block_reads_well():
    assert block("it broke", "one\ntwo", "that").splitlines() == [
        "it broke", "  why:    one", "          two", "  change: that",
    ]  # fmt: skip
