"""Ranks whose addresses really differ: two network namespaces joined by a cable that delays, loses and is cut.

The kernel's own delays (netem) are a module that many kernels lack: a relay between two TUN devices makes them here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RANK0 = """
import json, signal, subprocess, sys, threading
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import Hub
from kvasir.engine.engine import Engine
from kvasir.engine.event import Token
from kvasir.engine.executor import GroupExecutor
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.worker import json_of

said = json.loads(sys.argv[1])
config = EngineConfig(**said["config"])
hub = Hub("10.77.0.1", config.ranks)
other = subprocess.Popen(["ip", "netns", "exec", said["there"], sys.executable, "-m", "kvasir.engine.worker"],
                         stdin=subprocess.PIPE)
with other.stdin as pipe:
    message = {"config": json_of(config), "address": hub.address, "token": hub.token, "rank": 1}
    pipe.write(json.dumps(message).encode())
events, changed = {}, threading.Condition()

def deliver(batch):
    with changed:
        for event in batch:
            events.setdefault(event.request_id, []).append(event)
        changed.notify_all()

def until(condition):
    with changed:
        assert changed.wait_for(condition, 150)

def ended(name):
    return not isinstance(events.get(name, [Token])[-1], Token) and name in events

# nobody here ends the other rank, which isn't reached when the cable is cut
engine = Engine(config, deliver, executor=GroupExecutor(config, hub, lambda: None, own_gpus=False))
engine.start()

def ask(name, count):
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    engine.submit(Request(request_id=name, prompt_token_ids=said["prompt"], sampling=sampling))

def cable(command):
    print(command, flush=True)
    assert sys.stdin.readline() == "ok\\n"

def tokens(name):
    return [token for event in events[name] if isinstance(event, Token) for token in event.token_ids]

found = {}
ask("good", 60)
until(lambda: ended("good"))
cable("bad 0.02 0.01")
ask("bad", 10)
until(lambda: ended("bad"))
streams = ["a", "b", "c"]
for name in streams:
    ask(name, 400)
until(lambda: all(name in events for name in streams))
if said["end"] == "cut":
    cable("cut")
else:
    other.send_signal(signal.SIGSTOP)
until(lambda: all(map(ended, streams)))
try:
    other.wait(100)
finally:
    other.kill()
found["tokens"] = {name: tokens(name) for name in events}
found["messages"] = [events[name][-1].message for name in streams]
print(json.dumps(found), flush=True)
engine.shutdown()
"""

FENCED = """
import json, subprocess, sys, time
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import Hub, RankError
from kvasir.engine.executor import GroupExecutor
from kvasir.engine.worker import json_of

said = json.loads(sys.argv[1])
config = EngineConfig(**said["config"])
hub = Hub("10.77.0.1", config.ranks)
print("only", hub.address.rpartition(":")[2], flush=True)
assert sys.stdin.readline() == "ok\\n"
other = subprocess.Popen(["ip", "netns", "exec", said["there"], sys.executable, "-m", "kvasir.engine.worker"],
                         stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
with other.stdin as pipe:
    message = {"config": json_of(config), "address": hub.address, "token": hub.token, "rank": 1}
    pipe.write(json.dumps(message).encode())
try:
    GroupExecutor(config, hub, lambda: None, own_gpus=False)
except RankError as error:
    print(json.dumps(str(error)), flush=True)
other.wait(100)
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


Cable = Callable[[str], None]


@contextlib.contextmanager
def cable(number: int) -> Iterator[tuple[Cable, str, str]]:
    """10.77.0.1 --- relay --- 10.77.0.2, each end in a network namespace of its own: (`told("bad 0.02 0.01")` or `told("cut")`,
    their names)."""
    if os.geteuid() != 0 or not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        pytest.skip("a bad cable needs root, ip and /dev/net/tun")
    own = f"{os.getpid()}-{number}"
    ends = ((f"kvasir-a-{own}", f"kva{own}", "10.77.0.1"), (f"kvasir-b-{own}", f"kvb{own}", "10.77.0.2"))
    relay = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("relay.py")), *(device for _, device, _ in ends)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert relay.stdin is not None
    assert relay.stdout is not None
    assert relay.stderr is not None

    def told(command: str = "") -> None:
        assert relay.stdin is not None
        assert relay.stdout is not None
        if command:
            print(command, file=relay.stdin, flush=True)
        if relay.stdout.readline() != "ok\n":
            raise OSError(relay.stderr.read() if relay.stderr else "")

    try:
        try:
            told()
            for name, device, address in ends:
                run("ip", "netns", "add", name)
                run("ip", "link", "set", device, "netns", name)
                run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
                run("ip", "-n", name, "link", "set", device, "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()[-200:]}")
        except OSError as error:
            pytest.skip(f"no TUN devices here: {str(error)[-200:]}")
        yield told, ends[0][0], ends[1][0]
    finally:
        relay.stdin.close()
        relay.wait(60)
        relay.stdout.close()
        relay.stderr.close()
        for name, _, _ in ends:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


