"""Ranks whose addresses really differ: two network namespaces joined by a cable that delays, loses and is cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ENDS = (("kvasir-a", "kva", "10.77.0.1"), ("kvasir-b", "kvb", "10.77.0.2"))

RANK0 = """
import json, os, subprocess, sys, threading, time
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import Hub
from kvasir.engine.engine import Engine
from kvasir.engine.event import Finished, Token
from kvasir.engine.executor import GroupExecutor
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.worker import json_of

said = json.loads(sys.argv[1])
config = EngineConfig(**said["config"])
hub = Hub("10.77.0.1", config.ranks)
others = []
for rank in range(1, config.ranks):
    other = subprocess.Popen(["ip", "netns", "exec", "kvasir-b", sys.executable, "-m", "kvasir.engine.worker"],
                             stdin=subprocess.PIPE)
    with other.stdin as pipe:
        message = {"config": json_of(config), "address": hub.address, "token": hub.token, "rank": rank}
        pipe.write(json.dumps(message).encode())
    others.append(other)
events, ended = [], threading.Event()

def deliver(batch):
    events.extend(batch)
    if any(not isinstance(event, Token) for event in batch):
        ended.set()

executor = GroupExecutor(config, hub, lambda: [other.kill() for other in others], own_gpus=False)
engine = Engine(config, deliver, executor=executor)
engine.start()

def ask(count):
    events.clear()
    ended.clear()
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt_token_ids=said["prompt"], sampling=sampling))

def tc(*words):
    return subprocess.run(["ip", "netns", "exec", "kvasir-b", *words], capture_output=True).returncode == 0

found = {}
ask(200)
assert ended.wait(60)
found["tokens"] = [token for event in events if isinstance(event, Token) for token in event.token_ids]
# kernels without the module sch_netem have a perfect cable
found["netem"] = tc("tc", "qdisc", "add", "dev", "kvb", "root", "netem", "delay", "2ms", "loss", "1%")
ask(40)
assert ended.wait(120)
found["lossy"] = [token for event in events if isinstance(event, Token) for token in event.token_ids]
ask(400)
while len(events) < 5:
    time.sleep(0.01)
assert tc("ip", "link", "set", "kvb", "down")
cut = time.monotonic()
assert ended.wait(60)
found["noticed_s"] = time.monotonic() - cut
found["message"] = events[-1].message
print(json.dumps(found), flush=True)
engine.shutdown()
for other in others:
    other.kill()
    other.wait()
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """kvasir-a 10.77.0.1 --- 10.77.0.2 kvasir-b"""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root, ip and tc")
    try:
        for name, _, _ in ENDS:
            run("ip", "netns", "add", name)
        (a, cable_a, _), (b, cable_b, _) = ENDS
        run("ip", "link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        for name, device, address in ENDS:
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()[:200]}")
    yield
    for name, _, _ in ENDS:
        run("ip", "netns", "del", name)


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"])
def test_a_cable_between_ranks(
    cable: None, data: Callable[[str], Path], tmp_path: Path, layout: dict[str, int]
) -> None:
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    config = {
        "model": str(data("model-stories260k/hf")), "dtype": "float32", "num_threads": 1,
        "kv_cache_memory_bytes": 1 << 22, "collective_timeout": 5.0, **layout,
    }  # fmt: skip
    said = json.dumps({"config": config, "prompt": known["prompt_ids"]})
    done = subprocess.run(
        ["ip", "netns", "exec", "kvasir-a", sys.executable, "-c", RANK0, said],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = known["greedy_ids"][len(known["prompt_ids"]) :]
    assert found["tokens"] == wanted[:200]
    assert found["lossy"] == wanted[:40]
    assert found["noticed_s"] < 12
    assert "rank" in found["message"]
