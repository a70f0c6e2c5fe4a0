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
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.cores import usable_cores
from kvasir.engine.decoder import Decoder
from kvasir.engine.layers import Linear
from kvasir.engine.memory import available_ram, keep_freed_memory
from kvasir.engine.mesh import Mesh, Place, c10d, host_store, join, reach_store
from kvasir.engine.parallel_plan import Device
from kvasir.engine.rank import Rank
from kvasir.engine.request import SamplingParams
from kvasir.engine.share import layer_cost
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.step import NewSequence, Slice, Step
from kvasir.engine.weights import random_decoder
from kvasir.kernels.ragged import Ragged

HOST, TIMEOUT_S = "127.0.0.1", 300.0
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHUNK, BEFORE = 256, 768
"""Tokens of a piece of a prompt, and of what lies before it."""
BLOCK = 16
SAMPLE_BYTES, MOST_LAYERS = 200_000_000, 32
"""Of the weights that are read: more than caches hold."""
SUMS = ((8, 64), (64, 4096))
"""Shapes of a small sum and of a large one."""


def cpu_device(ranks: int, spec: Spec, streams: int, dtype: torch.dtype, threads: int | None = None) -> Device:
    """Of one of so many ranks, in steps of so many streams: some of the model's own layers, with random weights. Takes
    seconds."""
    threads = threads or max(1, usable_cores() // ranks)
    sample = sample_of(spec, dtype)
    store, port = host_store(HOST, ranks, TIMEOUT_S)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(ranks)]
    running = [
        spawn.Process(
            target=_rank, args=(rank, ranks, port, threads, sample, spec.vocab, few(streams), dtype, pipe), daemon=True
        )
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
    slowest = [max(values) for values in zip(*(together for together, _ in found), strict=True)]
    facts = sample, few(streams), available_ram() // ranks, dtype
    single = [*found[0][1], *slowest[len(found[0][1]) :]]
    return replace(device_of(slowest, *facts), ranks=ranks, alone=device_of(single, *facts))


def few(streams: int) -> int:
    """So many are measured."""
    return min(streams, CHUNK // 4)


def sample_of(spec: Spec, dtype: torch.dtype) -> Spec:
    """Some of its layers, mixtures of experts as plain ones, and next to no vocabulary."""
    plain = replace(
        spec, vocab=64, embed_dim=None, tied=True, lm_head=True, head_bias=False, causal=True, experts=None,
        positions=spec.positions and 2 * (BEFORE + CHUNK), layers=(replace(spec.layers[0], experts=False),),
        names={}, split=None,
    )  # fmt: skip
    depth = -(-SAMPLE_BYTES // int(layer_cost(plain, 0) * dtype.itemsize))
    layers = (
        replace(spec.layers[number % len(spec.layers)], experts=False) for number in range(min(depth, MOST_LAYERS))
    )
    return replace(plain, layers=tuple(layers))


def device_of(slowest: Sequence[float], sample: Spec, streams: int, memory: int, dtype: torch.dtype) -> Device:
    """From the seconds of the slowest rank: the products of all layers per count of rows, steps of streams and of pieces of
    a prompt, two sums, a hand-over, a step without a model."""
    passes, (stepped, first, later, small, large, message, step) = slowest[: len(ROWS)], slowest[len(ROWS) :]
    depth = len(sample.layers)
    size = sum(layer_cost(sample, number) for number in range(depth)) * dtype.itemsize
    small_bytes, large_bytes = (height * width * dtype.itemsize for height, width in SUMS)
    rate = max(2 * rows * size / dtype.itemsize / each for rows, each in zip(ROWS, passes, strict=True))
    scores = 4 * sample.heads * sample.head_dim * depth * CHUNK
    attention = min(rate, scores * BEFORE / max(later - first, 1e-9))
    found = Device(
        memory,
        bandwidth=size / passes[0],
        rate=rate,
        link=(large_bytes - small_bytes) / max(large - small, 1e-9),
        latency=small,
        message=message,
        attention=attention,
        step=step,
        products=tuple((rows, size / each) for rows, each in zip(ROWS, passes, strict=True)),
        kind="cpu",
    )
    few_rows = (stepped - found.product(size, size, streams)) / depth
    many_rows = (first - passes[-1] - scores * CHUNK / 2 / attention) / depth
    row = max(0.0, (many_rows - few_rows) / (CHUNK - streams))
    return replace(found, layer=max(0.0, few_rows - row * streams), row=row)


def _rank(
    rank: int,
    size: int,
    port: int,
    threads: int,
    sample: Spec,
    vocab: int,
    streams: int,
    dtype: torch.dtype,
    answer: Connection,
) -> None:
    """A process: tells the seconds of each thing, and of those that need no other rank how long the first one takes alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    store = reach_store(HOST, port, size, TIMEOUT_S)
    side = _joined(store, "tp", Place(size, 1, rank, size))
    row = _joined(store, "pp", Place(1, size, rank, size))
    decoder = random_decoder(sample, dtype, side.device, pack=False)
    products = [
        (part, part.weight.shape[1])
        for part in decoder.modules()
        if isinstance(part, Linear) and isinstance(part.weight, Tensor)
    ]
    decoder.pack()
    cache = KVCache(sample, max(streams, (BEFORE + CHUNK) // BLOCK), BLOCK, dtype, side.device)
    steps = ((streams, 1, BLOCK - 1), (1, CHUNK, 0), (1, CHUNK, BEFORE))
    runs = [partial(_multiplied, rows, dtype, products) for rows in ROWS]
    runs += [partial(stepped, decoder, cache, *step) for step in steps]
    found = [_timed(side, run, 3) for run in runs]
    alone = [_timed(Mesh(), run, 3) for run in runs] if size > 1 and rank == 0 else [*found]
    found += [_timed(side, partial(side.reduce, torch.ones(shape, dtype=dtype)), 50) for shape in SUMS]
    found.append(_timed(row, lambda: _there_and_back(row, dtype), 50) / 2)
    found.append(_timed(side, bare_step(vocab, streams, dtype), BLOCK - 2))
    answer.send((found, alone))
    with suppress(EOFError):
        answer.recv()  # until it is ended: none leaves before the others are done


def _multiplied(rows: int, dtype: torch.dtype, products: Sequence[tuple[Linear, int]]) -> None:
    for part, inputs in products:
        part(torch.ones(rows, inputs, dtype=dtype))


def bare_step(vocab: int, streams: int, dtype: torch.dtype) -> Callable[[], object]:
    """A step of so many streams of next to no model, with a whole vocabulary: Python and sampling. Can be run BLOCK - 1 times."""
    spec = Spec(
        vocab=vocab, hidden=64, heads=1, kv_heads=1, head_dim=64, ffn=64, eps=1e-5, max_len=BLOCK, layers=(Layer(Rope(1e4, 64)),)
    )  # fmt: skip
    decoder = random_decoder(spec, dtype, torch.device("cpu"))
    cache = KVCache(spec, streams, BLOCK, dtype, decoder.device)
    rank = Rank(decoder, cache, max_num_seqs=streams, max_model_len=BLOCK)
    new = [NewSequence(seat, (0,), 1, SamplingParams(temperature=0), 0, ()) for seat in range(streams)]
    blocks = [(seat, 0, (seat,)) for seat in range(streams)]
    rank.run(Step(0, new=new, blocks=blocks, slices=[Slice(seat, 0, 1, True) for seat in range(streams)]))
    positions = count(1)

    def run() -> object:
        at = next(positions)
        return rank.run(Step(at, slices=[Slice(seat, at, 1, True) for seat in range(streams)]))

    return run


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


def stepped(decoder: Decoder, cache: KVCache, sequences: int, count: int, before: int) -> None:
    """Of so many sequences, `count` rows each behind so many tokens."""
    blocks = -(-(before + count) // BLOCK)
    starts = np.arange(sequences + 1, dtype=np.int32) * count
    lengths = np.full(sequences, before + count, np.int32)
    table = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = (before + torch.arange(count)).repeat(sequences)
    slots = positions + torch.arange(sequences).repeat_interleave(count) * blocks * BLOCK
    ragged = Ragged(positions, slots, torch.from_numpy(starts), torch.from_numpy(lengths), table, starts, lengths)
    decoder(torch.zeros(sequences * count, dtype=torch.int64), ragged, cache, torch.arange(sequences))
