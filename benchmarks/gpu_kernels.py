"""Every Triton kernel on realistic shapes, beside its definition in torch and the ceilings of the same run; on a GPU.

    python benchmarks/gpu_kernels.py --json kernels.json
    python benchmarks/gpu_kernels.py --device cpu --model tiny      the same by plain torch, to try the script itself

Ceilings: bytes per second of a copy (read and written), operations per second of a large bfloat16 product. An op's share is
of the larger of its two floors: bytes it must move over bandwidth, operations it must do over that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.activation import gated
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import turn_and_write
from kvasir.kernels.linear import Tiled, linear, packed
from kvasir.kernels.lora import expand, shrink
from kvasir.kernels.moe import Routing, route, stacked_experts
from kvasir.kernels.norm import add_rms_norm
from kvasir.kernels.op import Op
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.sample import draw, greedy

BLOCK, DTYPE = 16, torch.bfloat16
FAR = 0.03
"""A difference, by the largest value, that no rounding to bfloat16 makes."""


@dataclass(frozen=True)
class Model:
    """hidden, ffn, heads, kv heads, head dim of one rank; experts and how many a row takes; the width of a latent's values."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    experts: int = 0
    taken: int = 0
    latent: int | None = None
    vocab: int = 128_256


MODELS = {
    "tiny": Model(64, 128, 4, 2, 64, 8, 2, vocab=1000),
    "8B": Model(4096, 14336, 32, 8, 128),
    "70B/TP8": Model(8192, 3584, 8, 1, 128),
    "Mixtral/TP2": Model(4096, 7168, 16, 4, 128, 8, 2, vocab=32000),
    "DeepSeek/TP8": Model(7168, 2048, 16, 1, 576, 32, 8, latent=512, vocab=129_280),
}
MIXES = ((1, 8000, 1), (64, 1000, 1), (64, 8000, 1), (1, 4096, 4096), (1, 16384, 16384), (1, 100_000, 1))
"""sequences, length, rows of each"""
TINY = ((2, 70, 1), (1, 40, 40))


@dataclass(frozen=True)
class Case:
    """One call, and what it must move and do at least."""

    name: str
    op: Op[..., Any] | str
    """A name where there are `ways` instead."""
    args: tuple[Any, ...]
    options: dict[str, Any]
    bytes_: float
    operations: float = 0.0
    definition: bool = True
    """Whether plain torch is worth waiting for."""
    ways: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """By whom it can be done, if it is no op."""


@dataclass(frozen=True)
class Found:
    """Medians of one implementation."""

    op: str
    shape: str
    backend: str
    seconds: float
    gb_s: float
    tflop_s: float
    share: float


