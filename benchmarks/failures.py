"""How soon the death of a rank is known, its streams are told, its group's memory is free, and a group serves again.

    python benchmarks/failures.py                      ranks as processes of this one (mp), TP 2 and PP 2
    python benchmarks/failures.py --ray --rounds 2     ranks as Ray's actors under Serve, which starts the group again

Milliseconds since the rank died, was stopped, or first failed; medians over the rounds. `verdict`: rank 0 knows who and why
(mp alone: under Serve it is in another process). `told`: the last of three streams has its error. `freed`: no process of the
old group is left (mp: of the other ranks). `again`: a new group's first token, its start included. A hang is given up after
--collective-timeout, and the time counts from when it began. At the end: what is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Event, Failed, Token
from kvasir.engine.hub import locate
from kvasir.engine.request import Request, SamplingParams

LONG = SamplingParams(temperature=1.0, seed=1, max_tokens=300, ignore_eos=True)
STREAMS = 3
SIGNALS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGSEGV": signal.SIGSEGV}
WAYS = (*SIGNALS, "exception in a kernel", "out of memory", "hung exchange", "Python's lock held")
STAMPS = ("verdict", "told", "freed", "again")
OBEYS = """
import ctypes, os, threading, time

def fail(how, at):
    import torch
    from kvasir.engine import layers
    from kvasir.engine.mesh import Mesh

    def note():
        with open(at + ".new", "w") as file:
            file.write(str(time.monotonic()))
        os.rename(at + ".new", at)

    def fails(*_):
        if not os.path.exists(at):
            note()
        if how == "hung exchange":
            time.sleep(600)
        if how == "out of memory":
            torch.empty(1 << 52)
        raise RuntimeError("a kernel raised")

    if how == "Python's lock held":
        note()
        ctypes.PyDLL(None).sleep(600)
    if how == "hung exchange":
        Mesh.reduce = Mesh.send = Mesh.receive = fails
    else:
        layers.linear = fails

def wait():
    order = os.path.join({folder!r}, str(os.getpid()))
    while not os.path.exists(order):
        time.sleep(0.005)
    with open(order) as file:
        fail(file.read(), order + ".at")

threading.Thread(target=wait, daemon=True).start()
"""
"""sitecustomize of every rank's process: from when a file is named like it, it fails the way that the file says."""


class Strike:
    """Makes a rank fail; `at` is when it did."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(OBEYS.replace("{folder!r}", repr(str(folder))))

    def __call__(self, pid: int, how: str) -> float:
        if how in SIGNALS:
            at = time.monotonic()
            os.kill(pid, SIGNALS[how])
            return at
        (self._folder / "new").write_text(how)
        (self._folder / "new").rename(self._folder / str(pid))
        said = self._folder / f"{pid}.at"
        until(said.exists)
        return float(said.read_text())


def until(condition: Callable[[], bool], limit_s: float = 120.0) -> float:
    """When it was first seen to hold."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit_s:
            raise TimeoutError("it didn't happen in time")
        time.sleep(0.001)
    return time.monotonic()


