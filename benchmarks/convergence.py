"""How long after a group stored a block every gateway knows it: real groups' services, real gateways' directories, real sockets.

    .venv/bin/python benchmarks/convergence.py --groups 4 --gateways 2 --rate 500 --seconds 20

A process for all groups, whose engines store blocks in steps without computing anything, and one for each gateway. Clocks are
the machine's own, so all processes have to run on it. A 70 B model at 7,700 tokens a second stores about 500 blocks a second.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

from replay_report import percentile

from kvasir.cluster.directory import BlockDirectory, keys_of
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.blocks import Changes, Tier
from kvasir.engine.event import FinishReason
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

STEP_S = 0.02
HELD = 2_000
"""Blocks of a group; older ones are evicted."""
SETTLE_S = 1.0


class Storing:
    """An engine that does nothing but store and evict blocks, in a thread of its own."""

    def __init__(self, rate: float) -> None:
        self.info = ModelInfo(name="m", max_model_len=2**17, vocab_size=2**17, salt=b"salt" * 4)
        self.stored: dict[int, float] = {}
        """Key -> when."""
        self._each, self._held, self._ended = max(1, round(rate * STEP_S)), deque[bytes](), threading.Event()

    @property
    def heartbeat(self) -> float:
        return time.monotonic()

    stats_at = heartbeat

    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None: ...

    def stats(self) -> Stats:
        return Stats(running=1, steps=len(self.stored))

    def listen(self, on_blocks: Callable[[Tier, Changes], None]) -> None:
        self._on_blocks = on_blocks

    def run(self) -> None:
        """Until `end`."""
        while not self._ended.wait(STEP_S):
            new = [os.urandom(16) for _ in range(self._each)]
            self._held += new
            old = [self._held.popleft() for _ in range(len(self._held) - HELD)]
            self.stored |= dict.fromkeys(keys_of(b"".join(new)), time.monotonic())
            self._on_blocks("device", dict.fromkeys(new, True) | dict.fromkeys(old, False))

    def end(self) -> None:
        self._ended.set()


def groups(count: int, rate: float, pipe: Connection) -> None:
    """Tells where they are; stores from the first word on until the second, then tells when it stored what."""

    async def main() -> None:
        services, engines = [GroupService(Tracing()) for _ in range(count)], [Storing(rate) for _ in range(count)]
        pipe.send([await one.start(engine, "127.0.0.1") for one, engine in zip(services, engines, strict=True)])
        await asyncio.to_thread(pipe.recv)
        threads = [threading.Thread(target=engine.run) for engine in engines]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(pipe.recv)
        for engine in engines:
            engine.end()
        await asyncio.sleep(SETTLE_S)
        pipe.send({key: when for engine in engines for key, when in engine.stored.items()})
        for service in services:
            await service.stop()

    asyncio.run(main())


def gateway(pipe: Connection) -> None:
    """Is told where groups are; says once it follows them all, and at the end when it learnt of which block."""
    known: dict[int, float] = {}
    change = BlockDirectory.change

    def noted(self: BlockDirectory, group: int, tier: Tier, stored, evicted) -> None:  # type: ignore[no-untyped-def]
        change(self, group, tier, stored, evicted)
        known.update(dict.fromkeys(stored, time.monotonic()))

    BlockDirectory.change = noted  # type: ignore[method-assign]

    async def main() -> None:
        directory = GroupDirectory({"m": "m"})
        directory.update("m", pipe.recv())
        while not all(client.alive and client.member._feed.in_step for client in directory.clients("m")):
            await asyncio.sleep(STEP_S)
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)
        pipe.send(known)
        await directory.close()

    asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--rate", type=float, default=500, help="blocks that a group stores in a second")
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = []
    processes = []
    for target, given in ((groups, (args.groups, args.rate)), *[(gateway, ())] * args.gateways):
        mine, theirs = context.Pipe()
        pipes.append(mine)
        processes.append(context.Process(target=target, args=(*given, theirs)))
        processes[-1].start()
    source, *followers = pipes
    endpoints = source.recv()
    for follower in followers:
        follower.send(endpoints)
    for follower in followers:
        follower.recv()
    source.send(None)
    time.sleep(args.seconds)
    source.send(None)
    stored = source.recv()
    for follower in followers:
        follower.send(None)
    known = [follower.recv() for follower in followers]
    for process in processes:
        process.join()
    missing = sum(key not in one for key in stored for one in known)
    print(f"{len(stored)} blocks of {args.groups} groups, {missing} of them unknown to one of {args.gateways} gateways")
    rows = [[one[key] - when for key, when in stored.items() if key in one] for one in known]
    rows.append(
        [max(one[key] for one in known) - when for key, when in stored.items() if all(key in one for one in known)]
    )
    for name, row in zip([*(f"gateway {n}" for n in range(args.gateways)), "all of them"], rows, strict=True):
        p50, p99, most = (1e3 * percentile(row, share) for share in (0.5, 0.99, 1.0))
        late = sum(one > 0.1 for one in row) / len(row)
        print(f"{name}: p50 {p50:.0f} ms, p99 {p99:.0f} ms, at most {most:.0f} ms; {late:.2%} later than 100 ms")


if __name__ == "__main__":
    main()
