"""Two groups of skald on Ray behind a gateway: roles that change, a group that dies or drains, while streams run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import uuid

import httpx
import pytest
from ray import serve
from ray.serve import RunTarget
from waiting import until

from kvasir.cluster import app, application
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.cluster.gateway_replica import Gateway
from kvasir.cluster.rank_actor import RankSetup
from kvasir.engine.config import EngineConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TEXT = "the cat sat on a mat and saw that it was red while rain fell over old hills near some quiet town"
WORDS = tuple(TEXT.split(" "))


def prompt(number):
    return " ".join(WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(180))


@pytest.fixture
def fleet(serve_on_ray):
    """(gateway's address, handles of its two groups): each group an application of its own, so that one can be ended."""
    engine = EngineConfig(
        model="skald", dtype="float32", num_threads=1, kv_cache_memory_bytes=2**26, kv_disk_size=0, max_model_len=1024
    )
    setup = RankSetup(host="127.0.0.1", drain_timeout_s=60.0)
    names = ("one", "two")
    for name in names:
        group = application.group_deployment(name, engine, 0, "error", drain_s=30.0).bind(engine, name, 0, setup)
        run = RunTarget(group, name=name, route_prefix=None)
        serve_on_ray.run_many([run], wait_for_applications_running=False)
    gateway = GatewayConfig(port=0, grpc_port=-1, state_path=":memory:", drain_timeout_s=1.0)
    config = ClusterConfig(engines=(engine, engine), gateway=gateway)
    until(lambda: all(serve.status().applications[name].status == "RUNNING" for name in names))
    handles = [serve.get_app_handle(name) for name in names]
    deployment = serve.deployment(Gateway).options(ray_actor_options={"num_cpus": 0.1}, **application.COMMON)
    run = RunTarget(deployment.bind(config, {}, *handles), name="fleet", route_prefix=None)
    serve_on_ray.run_many([run])
    url = app.wait_until_ready("fleet").http
    until(lambda: sorted(states(url, "state").values()) == ["alive"] * 2)
    yield url, handles
    for name in ("fleet", *names):
        serve.delete(name)


def states(url, field):
    """Id of each group -> its state or role."""
    return {group["id"]: group[field] for group in httpx.get(f"{url}/v1/groups").json()["data"]}


def metric(url, name):
    """Sum of a metric's samples."""
    found = re.findall(rf"^{re.escape(name)}[{{ ].*?([\d.e+]+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(float(value) for value in found)


async def stream(client, url, number, begun):
    """The text of one answer, and why it ended."""
    body = {"model": "skald", "prompt": prompt(number), "max_tokens": 600, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "cache_salt": uuid.uuid4().hex}
    text, reason, count = "", None, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                assert "error" not in told, told
                text += told["choices"][0]["text"]
                reason = told["choices"][0]["finish_reason"] or reason
                count += 1
                if count == 5:
                    begun.release()
    if count < 5:  # what comes at once is one event
        begun.release()
    return text, reason


async def eight(url, disturb=None):
    """Eight answers; `disturb` is called when all have begun."""
    begun = asyncio.Semaphore(0)
    async with httpx.AsyncClient(timeout=120) as client:
        tasks = [asyncio.ensure_future(stream(client, url, number, begun)) for number in range(8)]
        if disturb is not None:
            for _ in tasks:
                await begun.acquire()
            await asyncio.to_thread(disturb)
        return await asyncio.gather(*tasks)


def test_streams_outlive_changes_of_roles_deaths_and_drains(fleet):
    url, handles = fleet
    expected = asyncio.run(eight(url))
    assert [reason for _, reason in expected] == ["length"] * 8
    names = [handle.broadcast("endpoint").results(timeout_s=60)[0][0].incarnation[:8] for handle in handles]

    def give(*roles):
        for name, role in zip(names, roles, strict=True):
            assert httpx.post(f"{url}/v1/groups/{name}", json={"role": role}).json()["role"] == role
        until(lambda: states(url, "role") == dict(zip(names, roles, strict=True)))

    def moves(disturb):
        """Whether streams ran on elsewhere: to who is held up all are over. Their answers are the same."""
        before = metric(url, "kvasir:moves_total")
        assert asyncio.run(eight(url, disturb)) == expected
        return metric(url, "kvasir:moves_total") > before

    while not moves(lambda: give("prefill", "decode")):
        give("both", "both")
    until(lambda: metric(url, "kvasir:kv_blocks_loaded_total") > 0)

    def kill():
        os.kill(handles[0].broadcast("rank_pid").results(timeout_s=60)[0], signal.SIGKILL)

    def swap_and_kill():
        """Who is to hand over dies while the other fetches."""
        give("decode", "prefill")
        handles[0].broadcast("set_role", names[0], "prefill").results(timeout_s=60)
        kill()

    assert asyncio.run(eight(url, swap_and_kill)) == expected
    until(lambda: sorted(states(url, "state").values()) == ["alive"] * 2)
    handles[0].broadcast("reconfigure", {"role": "both"}).results(timeout_s=60)
    handles[1].broadcast("reconfigure", {"role": "both"}).results(timeout_s=60)
    until(lambda: [*states(url, "role").values()] == ["both"] * 2)
    assert moves(lambda: serve.delete("one"))
    assert metric(url, "kvasir:request_failed_total") == 0
