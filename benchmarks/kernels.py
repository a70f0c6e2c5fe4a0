"""Every CPU kernel on realistic shapes, beside its definition, torch's path and the ceilings of the same run.

    .venv/bin/python benchmarks/kernels.py --threads 2
    .venv/bin/python benchmarks/kernels.py --only attention --cpu-time    one thread, its own time: for busy machines

Ceilings: bytes per second of a float32 sum in huge pages, operations per second of a large bfloat16 product. An op's share is
of the larger of its two floors: bytes it must read and write, operations it must do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ceilings import Clock, ceilings, timed
from refusals import refuse
from torch import Tensor

from kvasir.kernels import activation_native, attention_cpu, attention_native, cache_native, huge_pages, norm_native
from kvasir.kernels.activation import gated
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import turn_and_write
from kvasir.kernels.linear import linear, packed
from kvasir.kernels.moe import Routing, experts, route, stacked_experts
from kvasir.kernels.native import native
from kvasir.kernels.norm import add_rms_norm
from kvasir.kernels.packed_experts import Expert, packed_experts
from kvasir.kernels.quantise import LARGEST, Quantised, quantise
from kvasir.kernels.ragged import Ragged

BLOCK = 16
SHAPES = {"125M": (576, 1536, 9, 3, 64), "1B": (2048, 8192, 32, 8, 64), "8B": (4096, 14336, 32, 8, 128)}
"""hidden, ffn, heads, kv heads, head dim"""
MIXTURES = {"125M": (8, 2, 1024, 1024), "1B": (64, 8, 1024, 512), "8B": (128, 8, 2048, 768)}
"""experts, of which a row has so many, hidden, their ffn"""
MIXES = ((1, 160, 1), (32, 160, 1), (8, 2000, 1), (8, 8000, 1), (1, 512, 512))
"""sequences, length, rows of each"""
DTYPE = torch.bfloat16

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op at one shape by several implementations, and what it must do at least."""

    op: str
    shape: str
    runs: dict[str, Run]
    bytes_: int
    operations: float


@dataclass(frozen=True)
class Found:
    """Medians: seconds of an implementation, and its share of the larger floor."""

    op: str
    shape: str
    backend: str
    seconds: float
    gb_s: float
    tflop_s: float
    share: float


