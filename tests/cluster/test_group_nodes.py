"""Groups that span several raylets of one machine, in a process of its own: this session's Ray is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = """
import asyncio, json, os, random, sys
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve import RunTarget
from kvasir.cluster import application, group_client
from kvasir.cluster.doctor_cluster import look
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.rank_actor import RankSetup
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Token
from kvasir.engine.request import Request, SamplingParams

model, prompt = sys.argv[1], json.loads(sys.argv[2])
sys.path.append(sys.argv[3])
from replicas import told
from waiting import until

group_client.SILENCE_S = 30.0  # ranks may get no processor here for longer
cluster = Cluster()
nodes = {}
for _ in range(3):
    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
    nodes[node.node_id] = node
links = [(finding.state, finding.about, finding.text) for finding in look(cluster.address)]
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
serve.start(proxy_location="Disabled", logging_config={"log_level": "CRITICAL"})

def deploy(stages, share):
    engine = EngineConfig(model=model, dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 22,
                          tensor_parallel_size=2, pipeline_parallel_size=stages, collective_timeout=60.0)
    group = application.group_deployment("stories", engine, 0, "info", share=share)
    target = group.bind(engine, "stories", 0, RankSetup())
    serve.run_many([RunTarget(target, name="test", route_prefix=None)])
    return serve.get_app_handle("test")

def endpoint(handle):
    return next((where for where, _ in told(handle, "endpoint") if where is not None), None)

def of_ranks(handle, what):
    return until(lambda: next(filter(None, told(handle, what)), None))

async def connected(where):
    client = GroupClient(where)
    client.start()
    while not client.alive:
        await asyncio.sleep(0.01)
    return client

async def ask(client, sampling, begun=lambda: None):
    stream = await client.submit(
        Request(request_id=str(random.random()), prompt_token_ids=prompt, sampling=sampling))
    events = [await anext(stream)]
    begun()
    events += [event async for event in stream]
    assert [isinstance(event, Token) for event in events[-2:]] != [False, False], "a request ends once"
    return [token for event in events if isinstance(event, Token) for token in event.token_ids], events[-1]

async def greedy(where):
    client = await connected(where)
    found, _ = await ask(client, SamplingParams(temperature=0, max_tokens=256))
    await client.close()
    return found

async def failing(where, strike):
    begun, sampling = asyncio.Semaphore(0), SamplingParams(temperature=1.0, seed=1, max_tokens=480, ignore_eos=True)
    async def on_and_on():
        while True:
            try:
                _, last = await ask(client, sampling, begun.release)
            except KvasirError as error:
                return str(error)
            if type(last).__name__ == "Failed":
                return last.message
    client = await connected(where)
    running = [asyncio.ensure_future(on_and_on()) for _ in range(3)]
    for _ in running:
        await begun.acquire()
    await asyncio.to_thread(strike)
    ends = await asyncio.wait_for(asyncio.gather(*running), 200)
    await client.close()
    return ends

def groups():
    return len([group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"])

found = {"tokens": [], "nodes": [], "links": links}
handle = deploy(stages=3, share=1)
found["tokens"].append(asyncio.run(greedy(until(lambda: endpoint(handle)))))
found["nodes"].append(of_ranks(handle, "rank_nodes"))
serve.delete("test")
handle = deploy(stages=2, share=2)
where, pids = until(lambda: endpoint(handle)), of_ranks(handle, "rank_pids")
found["tokens"].append(asyncio.run(greedy(where)))
found["nodes"].append(of_ranks(handle, "rank_nodes"))
lost = next(node for node in reversed(found["nodes"][-1]) if node != cluster.head_node.node_id)
found["ends"] = asyncio.run(failing(where, lambda: cluster.remove_node(nodes[lost], allow_graceful=False)))
until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
where = until(lambda: (now := endpoint(handle)) != where and now)
found["tokens"].append(asyncio.run(greedy(where)))
found["nodes"].append(of_ranks(handle, "rank_nodes"))
found["lost"] = lost
until(lambda: groups() == 1)
serve.shutdown()
until(lambda: not groups())
print(json.dumps(found), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_ranks_on_several_nodes(data, tmp_path, segments):
    """The doctor sums over every two of three nodes. A bundle per rank over them, then one per stage over two, of which one is
    lost: every stream ends, and the group goes on where there is room."""
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    model = str(data("model-stories260k/hf"))
    before = segments()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, json.dumps(known["prompt_ids"]), str(Path(__file__).parents[1] / "support")],
        capture_output=True, text=True, timeout=800, cwd=tmp_path, check=False,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    sums = [text for state, about, text in found["links"] if (state, about) == ("ok", "link")]
    assert len(sums) == 3
    assert all("us for a decode's sum" in text and text.endswith("(gloo)") for text in sums)
    assert not [text for state, _, text in found["links"] if state == "wrong"]
    for tokens in found["tokens"]:
        assert [*known["prompt_ids"], *tokens][: len(known["greedy_ids"])] == known["greedy_ids"]
    for nodes, count in zip(found["nodes"], (3, 2, 2), strict=True):
        assert len(set(nodes)) == count
        assert nodes[::2] == nodes[1::2], "each stage is on one node"
    assert found["lost"] not in found["nodes"][-1]
    assert len(found["ends"]) == 3
    assert all(found["ends"])
    until(lambda: segments() <= before)