CASES = (("tensor_parallel_size", "cut"), ("pipeline_parallel_size", "cut"), ("tensor_parallel_size", "stopped"))
ENDINGS = {"cut": ("rank 1", "its node is gone"), "stopped": ("rank 1", "10.77.0.2", "was stopped (SIGSTOP)")}
"""What streams are told then. Silence is death after 10 s, long before an exchange is given up, which is told in other words; a
rank that was stopped is known to be at once."""


@pytest.fixture(scope="module")
def known(data: Callable[[str], Path]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(data("model-stories260k/greedy_256.json").read_text())
    return found


@pytest.fixture(scope="module")
def outcomes(
    data: Callable[[str], Path], known: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[dict[str, Any]]]]:
    """What rank 0 says in each case. They run side by side: most of their time they wait."""
    config = {
        "model": str(data("model-stories260k/hf")), "dtype": "float32", "num_threads": 1,
        "kv_cache_memory_bytes": 1 << 22, "collective_timeout": 60.0,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("rank0")
    with ThreadPoolExecutor(len(CASES)) as pool:
        yield {
            (layout, end): pool.submit(
                outcome, number, {"config": {**config, layout: 2}, "prompt": known["prompt_ids"], "end": end}, folder
            )
            for number, (layout, end) in enumerate(CASES)
        }


def outcome(number: int, said: dict[str, Any], folder: Path) -> dict[str, Any]:
    with (
        cable(number) as (told, here, there),
        subprocess.Popen(
            ["ip", "netns", "exec", here, sys.executable, "-c", RANK0, json.dumps(said | {"there": there})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        ) as rank0,
    ):  # fmt: skip
        assert rank0.stdin is not None
        assert rank0.stdout is not None
        assert rank0.stderr is not None
        for line in rank0.stdout:
            if line.startswith("{"):
                break
            told(line.strip())
            print("ok", file=rank0.stdin, flush=True)
        errors = rank0.stderr.read()
    assert rank0.returncode == 0, errors[-3000:]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(("layout", "end"), CASES)
def test_a_cable_between_ranks(
    outcomes: dict[tuple[str, str], Future[dict[str, Any]]], known: dict[str, list[int]], layout: str, end: str
) -> None:
    """The same tokens over a good one and over one of 20 ms that loses a packet in a hundred; when it is cut, or the rank behind
    it is stopped, every stream is told, and that rank ends without another's help."""
    found = outcomes[layout, end].result()
    wanted = known["greedy_ids"][len(known["prompt_ids"]) :]
    assert found["tokens"]["good"] == wanted[:60]
    assert found["tokens"]["bad"] == wanted[:10]
    for name in "abc":
        assert found["tokens"][name] == wanted[: len(found["tokens"][name])]
    assert all(words in message for message in found["messages"] for words in ENDINGS[end])


def test_a_firewall_that_lets_one_port_through(data: Callable[[str], Path], tmp_path: Path) -> None:
    """It is told at the start which rank can't reach which, and by what port, though it has said hello."""
    config = {"model": str(data("model-stories260k/hf")), "num_threads": 1, "tensor_parallel_size": 2}
    with cable(len(CASES)) as (told, here, there):
        said = json.dumps({"config": config, "there": there})
        with subprocess.Popen(
            ["ip", "netns", "exec", here, sys.executable, "-c", FENCED, said],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        ) as rank0:  # fmt: skip
            assert rank0.stdout is not None
            told(rank0.stdout.readline().strip())
            answer, errors = rank0.communicate("ok\n", timeout=300)
    assert rank0.returncode == 0, errors[-3000:]
    text = json.loads(answer)
    assert re.match(r"rank 1 \(pid \d+ on 10.77.0.2\) failed: it can't reach rank 0 on 10.77.0.1 by port \d+", text)
    assert "a firewall between their nodes" in text