def ragged(sequences: int, length: int, rows: int, device: torch.device) -> Ragged:
    """Blocks in random order, as after hours of service."""
    per = -(-length // BLOCK)
    table = torch.randperm(sequences * per).view(sequences, per).int()
    starts = np.arange(sequences + 1, dtype=np.int32) * rows
    lengths = np.full(sequences, length, np.int32)
    positions = torch.arange(length - rows, length).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(rows)
    slots = table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
    sent = [t.to(device) for t in (positions, slots, torch.from_numpy(starts), torch.from_numpy(lengths), table)]
    return Ragged(*sent, starts, lengths)


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def attention_cases(model: Model, mixes: tuple[tuple[int, int, int], ...], device: torch.device) -> Iterator[Case]:
    for sequences, length, rows in mixes:
        step = ragged(sequences, length, rows, device)
        blocks = step.table.numel()
        k, v = (random(blocks, model.kv_heads, BLOCK, model.dim, device=device).transpose(1, 2) for _ in range(2))
        q = random(sequences * rows, model.heads, model.dim, device=device)
        value = model.latent or model.dim
        pairs = sequences * sum(range(length - rows + 1, length + 1))
        kinds = 1 if model.latent else 2
        read = sequences * length * model.kv_heads * model.dim * kinds * DTYPE.itemsize + 2 * q.nbytes
        options = {"scale": model.dim**-0.5, "value_dim": model.latent}
        name = f"{sequences} x {length}, {rows} rows"
        given = (q, k, None if model.latent else v, step)
        work = 2.0 * pairs * model.heads * (model.dim + value)
        yield Case(name, attention, given, options, read, work, definition=pairs < 1 << 22)


def row_cases(model: Model, counts: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    heads, kv_heads, dim = model.heads, model.kv_heads, model.dim
    for rows in counts:
        x, y = random(2, rows, model.hidden, device=device)
        weight, wide = random(model.hidden, device=device), random(rows, 2 * model.ffn, device=device)
        yield Case(f"{rows} x {model.hidden}", add_rms_norm, (x, y, weight, 1e-5), {}, 4 * x.nbytes)
        yield Case(f"{rows} x {model.ffn}", gated, (wide, "silu"), {}, 1.5 * wide.nbytes)
        step = ragged(rows, 160, 1, device)
        k, v = (random(step.table.numel(), kv_heads, BLOCK, dim, device=device).transpose(1, 2) for _ in range(2))
        parts = random(rows, heads + 2 * kv_heads, dim, device=device)
        qkv = parts.split_with_sizes([heads, kv_heads, kv_heads], 1)
        angles = random(rows, 1, dim, device=device), random(rows, 1, dim, device=device)
        options = {"interleaved": False}
        yield Case(f"{rows} rows", turn_and_write, (*qkv, angles, k, v, step), options, 2 * parts.nbytes)
        logits, ones = torch.randn(rows, model.vocab, device=device), torch.ones(rows, device=device)
        yield Case(f"{rows} x {model.vocab}", greedy, (logits,), {}, logits.nbytes)
        uniforms = torch.rand(rows, dtype=torch.float64, device=device)
        yield Case(
            f"{rows} x {model.vocab}, top-p", draw, (logits, uniforms, ones), {"top_p": ones * 0.9}, logits.nbytes
        )
        down, up = random(8, 16, model.hidden, device=device), random(8, model.hidden, 16, device=device)
        which = torch.arange(rows, device=device) % 8
        yield Case(f"{rows} rows, 8 adapters of 16", shrink, (x, down, which), {}, x.nbytes + down.nbytes)
        h, scales = torch.randn(rows, 16, device=device), torch.ones(8, device=device)
        yield Case(f"{rows} rows, 8 adapters of 16", expand, (h, up, which, scales, y), {}, 2 * y.nbytes + up.nbytes)


def expert_cases(model: Model, counts: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    if not model.experts:
        return
    up = random(model.experts, 2 * model.ffn, model.hidden, device=device)
    down = random(model.experts, model.hidden, model.ffn, device=device)
    for rows in counts:
        logits = torch.randn(rows, model.experts, device=device)
        choice = logits, Routing(model.taken)
        yield Case(f"{rows} x {model.experts}", route, choice, {}, logits.nbytes)
        index, weight = route.reference(*choice)
        used = len(index.unique())
        x = random(rows, model.hidden, device=device)
        moved = (up[0].nbytes + down[0].nbytes) * used + 2 * x.nbytes
        work = 2.0 * rows * model.taken * (up[0].numel() + down[0].numel())
        name = f"{rows} rows, {model.taken} of {model.experts}"
        yield Case(name, stacked_experts, (x, index, weight, up, down), {"activation": "silu"}, moved, work)


def product_cases(model: Model, counts: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """torch's, and those of --deterministic."""
    for outputs, inputs in ((2 * model.ffn, model.hidden), (model.hidden, model.ffn)):
        weight = random(outputs, inputs, device=device)
        ways: dict[str, Callable[..., Any]] = {"torch": F.linear}
        if isinstance(order := packed(weight, invariant=True), Tiled):
            ways["triton"] = lambda x, _, order=order: linear(x, order)
        for rows in counts:
            x = random(rows, inputs, device=device)
            moved = weight.nbytes + x.nbytes + rows * outputs * weight.itemsize
            work = 2.0 * rows * weight.numel()
            yield Case(f"{rows} x {inputs} -> {outputs}", "linear", (x, weight), {}, moved, work, ways=ways)


class Clock:
    """Seconds of a call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, run: Callable[[], object], repeat: int) -> float:
        run()  # compiles
        return statistics.median(self(run) for _ in range(repeat))


def ceilings(clock: Clock, device: torch.device) -> tuple[float, float]:
    """Bytes and operations per second."""
    size = 1 << 30 if clock.cuda else 1 << 24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if clock.cuda else 512
    a, b = random(n, n, device=device), random(n, n, device=device)
    copied = clock.median(lambda: target.copy_(source), 10)
    return 2 * size / copied, 2.0 * n**3 / clock.median(lambda: F.linear(a, b), 10)


def measure(
    case: Case, clock: Clock, limits: tuple[float, float], device: torch.device, repeat: int
) -> Iterator[Found]:
    """What is taken on this device, and plain torch."""
    bandwidth, rate = limits
    floor = max(case.bytes_ / bandwidth, case.operations / rate)
    runs = dict(case.ways)
    if not isinstance(case.op, str):
        runs = {case.op.choices(device.type)[0]: case.op.implementation(device.type)}
        if case.definition:
            runs["plain"] = case.op.reference
    name = case.op if isinstance(case.op, str) else case.op.reference.__name__
    for backend, function in runs.items():
        t = clock.median(lambda f=function: f(*case.args, **case.options), repeat if backend != "plain" else 3)
        yield Found(name, case.name, backend, t, case.bytes_ / t / 1e9, case.operations / t / 1e12, floor / t)


def wrong(case: Case, device: torch.device) -> str:
    """How far attention is from its definition, where that is too far; empty: it isn't, or nobody waits for the definition."""
    if case.op is not attention or not case.definition:
        return ""
    got, want = (
        f(*case.args, **case.options).float() for f in (attention.implementation(device.type), attention.reference)
    )
    off = float((got - want).abs().max() / want.abs().max())  # of long contexts all values are small
    return "" if off <= FAR else f"{case.name}: off by {off:.3f} of the largest value"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--repeat", type=int, default=20, help="calls, of which the median counts")
    parser.add_argument("--seconds", type=float, default=150, help="no further case is begun after so long")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device, begin, found = torch.device(args.device), time.monotonic(), []
    faults = []
    clock = Clock(device)
    limits = ceilings(clock, device)
    print(f"ceilings: {limits[0] / 1e9:.1f} GB/s copied, {limits[1] / 1e12:.2f} TFLOP/s")
    print(f"{'op':16} {'shape':40} {'backend':9} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'of floor':>8}")
    with torch.inference_mode():
        for name in args.model:
            model, tiny = MODELS[name], name == "tiny"
            counts = (1, 5) if tiny else (1, 64, 4096)
            families = (
                attention_cases(model, TINY if tiny else MIXES, device),
                row_cases(model, counts, device),
                product_cases(model, counts, device),
                expert_cases(model, counts, device),
            )
            for case in (case for family in families for case in family):
                if time.monotonic() - begin > args.seconds:
                    print(f"stopped after {args.seconds:g} s (--seconds)")
                    break
                if fault := wrong(case, device):
                    faults.append(f"{name} {fault}")
                for line in measure(case, clock, limits, device, args.repeat):
                    found.append(asdict(line) | {"model": name})
                    if args.json:  # whoever stops this keeps what was measured
                        args.json.write_text(json.dumps({"ceilings": limits, "kernels": found}, indent=1))
                    shape = f"{name} {line.shape}"
                    print(
                        f"{line.op:16} {shape:40} {line.backend:9} {line.seconds * 1e6:10.1f} {line.gb_s:8.1f}"
                        f" {line.tflop_s:8.2f} {line.share:8.2f}",
                        flush=True,
                    )
    if faults:
        raise SystemExit("\n".join(("attention is not as its definition says:", *faults)))


if __name__ == "__main__":
    main()
