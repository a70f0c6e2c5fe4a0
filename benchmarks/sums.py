"""Exchanges of a stage's ranks, through each way that there is on this device: right, and how long they take.

    python benchmarks/sums.py                             two ranks on a CPU: shared memory, connections, gloo
    python benchmarks/sums.py --device cuda --ranks 8     shared memory and NCCL; one rank: NCCL alone

With --table, up to which size a sum is faster through shared memory goes where kernels/backends.json is written anew.

Medians of a sum, a sum whose rows are dealt out and a gathering of rows, for 8 rows to 8192.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from refusals import refuse
from torch import Tensor

from kvasir.engine.links import Links
from kvasir.engine.memory import keep_freed_memory
from kvasir.engine.mesh import Mesh, Place, c10d, host_store, join, process_group, reach_store
from kvasir.engine.symmetric import BUFFER, SharedSum
from kvasir.kernels.measured import save

HOST = "127.0.0.1"
ROWS = (8, 64, 512, 2048, 8192)


def reach(number: int, size: int, port: int, device: torch.device) -> tuple[Mesh, dict[str, Any]]:
    """A mesh, and its ways to sum."""
    store = reach_store(HOST, port, size, 60.0)
    if size == 1:
        group = process_group(store, 0, 1, device, HOST, 60.0)
        return Mesh(Place(), group, group, None, device), {"alone": None}
    mesh = join(Place(size, 1, number, size, number), store, device, HOST, 60.0)
    ways = {"shared memory": mesh.one_shot, "NCCL" if device.type == "cuda" else "gloo": None}
    if device.type == "cpu":
        ways["connections"] = Links(c10d.PrefixStore("connections", store), number, size, HOST, 60.0, "")
    return mesh, {name: way for name, way in ways.items() if way is not None or name in ("NCCL", "gloo")}


def timed(device: torch.device, run: Callable[[], Tensor]) -> float:
    """Microseconds, median."""
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[5:]) * 1e6


def largest(shared: dict[int, float], other: dict[int, float]) -> int:
    """Bytes of a sum up to which the first is faster, of microseconds by bytes."""
    faster = itertools.takewhile(lambda bytes_: shared[bytes_] < other[bytes_], sorted(shared))
    return max(faster, default=0)


def rank(number: int, size: int, port: int, kind: str, width: int, file: Path | None) -> None:
    device = torch.device(kind, number) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    keep_freed_memory()  # as ranks do
    logging.basicConfig()
    mesh, ways = reach(number, size, port, device)
    sums: dict[str, dict[int, float]] = {}
    for name, way in ways.items():
        mesh.one_shot = mesh.links = way
        if isinstance(way, SharedSum):
            way.most = BUFFER  # all that it can, to see up to where it is worth it
        for count in (-(-count // size) * size for count in ROWS):
            x = torch.full((count, width), number + 1.0, dtype=torch.bfloat16, device=device)
            total = float(sum(range(1, size + 1)))
            takes = way is None or way.takes(x)
            used = name if takes else "the process group"
            assert (mesh.reduce(x.clone()) == total).all()
            part = mesh.scatter_sum(x.clone())
            assert part.shape == (count // size, width)
            assert (part == total).all()
            assert (mesh.gather_rows(part) == total).all()
            took = (
                timed(device, lambda x=x: mesh.reduce(x)),
                timed(device, lambda x=x: mesh.scatter_sum(x)),
                timed(device, lambda part=part: mesh.gather_rows(part)),
            )
            if takes:
                sums.setdefault(name, {})[x.nbytes] = took[0]
            if number == 0:
                figures = " ".join(f"{value:>10.0f}" for value in took)
                print(
                    f"{name:<16}{count:>6} x {width} {x.nbytes / 1e6:>8.3f} MB {figures} us   sum by {used}", flush=True
                )
    if number == 0 and file is not None and "shared memory" in sums:
        most = largest(sums["shared memory"], sums["NCCL"])
        save(file, sums={str(size): most})
        print(f"sums over {size} GPUs are faster through shared memory up to {most} bytes")
    mesh.least(0)  # none leaves before the others are done
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, help="default: 2, or as many as there are GPUs")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--table", type=Path, help="write here what is to become kernels/backends.json")
    args = parser.parse_args()
    if args.device == "cpu":
        refuse(parser, args, "without --device cuda", "table")
    size = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    print(f"{size} rank(s) on {args.device}; microseconds of sum, dealt sum, gathered rows")
    _store, port = host_store(HOST, size, 60.0)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=rank, args=(r, size, port, args.device, args.width, args.table)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
