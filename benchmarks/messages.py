"""How soon a step's message has reached all ranks of a node: over the connections that serve, and through shared memory.

    python benchmarks/messages.py --ranks 1 3

A step of 256 decoding sequences. Each rank notes the time (of a clock that processes share) when it has the whole frame; what
counts is the last one. Shared memory needs a way to wake its readers: an eventfd for each, or readers that never sleep (`spins`),
which takes a core from the tensor work of each of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.shared_memory import SharedMemory

from kvasir.engine.codec import encode_step
from kvasir.engine.control import Hub, Spoke
from kvasir.engine.step import Result, Slice, Step

STAMP = struct.Struct("<d")
HEAD = struct.Struct("<qI")
"""Number of the newest frame, its length."""
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
def connections(ranks: int) -> Iterator[Way]:
    """What serves."""
    hub, pipes = Hub("127.0.0.1", ranks + 1), [os.pipe() for _ in range(ranks)]

    def run(number: int) -> None:
        spoke = Spoke(hub.address, hub.token, number + 1, os.getpid(), gone=lambda: os._exit(0))
        while True:
            spoke.receive()
            os.write(pipes[number][1], STAMP.pack(time.monotonic()))

    with children(ranks, run):
        hub.meet(10)
        yield hub.step, lambda: [STAMP.unpack(os.read(read, STAMP.size))[0] for read, _ in pipes]
        hub.close()
    for descriptor in (end for pipe in pipes for end in pipe):
        os.close(descriptor)


@contextmanager
def shared(ranks: int, spins: bool) -> Iterator[Way]:
    """One writer, whose frame all ranks read."""
    memory = SharedMemory(create=True, size=1 << 20)
    view = memory.buf
    HEAD.pack_into(view, 0, 0, 0)
    wakes, pipes = [os.eventfd(0) for _ in range(ranks)], [os.pipe() for _ in range(ranks)]
    newest = 0

    def run(number: int) -> None:
        wanted = 0
        while True:
            wanted += 1
            if not spins:
                os.eventfd_read(wakes[number])
            while HEAD.unpack_from(view)[0] != wanted:
                pass
            bytes(view[HEAD.size : HEAD.size + HEAD.unpack_from(view)[1]])
            os.write(pipes[number][1], STAMP.pack(time.monotonic()))

    def send(frame: bytes) -> None:
        nonlocal newest
        newest += 1
        view[HEAD.size : HEAD.size + len(frame)] = frame
        HEAD.pack_into(view, 0, newest, len(frame))
        if not spins:
            for wake in wakes:
                os.eventfd_write(wake, 1)

    with children(ranks, run):
        yield send, lambda: [STAMP.unpack(os.read(read, STAMP.size))[0] for read, _ in pipes]
    for descriptor in (*wakes, *(end for pipe in pipes for end in pipe)):
        os.close(descriptor)
    view.release()
    memory.close()
    memory.unlink()


def measure(way: Way, frame: bytes, count: int) -> tuple[float, float]:
    """(median, 99th percentile) of microseconds until the last rank has it."""
    send, arrivals = way
    times = []
    for _ in range(count):
        begin = time.monotonic()
        send(frame)
        times.append(max(arrivals()) - begin)
        time.sleep(0.0005)  # ranks wait for a step with nothing to do, not in the middle of the last one
    times.sort()
    return statistics.median(times) * 1e6, times[int(0.99 * len(times))] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3], help="besides rank 0")
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    slices = [Slice(seat, 1000, 1, True) for seat in range(256)]
    frame = encode_step(Step(1, slices=slices), [Result(0, list(range(256)))])
    print(f"{len(frame)} bytes, {len(frame) / 256:.1f} per sequence; microseconds until the last rank has them")
    for ranks in args.ranks:
        ways = (
            ("connections", connections(ranks)),
            ("shared memory, eventfd", shared(ranks, False)),
            ("shared memory, spins", shared(ranks, True)),
        )
        for name, opened in ways:
            with opened as way:
                median, late = measure(way, frame, args.count)
            print(f"{ranks} rank(s)  {name:<24}{median:>8.0f} median {late:>8.0f} p99", flush=True)


if __name__ == "__main__":
    main()
