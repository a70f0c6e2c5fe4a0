"""What this machine's cores do, measured while so many ranks do it at once: for `kvasir plan --gpu cpu`.

A GPU's limits are published. A CPU's aren't: what a rank gets of the memory depends on how many others read, and a product of
8 rows is bound by neither bytes nor operations alone.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.cores import usable_cores
from kvasir.engine.memory import available_ram, keep_freed_memory
from kvasir.engine.mesh import Mesh, Place, c10d, host_store, join, reach_store
from kvasir.engine.parallel_plan import Device
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.weights import random_decoder
from kvasir.kernels.linear import Weight, linear, packed
from kvasir.kernels.ragged import Ragged

HOST, TIMEOUT_S = "127.0.0.1", 60.0
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH, MATRICES = 2048, 24
"""Of the weights that are read: 200 MB in bfloat16, more than caches hold."""
LAYERS = 8
SMALL = Spec(
    vocab=64, hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=64, eps=1e-5, max_len=64,
    layers=(Layer(Rope(1e4, 32)),) * LAYERS,
)  # fmt: skip
"""Layers so narrow that they take what any layer does, whatever its width."""
SUMS = ((8, 64), (64, 4096))
"""Shapes of a small sum and of a large one."""


def cpu_device(ranks: int, streams: int, dtype: torch.dtype, threads: int | None = None) -> Device:
    """Of one of so many ranks, in steps of so many streams. Takes seconds."""
    threads = threads or max(1, usable_cores() // ranks)
    store, port = host_store(HOST, ranks, TIMEOUT_S)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(ranks)]
    running = [
        spawn.Process(target=_rank, args=(rank, ranks, port, threads, streams, dtype, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(running, pipes, strict=True):
        process.start()
        pipe.close()  # so that a process that died is an EOFError
    try:
        found = [pipe.recv() for pipe, _ in pipes]
    finally:
        for process in running:
            process.kill()
            process.join()
        del store
    return _device([max(values) for values in zip(*found, strict=True)], available_ram() // ranks, dtype)


def _device(slowest: Sequence[float], memory: int, dtype: torch.dtype) -> Device:
    """From the seconds of the slowest rank: a pass over the weights per count of rows, a layer, two sums, a hand-over."""
    size = MATRICES * WIDTH * WIDTH * dtype.itemsize
    passes, (layer, small, large, message) = slowest[: len(ROWS)], slowest[len(ROWS) :]
    small_bytes, large_bytes = (height * width * dtype.itemsize for height, width in SUMS)
    link = (large_bytes - small_bytes) / max(large - small, 1e-9)
    return Device(
        memory,
        bandwidth=size / passes[0],
        rate=max(2 * count * size / dtype.itemsize / each for count, each in zip(ROWS, passes, strict=True)),
        link=link,
        latency=small,
        message=message,
        layer=layer,
        products=tuple((count, size / each) for count, each in zip(ROWS, passes, strict=True)),
        kind="cpu",
    )


def _rank(rank: int, size: int, port: int, threads: int, streams: int, dtype: torch.dtype, answer: Connection) -> None:
    """A process: tells the seconds of each thing."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    store = reach_store(HOST, port, size, TIMEOUT_S)
    side = _joined(store, "tp", Place(size, 1, rank, size))
    row = _joined(store, "pp", Place(1, size, rank, size))
    weights = [packed(torch.ones(WIDTH, WIDTH, dtype=dtype)) for _ in range(MATRICES)]
    found = [_timed(side, partial(_multiplied, torch.ones(count, WIDTH, dtype=dtype), weights), 5) for count in ROWS]
    found.append(_layer(side, streams, dtype))
    found += [_timed(side, partial(side.reduce, torch.ones(shape, dtype=dtype)), 50) for shape in SUMS]
    found.append(_timed(row, lambda: _there_and_back(row, dtype), 50) / 2)
    answer.send(found)
    with suppress(EOFError):
        answer.recv()  # until it is ended: none leaves before the others are done


def _multiplied(x: Tensor, weights: Sequence[Weight]) -> None:
    for weight in weights:
        linear(x, weight)


def _joined(store: Any, name: str, place: Place) -> Mesh:
    return join(place, c10d.PrefixStore(name, store), torch.device("cpu"), HOST, TIMEOUT_S)


def _timed(mesh: Mesh, run: Callable[[], object], times: int) -> float:
    """Median of seconds; all ranks begin at once."""
    run()
    found = []
    mesh.least(0)
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def _there_and_back(mesh: Mesh, dtype: torch.dtype) -> None:
    """A row from the first stage to the second one; what comes back is as small."""
    x = torch.ones(1, 64, dtype=dtype)
    if mesh.place.size == 1 or mesh.place.stage > 1:
        return
    if mesh.place.stage == 0:
        mesh.send(x)
        mesh.world.recv([x], 1, 1).wait()
    else:
        mesh.receive(1, 64, dtype, mesh.device)
        mesh.world.send([x], 0, 1).wait()


def _layer(mesh: Mesh, rows: int, dtype: torch.dtype) -> float:
    """Of a step of so many sequences behind 15 tokens."""
    decoder = random_decoder(SMALL, dtype, mesh.device)
    cache = KVCache(SMALL, rows, 16, dtype, mesh.device)
    starts, lengths = np.arange(rows + 1, dtype=np.int32), np.full(rows, 16, np.int32)
    tensors = torch.from_numpy(starts), torch.from_numpy(lengths)
    table = torch.arange(rows, dtype=torch.int32)[:, None]
    positions, slots = torch.full((rows,), 15), torch.arange(rows) * 16 + 15
    ragged = Ragged(positions, slots, *tensors, table, starts, lengths)
    tokens, wanted = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)

    return _timed(mesh, lambda: decoder(tokens, ragged, cache, wanted), 20) / LAYERS
