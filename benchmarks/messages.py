"""How soon a step's message has reached all ranks of a node: through the memory that they share, and over connections.

    python benchmarks/messages.py --ranks 1 3 7

A step of 256 decoding sequences. Each rank notes the time (of a clock that processes share) when it has the whole frame; what
counts is the last one. Nobody is woken for a note: that would take the cores from the ranks that haven't run yet.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kvasir.engine.codec import encode_step
from kvasir.engine.control import Hub
from kvasir.engine.spoke import Spoke
from kvasir.engine.step import Result, Slice, Step

STAMP = struct.Struct("<d")
Way = tuple[Callable[[bytes], None], Callable[[], list[float]]]
"""(send a frame, when each rank had it)"""


@contextmanager
def children(count: int, run: Callable[[int], None]) -> Iterator[None]:
    """Processes that run until the end of the block."""
    found = []
    for number in range(count):
        if (child := os.fork()) == 0:
            with suppress(BaseException):  # rank 0 is done
                run(number)
            os._exit(0)
        found.append(child)
    try:
        yield
    finally:
        for child in found:
            os.kill(child, 9)
            os.waitpid(child, 0)


@contextmanager
def reached(ranks: int, *, shared: bool) -> Iterator[Way]:
    """As ranks are told: through shared memory, or as ranks of other nodes are."""
    hub, stamps = Hub("127.0.0.1", ranks + 1), mmap.mmap(-1, ranks * STAMP.size)

    def run(number: int) -> None:
        spoke = Spoke(hub.address, hub.token, number + 1, os.getpid(), gone=lambda: os._exit(0))
        where = json.loads(spoke.receive()[1])["board"]
        spoke.ready(where if shared else None, ranks + 1)
        while True:
            spoke.receive()
            STAMP.pack_into(stamps, number * STAMP.size, time.monotonic())

    with children(ranks, run):
        hub.meet(10)
        for rank in range(1, ranks + 1):
            hub.welcome(rank, {})
        hub.all_ready()
        yield hub.step, lambda: [had for (had,) in STAMP.iter_unpack(stamps[:])]
        hub.close()


def measure(way: Way, frame: bytes, count: int) -> tuple[float, float]:
    """(median, 99th percentile) of microseconds until the last rank has it."""
    send, arrivals = way
    times = []
    for _ in range(count):
        begin = time.monotonic()
        send(frame)
        while min(found := arrivals()) < begin:
            time.sleep(0.0005)  # ranks wait for a step with nothing to do, not in the middle of the last one
        times.append(max(found) - begin)
    times.sort()
    return statistics.median(times) * 1e6, times[int(0.99 * len(times))] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3], help="besides rank 0")
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    report(args.ranks, args.count)


def report(others: Sequence[int], count: int) -> None:
    """A line for each number of other ranks, and each way."""
    slices = [Slice(seat, 1000, 1, True) for seat in range(256)]
    frame = encode_step(Step(1, slices=slices), [Result(0, list(range(256)))])
    print(f"{len(frame)} bytes, {len(frame) / 256:.1f} per sequence; microseconds until the last rank has them")
    for ranks in others:
        ways = ("shared memory", reached(ranks, shared=True)), ("connections", reached(ranks, shared=False))
        for name, opened in ways:
            with opened as way:
                median, late = measure(way, frame, count)
            print(f"{ranks} rank(s)  {name:<24}{median:>8.0f} median {late:>8.0f} p99", flush=True)


if __name__ == "__main__":
    main()
