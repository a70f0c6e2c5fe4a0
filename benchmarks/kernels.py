"""Every op of kernels/ on realistic shapes, by all backends that are here, beside the ceilings of the same run.

    .venv/bin/python benchmarks/kernels.py --threads 2
    .venv/bin/python benchmarks/kernels.py --model 8B 70B/TP8 Mixtral/TP2 DeepSeek/TP8    what doesn't fit is left out, and said so
    .venv/bin/python benchmarks/kernels.py --only attention --cpu-time    one thread, its own time: for busy machines
    python benchmarks/kernels.py --device cuda --json kernels.json
    python benchmarks/kernels.py --device cuda --table backends.json      what is to become kernels/backends.json

Ceilings, measured anew for each kind of op and model: of a CPU bytes per second of a float32 sum in huge pages, of a GPU those
of a copy; operations per second of a large bfloat16 product. An op's share is of the larger of its two floors: bytes it must
move over bandwidth, operations it must do over that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings, gpu_ceilings, timed, timed_on_gpu
from kernel_cases import DTYPE, FAMILIES, MODELS, Case, Place, Run, cases
from refusals import refuse
from torch import Tensor

from kvasir.engine.memory import keep_freed_memory
from kvasir.kernels.measured import means, save
from kvasir.kernels.native import native

USUAL = {"cpu": ["125M", "1B", "64 experts"], "cuda": ["8B", "70B/TP8", "Mixtral/TP2", "DeepSeek/TP8"]}
PLAIN, PATIENCE_S = 3, 3.0
"""Turns of plain torch, and seconds of anything else, for which somebody waits: CPUs without instructions for bfloat16 take
torch's own products minutes."""
FAR = 0.03
"""A difference, by the largest value, that no rounding to bfloat16 makes."""


@dataclass(frozen=True)
class Found:
    """Medians: seconds of one implementation, and its share of the larger floor."""

    model: str
    op: str
    kind: str
    shape: str
    backend: str
    seconds: float
    gb_s: float
    tflop_s: float
    share: float


@dataclass(frozen=True)
class Machine:
    """How long a call takes here, and bytes and operations per second."""

    time: Callable[[Run], float]
    ceilings: Callable[[], tuple[float, float]]


def cpu(clock: Callable[[], float]) -> Machine:
    return Machine(lambda run: timed(run, clock), lambda: ceilings(clock))


def measure(model: str, case: Case, machine: Machine, limits: tuple[float, float], repeat: int) -> Iterator[Found]:
    """The implementations take turns, so that what disturbs one disturbs all; the first turn compiles, and isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    for turn in range(repeat + 1):
        for name, run in case.ways.items():
            if turn < PLAIN if name == "plain" else sum(times[name]) < PATIENCE_S:
                times[name].append(machine.time(run))
    bandwidth, rate = limits
    floor = max(case.bytes_ / bandwidth, case.operations / rate)
    for name, all_ in times.items():
        t = statistics.median(all_[1:] or all_)
        rates = case.bytes_ / t / 1e9, case.operations / t / 1e12
        yield Found(model, case.op, case.kind, case.shape, name, t, *rates, floor / t)


def wrong(model: str, case: Case) -> Iterator[str]:
    """How far attention and experts are from their definitions, where that is too far and somebody waits for the definition."""
    if case.op not in ("attention", "stacked_experts") or "plain" not in case.ways:
        return
    want: Tensor = case.ways["plain"]().float()  # type: ignore[attr-defined]
    for name, way in case.ways.items():
        got: Tensor = way().float()  # type: ignore[attr-defined]
        off = float((got - want).abs().max() / want.abs().max())  # of long contexts all values are small
        if not off <= FAR:  # NaN is wrong, too
            yield f"{case.op}, {model} {case.shape}: {name} is off by {off:.3f} of the largest value"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=USUAL, default="cpu")
    models = "; ".join(f"on {device}: {', '.join(names)}" for device, names in USUAL.items())
    parser.add_argument("--model", choices=MODELS, nargs="+", help=f"shapes ({models})")
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=9, help="turns, of which the median counts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no further case is begun after so long")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time instead of the clock's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--table", type=Path, help="also write here by which backends ops run fastest on this GPU")
    args = parser.parse_args()
    if args.device == "cuda":
        refuse(parser, args, "with --device cuda", "threads", "cpu_time")
    else:
        refuse(parser, args, "without --device cuda", "table")
    if args.cpu_time:
        refuse(parser, args, "with --cpu-time", "threads")
    torch.manual_seed(0)
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    keep_freed_memory()
    gpu = args.device == "cuda"
    machine = (
        Machine(timed_on_gpu, gpu_ceilings) if gpu else cpu(time.thread_time if args.cpu_time else time.perf_counter)
    )
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} thread(s); {native().text}"
    print(f"torch {torch.__version__}, {DTYPE}, {where}")
    print(f"{'op':16} {'shape':44} {'backend':10} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'of floor':>8}")
    with torch.inference_mode():
        found, faults = run(args, machine, Place(torch.device(args.device)))
    if faults:
        raise SystemExit("\n".join(("not as the definition says:", *faults)))
    if args.table:
        figures = [
            (line["op"], line["kind"], line["backend"], f"{line['model']} {line['shape']}", line["seconds"] * 1e6)
            for line in found
            if line["kind"]
        ]
        save(args.table, us=means(figures))


def run(args: argparse.Namespace, machine: Machine, place: Place) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines as they are found; they all, and what is wrong."""
    begin, found, faults = time.monotonic(), [], []
    for family in args.only:
        for model in args.model or USUAL[args.device]:
            limits = machine.ceilings()
            print(f"{family}, {model}; ceilings: {limits[0] / 1e9:.1f} GB/s, {limits[1] / 1e12:.3f} TFLOP/s")
            for case in cases(family, model, place):
                if time.monotonic() - begin > args.seconds:
                    print(f"stopped after {args.seconds:g} s (--seconds)")
                    return found, faults
                faults += wrong(model, case)
                for line in measure(model, case, machine, limits, args.repeat):
                    found.append(asdict(line) | {"ceilings": limits})
                    print(
                        f"{line.op:16} {f'{model} {line.shape}':44} {line.backend:10} {line.seconds * 1e6:10.1f}"
                        f" {line.gb_s:8.1f} {line.tflop_s:8.3f} {line.share:8.2f}",
                        flush=True,
                    )
                if args.json:  # whoever stops this keeps what was measured
                    args.json.write_text(json.dumps(found, indent=1))
    return found, faults


if __name__ == "__main__":
    main()
