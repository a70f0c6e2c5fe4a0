"""Where two tensor-parallel ranks spend a step: the same halves of a model with and without their exchanges, in one run.

    python benchmarks/ranks.py --model 1B
    python benchmarks/ranks.py --model 1B --step 1x256@0      one prompt instead of a decode
    python benchmarks/ranks.py --model 1B --pin               each rank on a core of its own

- alone: the whole model in one process, on one core and on two
- apart: both halves at once in two processes that exchange nothing, layer by layer as ranks go through them: what two cores
  and one memory allow; and the same halves as one compiled call
- ranks: sums through shared memory, in one compiled call (what serves on one node) and layer by layer; over connections of our
  own (what serves between nodes), over gloo, and with rows dealt out (sequence parallelism)

Medians, and the fastest steps: other work on the machine only ever adds. `x work` is the time over that of one process on one
core per unit of work, on a machine where it alone uses the memory; `x apart` the same beside another that does as much. Bytes
and calls are a rank's own, beside what theory says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
from decoder import BLOCK, CPU, SHAPES, spec_of
from steps import DTYPE, Steps

from kvasir.engine import rows
from kvasir.engine.cache import KVCache
from kvasir.engine.links import Links
from kvasir.engine.memory import keep_freed_memory
from kvasir.engine.mesh import Mesh, Place, host_store, join, reach_store
from kvasir.engine.share import share_of
from kvasir.engine.weights import random_decoder

HOST = "127.0.0.1"
WAYS = (
    "alone, one core",
    "alone, two cores",
    "apart, layer by layer",
    "apart, one call",
    "ranks, one call",
    "ranks, layer by layer",
    "ranks, connections",
    "ranks, gloo",
    "ranks, rows dealt out",
)


class Half:
    """A rank's part of the model, and the ways in which it can run."""

    def __init__(self, model: str, step: tuple[int, int, int], mesh: Mesh, links: Links) -> None:
        share = share_of(spec_of(model), mesh)
        decoder = random_decoder(share.full, DTYPE, CPU, share=share)
        self.steps = Steps(decoder, *step)
        sequences, count, context = step
        blocks = sequences * -(-(context + count + 1) // BLOCK)
        self.steps.paged.cache = KVCache(share.spec, blocks, BLOCK, DTYPE, CPU, layers=share.layers)
        self.shared, self.links = mesh.links, links
        self.decoder, self.mesh, self.group = decoder, mesh, mesh.tensor

    def go(self, way: str) -> None:
        """From now on."""
        mesh, cache = self.mesh, self.steps.paged.cache
        exchanges = way.startswith("ranks")
        mesh.tensor = self.group if exchanges else None
        mesh.links = self.links if way == "ranks, connections" else self.shared
        mesh.one_shot = mesh.links if exchanges and way != "ranks, gloo" else None
        rows.dealing_wins = lambda *_: way == "ranks, rows dealt out"
        self.decoder._stack = None if way.endswith("one call") else (cache, None)


def rank(number: int, args: argparse.Namespace, step: tuple[int, int, int], port: int, orders: Connection) -> None:
    """A process: answers every way with the seconds of its steps, and what it exchanged."""
    if args.pin:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    torch.set_num_threads(1)
    keep_freed_memory()
    store = reach_store(HOST, port, 2, 100.0)
    mesh = join(Place(2, 1, number), store, CPU, HOST, 100.0)
    links = Links(torch.distributed.PrefixStore("connections", store), number, 2, HOST, 100.0, "")
    half = Half(args.model, step, mesh, links)
    while way := orders.recv():
        half.go(way)
        traffic = half.mesh.traffic
        times = []
        for _ in range(args.steps + 1):
            traffic.calls, traffic.bytes = 0, 0.0
            half.mesh.least(0)  # both begin at once
            begin = time.perf_counter()
            half.steps()
            times.append(time.perf_counter() - begin)
        orders.send((times[1:], traffic.calls, traffic.bytes))
    half.mesh.close()


def alone(model: str, step: tuple[int, int, int]) -> Steps:
    return Steps(random_decoder(spec_of(model), DTYPE, CPU), *step)


def run(steps: Steps, threads: int, count: int) -> tuple[list[float], int, float]:
    torch.set_num_threads(threads)
    times = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        steps()
        times.append(time.perf_counter() - begin)
    return times[1:], 0, 0.0


def theory(model: str, step: tuple[int, int, int]) -> str:
    """Of two ranks: two sums per layer and one for the embedding; the last layer's only for the rows that are sampled, whose
    half logits the second rank sends besides."""
    spec = spec_of(model)
    sequences, count, _ = step
    row = spec.hidden * DTYPE.itemsize
    depth = len(spec.layers)
    sums = (2 * depth - 1) * sequences * count * row + 2 * sequences * row
    logits = sequences * spec.vocab // 2 * DTYPE.itemsize
    return f"{2 * depth + 2} calls, {sums / 1e6:.3f} MB (rank 1: + {logits / 1e6:.3f} MB of logits)"


def report(found: dict[str, list[Any]]) -> None:
    """A line for each way: runs of (seconds of each step, calls, bytes)."""
    steps = {way: sorted(s for times, *_ in runs for s in times) for way, runs in found.items()}
    print(f"{'':<24}{'median':>10}{'x work':>8}{'x apart':>8}{'fastest':>11}{'x work':>8}{'x apart':>8}")
    for way, runs in found.items():
        line = f"{way:<24}"
        for at in (0.5, 0.0):
            seconds, alone, apart = (
                steps[each][int(at * len(steps[each]))] for each in (way, "alone, one core", "apart, one call")
            )
            ranks = 1 if way == "alone, one core" else 2
            line += f"{seconds * 1e3:>{10 if at else 8}.2f} ms{ranks * seconds / alone:>7.2f}{seconds / apart:>8.2f}"
        _, calls, sent = runs[-1]
        print(line, f"{calls:>5} calls {sent / 1e6:8.3f} MB" if calls else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="1B")
    parser.add_argument("--step", default="8x1@128", help="SEQUENCESxROWS@CONTEXT")
    parser.add_argument("--steps", type=int, default=6, help="per way and round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pin", action="store_true", help="each rank on a core of its own")
    args = parser.parse_args()
    sequences, _, rest = args.step.partition("x")
    count, _, context = rest.partition("@")
    step = int(sequences), int(count), int(context)
    keep_freed_memory()
    _store, port = host_store(HOST, 2, 100.0)
    context_of = multiprocessing.get_context("spawn")
    pipes = [context_of.Pipe() for _ in range(2)]
    ranks = [context_of.Process(target=rank, args=(r, args, step, port, pipes[r][1])) for r in range(2)]
    for process in ranks:
        process.start()
    whole = alone(args.model, step)
    found: dict[str, list[Any]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            if way.startswith("alone"):
                found[way].append(run(whole, 1 if way.endswith("one core") else 2, args.steps))
                continue
            for pipe, _ in pipes:
                pipe.send(way)
            answers = [pipe.recv() for pipe, _ in pipes]
            slower = [max(pair) for pair in zip(*(answer[0] for answer in answers), strict=True)]
            found[way].append((slower, *answers[0][1:]))
    for (pipe, _), process in zip(pipes, ranks, strict=True):
        pipe.send("")
        process.join()
    print(f"{args.model}, {args.step}, {args.rounds} x {args.steps} steps{', pinned' if args.pin else ''}")
    report(found)
    print(f"theory: {theory(args.model, step)}")


if __name__ == "__main__":
    main()