def gone(pids: Sequence[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


class Local:
    """Groups whose ranks are processes of this one."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._failed: dict[str, tuple[float, str]] = {}
        self._first = threading.Event()

    def _start(self) -> Engine:
        engine = Engine(self._config, self._deliver)
        engine.start()
        return engine

    def _submit(self, engine: Engine, name: str) -> None:
        with suppress(Exception):  # the group may have failed since
            engine.submit(Request(request_id=name, prompt_token_ids=[1, 5, 6], sampling=LONG))

    def _deliver(self, events: Sequence[Event]) -> None:
        self._first.set()
        for event in events:
            if isinstance(event, Failed):
                self._failed[event.request_id] = time.monotonic(), event.message
            elif not isinstance(event, Token):
                self._submit(self._engine, event.request_id)  # on and on

    def die(self, strike: Strike, how: str, rng: random.Random) -> tuple[dict[str, float], str]:
        """(when everything was, the cause that streams are told)"""
        self._failed.clear()
        self._engine = self._start()
        hub = self._engine._executor._hub  # type: ignore[attr-defined]
        pids = [peer.pid for peer in hub._peers.values()]
        found: dict[str, float] = {}
        free = hub.on_failure

        def failed() -> None:
            found["verdict"] = time.monotonic()
            free()

        hub.on_failure = failed
        for number in range(STREAMS):
            self._submit(self._engine, str(number))
        time.sleep(0.3 + rng.random() * 0.3)
        at = strike(rng.choice(pids), how)
        found["freed"] = until(lambda: gone(pids))
        until(lambda: len(self._failed) == STREAMS)
        found["told"] = max(when for when, _ in self._failed.values())
        self._engine.shutdown()
        self._first.clear()
        self._engine = self._start()
        self._submit(self._engine, "again")
        self._first.wait(120)
        found["again"] = time.monotonic()
        self._engine.shutdown()
        return {name: when - at for name, when in found.items()}, self._failed["0"][1]

    def left(self) -> str:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return f"{len(children)} child processes"

    def close(self) -> None:
        """Nothing of it is left running."""


class Served:
    """A group of Ray's actors under Serve, which starts it again."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        import ray
        from ray import serve
        from ray.serve import RunTarget

        from kvasir.cluster import application
        from kvasir.cluster.rank_actor import RankSetup

        os.environ |= {"PYTHONPATH": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled", logging_config={"log_level": "CRITICAL"})
        target = application.group_deployment("failing", config, 0, "critical").bind(
            config, "failing", 0, RankSetup(host="127.0.0.1", log_level="critical")
        )
        serve.run_many([RunTarget(target, name="failing", route_prefix=None)])
        self._ray, self._serve, self._handle = ray, serve, serve.get_app_handle("failing")
        self._groups = self._placement_groups()

    def _placement_groups(self) -> int:
        table = self._ray.util.placement_group_table().values()
        return sum(group["state"] != "REMOVED" for group in table)

    def _endpoint(self) -> Any:
        (answer,) = self._handle.broadcast("endpoint").results(timeout_s=30, return_exceptions=True)
        return answer[0] if isinstance(answer, tuple) else None

    async def _stream(self, client: Any, name: str) -> tuple[float, str]:
        from kvasir.engine.errors import KvasirError

        try:
            for turn in range(1000):
                request = Request(request_id=f"{name}-{turn}", prompt_token_ids=[1, 5, 6], sampling=LONG)
                async for event in await client.submit(request):
                    if isinstance(event, Failed):
                        return time.monotonic(), event.message
        except KvasirError as error:
            return time.monotonic(), error.message
        raise AssertionError("the group outlived its rank")

    async def _streams(self, where: Any, act: Callable[[], float]) -> tuple[float, list[tuple[float, str]]]:
        from kvasir.cluster.group_client import GroupClient

        client = GroupClient(where)
        client.start()
        while not client.alive:
            await asyncio.sleep(0.01)
        running = [asyncio.ensure_future(self._stream(client, str(number))) for number in range(STREAMS)]
        await asyncio.sleep(0.5)
        at = await asyncio.to_thread(act)
        ends = await asyncio.gather(*running)
        await client.close()
        return at, ends

    async def _first_token(self, where: Any) -> float:
        from kvasir.cluster.group_client import GroupClient

        client = GroupClient(where)
        client.start()
        while not client.alive:
            await asyncio.sleep(0.01)
        stream = await client.submit(Request(request_id="again", prompt_token_ids=[1, 5, 6], sampling=LONG))
        async for _ in stream:
            break
        when = time.monotonic()
        await client.close()
        return when

    def die(self, strike: Strike, how: str, rng: random.Random) -> tuple[dict[str, float], str]:
        """As Local.die."""
        until(lambda: self._endpoint() is not None)
        where, pids = self._endpoint(), self._handle.broadcast("rank_pids").results(timeout_s=30)[0]
        freed: list[float] = []
        watch = threading.Thread(target=lambda: freed.append(until(lambda: gone(pids))))
        watch.start()
        at, ends = asyncio.run(self._streams(where, lambda: strike(rng.choice(pids), how)))
        watch.join()
        until(lambda: self._endpoint() not in (None, where))
        again = asyncio.run(self._first_token(self._endpoint()))
        found = {"told": max(when for when, _ in ends), "freed": freed[0], "again": again}
        return {name: when - at for name, when in found.items()}, ends[0][1]

    def left(self) -> str:
        return f"{self._placement_groups()} placement groups, {self._groups} before"

    def close(self) -> None:
        """The group ends, and Ray."""
        self._serve.shutdown()
        self._ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="skald")
    parser.add_argument("--ray", action="store_true", help="Ray's actors under Serve")
    parser.add_argument("--layouts", default="2x1,1x2", help="TPxPP, separated by commas")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--collective-timeout", type=float, default=20.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        strike, rng = Strike(Path(name)), random.Random(0)
        sys.path.insert(0, name)  # ranks inherit it
        print(f"{'ranks':<7}{'way':<23}" + "".join(f"{stamp:>10}" for stamp in STAMPS) + "  what streams are told")
        for layout in args.layouts.split(","):
            tp, pp = map(int, layout.split("x"))
            config = EngineConfig(
                model=str(locate(args.model)), dtype="float32", num_threads=1, tensor_parallel_size=tp,
                pipeline_parallel_size=pp, kv_cache_memory_bytes=1 << 24, max_model_len=512,
                collective_timeout=args.collective_timeout,
            )  # fmt: skip
            group: Local | Served = Served(config, Path(name)) if args.ray else Local(config)
            for how in args.ways:
                slow = how in ("hung exchange", "Python's lock held")  # it takes as long as it was told to
                rounds = 1 if slow else args.rounds
                runs, causes = zip(*(group.die(strike, how, rng) for _ in range(rounds)), strict=True)
                line = f"{layout:<7}{how:<23}"
                for stamp in STAMPS:
                    times = [run[stamp] for run in runs if stamp in run]
                    line += f"{statistics.median(times) * 1e3:>10.0f}" if times else f"{'':>10}"
                print(line, "", re.sub(r"\s+", " ", causes[-1])[:120], flush=True)
            print(f"{layout:<7}left behind: {group.left()}")
            group.close()


if __name__ == "__main__":
    main()