def ragged(sequences: int, length: int, rows: int) -> Ragged:
    """Blocks in random order, as after hours of service."""
    per = -(-length // BLOCK)
    table = torch.randperm(sequences * per).view(sequences, per).int()
    starts = np.arange(sequences + 1, dtype=np.int32) * rows
    lengths = np.full(sequences, length, np.int32)
    positions = torch.arange(length - rows, length).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(rows)
    slots = table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
    return Ragged(positions, slots, torch.from_numpy(starts), torch.from_numpy(lengths), table, starts, lengths)


def caches(step: Ragged, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """In huge pages, as the engine's are."""
    shape = (2, step.table.numel(), kv_heads, BLOCK, dim)
    made = huge_pages.empty(*shape, dtype=DTYPE).normal_().transpose(2, 3)
    return made[0], made[1]


def attention_cases(model: str) -> Iterator[Case]:
    _, _, heads, kv_heads, dim = SHAPES[model]
    for sequences, length, rows in MIXES:
        step = ragged(sequences, length, rows)
        q = torch.randn(sequences * rows, heads, dim).to(DTYPE)
        given = (q, *caches(step, kv_heads, dim), step)
        pairs = sequences * sum(range(length - rows + 1, length + 1))
        runs = {
            "native": lambda given=given: attention_native.attention(*given, scale=0.125),
            "torch": lambda given=given: attention_cpu.attention(*given, scale=0.125),
            "definition": lambda given=given: attention.reference(*given, scale=0.125),
        }
        read = sequences * length * kv_heads * dim * 2 * DTYPE.itemsize
        yield Case("attention", f"{model} {sequences} x {length}, {rows} rows", runs, read, 4.0 * pairs * heads * dim)


def cache_cases(model: str) -> Iterator[Case]:
    """Attention over caches of other types; the floor is what each must read, scales included."""
    _, _, heads, kv_heads, dim = SHAPES[model]
    for sequences, length in ((1, 160), (32, 160), (8, 8000)):
        step = ragged(sequences, length, 1)
        q = torch.randn(sequences, heads, dim).to(DTYPE)
        k, v = caches(step, kv_heads, dim)
        for kind in (torch.bfloat16, *LARGEST):
            kept = (k, v) if kind not in LARGEST else tuple(Quantised(*quantise(part, kind)) for part in (k, v))
            given = (q, *kept, step)
            runs = {
                "native": lambda given=given: attention_native.attention(*given, scale=0.125),
                "torch": lambda given=given: attention_cpu.attention(*given, scale=0.125),
            }
            number = dim * kind.itemsize + (4 if kind in LARGEST else 0)
            work = 4.0 * sequences * length * heads * dim
            shape = f"{model} {sequences} x {length}, {str(kind).removeprefix('torch.')}"
            yield Case("attention", shape, runs, 2 * sequences * length * kv_heads * number, work)


def product_cases(model: str) -> Iterator[Case]:
    hidden, ffn, *_ = SHAPES[model]
    weights = [(torch.randn(2 * ffn, hidden) / hidden**0.5).to(DTYPE) for _ in range(8 if model == "125M" else 2)]
    ours = [packed(weight) for weight in weights]
    theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    for rows in (1, 8, 32, 512):
        x = torch.randn(rows, hidden).to(DTYPE)
        runs: dict[str, Run] = {
            "native": lambda x=x: [linear(x, weight) for weight in ours],
            "oneDNN": lambda x=x: [
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") for weight in theirs
            ],
            "definition": lambda x=x: [F.linear(x, weight) for weight in weights],
        }
        work = 2.0 * rows * weights[0].numel() * len(weights)
        yield Case("linear", f"{model} {rows} x {hidden} -> {2 * ffn}", runs, sum(w.nbytes for w in weights), work)


def expert_cases(model: str) -> Iterator[Case]:
    count, chosen, hidden, ffn = MIXTURES[model]
    up = (torch.randn(count, 2 * ffn, hidden) / hidden**0.5).to(DTYPE)
    down = (torch.randn(count, hidden, ffn) / ffn**0.5).to(DTYPE)
    room = huge_pages.Room()
    ours = [Expert(packed(u, room=room), None, packed(d, room=room), None) for u, d in zip(up, down, strict=True)]
    together = packed_experts(ours, activation="silu", limit=None, gate=True, first=0)

    def run(number: int, rows: Tensor) -> Tensor:
        return linear(gated(linear(rows, ours[number].up), "silu"), ours[number].down)

    for rows in (1, 8, 32, 512):
        x = torch.randn(rows, hidden).to(DTYPE)
        index, weight = route(torch.randn(rows, count), Routing(chosen))
        given = (x, index, weight)
        runs: dict[str, Run] = {
            "one by one": lambda given=given: experts(*given, run),
            "definition": lambda given=given: stacked_experts.reference(*given, up, down, activation="silu"),
        }
        if together is not None:
            runs["native"] = lambda given=given: together(*given, on_input=False)
        size = 3 * ffn * hidden
        shape = f"{chosen} of {count}, {rows} x {hidden} -> {ffn}"
        yield Case("experts", shape, runs, len(index.unique()) * size * DTYPE.itemsize, 2.0 * rows * chosen * size)


def row_cases(model: str) -> Iterator[Case]:
    hidden, ffn, heads, kv_heads, dim = SHAPES[model]
    for rows in (1, 32, 512):
        x, y, weight = (
            torch.randn(rows, hidden).to(DTYPE),
            torch.randn(rows, hidden).to(DTYPE),
            torch.ones(hidden).to(DTYPE),
        )
        wide = torch.randn(rows, 2 * ffn).to(DTYPE)
        step = ragged(rows, 160, 1)
        k_cache, v_cache = caches(step, kv_heads, dim)
        qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(DTYPE).split_with_sizes([heads, kv_heads, kv_heads], 1)
        angles = torch.ones(rows, 1, dim).to(DTYPE), torch.zeros(rows, 1, dim).to(DTYPE)
        turn = (*qkv, angles, k_cache, v_cache, step)
        yield Case(
            "add_rms_norm",
            f"{model} {rows} x {hidden}",
            {
                "native": lambda a=(x, y, weight, 1e-5): norm_native.add_rms_norm(*a),
                "definition": lambda a=(x, y, weight, 1e-5): add_rms_norm.reference(*a),
            },
            4 * x.nbytes,
            0,
        )
        yield Case(
            "gated",
            f"{model} {rows} x {ffn}",
            {
                "native": lambda w=wide: activation_native.gated(w, "silu"),
                "definition": lambda w=wide: gated.reference(w, "silu"),
            },
            wide.nbytes * 3 // 2,
            0,
        )
        yield Case(
            "turn_and_write",
            f"{model} {rows} x {heads} + 2 x {kv_heads} heads",
            {
                "native": lambda t=turn: cache_native.turn_and_write(*t, interleaved=False),
                "definition": lambda t=turn: turn_and_write.reference(*t, interleaved=False),
            },
            2 * sum(part.nbytes for part in (qkv[0].contiguous(), qkv[1].contiguous(), qkv[2].contiguous())),
            0,
        )


FAMILIES = {
    "attention": attention_cases,
    "caches": cache_cases,
    "linear": product_cases,
    "experts": expert_cases,
    "rows": row_cases,
}


def measure(case: Case, repeat: int, clock: Clock) -> Iterator[Found]:
    """The implementations take turns, so that what disturbs one disturbs all; ceilings before and after."""
    before = ceilings(clock)
    times: dict[str, list[float]] = {name: [] for name in case.runs}
    for turn in range(repeat + 1):
        for name, run in case.runs.items():
            if name != "definition" or turn < 3:
                times[name].append(timed(run, clock))
    bandwidth, rate = (statistics.mean(pair) for pair in zip(before, ceilings(clock), strict=True))
    floor = max(case.bytes_ / bandwidth, case.operations / rate)
    for name, all_ in times.items():
        t = statistics.median(all_[1:])
        yield Found(case.op, case.shape, name, t, case.bytes_ / t / 1e9, case.operations / t / 1e12, floor / t)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["125M", "1B"], help="shapes")
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=9, help="turns, of which the median counts")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time instead of the clock's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.cpu_time:
        refuse(parser, args, "with --cpu-time", "threads")
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {DTYPE}; {native().text}")
    print(
        "ceilings: {:.1f} GB/s, {:.3f} TFLOP/s".format(
            *(c / s for c, s in zip(ceilings(clock), (1e9, 1e12), strict=True))
        )
    )
    print(f"{'op':15} {'shape':34} {'backend':11} {'us':>9} {'GB/s':>6} {'TFLOP/s':>8} {'of floor':>8}")
    found = []
    with torch.inference_mode():
        for model in args.model:
            for family in args.only:
                for case in FAMILIES[family](model):
                    for line in measure(case, args.repeat, clock):
                        found.append(line)
                        print(
                            f"{line.op:15} {line.shape:34} {line.backend:11} {line.seconds * 1e6:9.1f} {line.gb_s:6.1f}"
                            f" {line.tflop_s:8.3f} {line.share:8.2f}",
                            flush=True,
                        )
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in found], indent=1))


if __name__ == "__main__":
    main()
