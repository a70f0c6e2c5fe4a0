"""A group that spans several raylets of one machine, in a process of its own: this session's Ray is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = """
import asyncio, json, sys, time
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve import RunTarget
from kvasir.cluster import application
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.rank_actor import RankSetup
from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Finished, Token
from kvasir.engine.request import Request, SamplingParams

model, prompt, nodes = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
cluster = Cluster()
for _ in range(nodes):
    cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
serve.start(proxy_location="Disabled", logging_config={"log_level": "CRITICAL"})
engine = EngineConfig(model=model, dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 22,
                      tensor_parallel_size=2, pipeline_parallel_size=nodes, collective_timeout=60.0)
group = application.group_deployment("stories", engine, 0, "info").bind(engine, "stories", 0, RankSetup())
serve.run_many([RunTarget(group, name="test", route_prefix=None)])
handle = serve.get_app_handle("test")
(where, _), = handle.broadcast("endpoint").results()
(processes,) = handle.broadcast("rank_nodes").results()

async def main():
    client = GroupClient(where)
    client.start()
    while not client.alive:
        await asyncio.sleep(0.01)
    sampling = SamplingParams(temperature=0, max_tokens=256)
    stream = await client.submit(Request(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    found = [token async for event in stream if isinstance(event, Token) for token in event.token_ids]
    await client.close()
    return found

print(json.dumps({"tokens": asyncio.run(main()), "nodes": processes}), flush=True)
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.parametrize("nodes", [2, 3])
def test_ranks_on_several_nodes(data, tmp_path, nodes):
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    model = str(data("model-stories260k/hf"))
    arguments = [sys.executable, "-c", SCRIPT, model, json.dumps(known["prompt_ids"]), str(nodes)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert [*known["prompt_ids"], *found["tokens"]][: len(known["greedy_ids"])] == known["greedy_ids"]
    assert len(set(found["nodes"])) == nodes
    assert found["nodes"] == sorted(found["nodes"], key=found["nodes"].index), "each node's ranks are neighbours"
