"""Ranks in parallel: what a step costs on each layout, what is exchanged, and what `kvasir plan --gpu cpu` says beforehand; before
that, how soon a step's message reaches the other ranks of a node, and its size (`messages.py`).

    python benchmarks/parallel.py 125M 1B                       random weights in these shapes
    python benchmarks/parallel.py /models/Llama --layouts 2x2

Every layout runs with one thread per rank, so that two ranks on two cores compare with one rank on one core: `x work` is the
time over that of one rank alone on one core, per unit of work. Cores share the memory's bandwidth, so `machine` is what is
lost before ranks have exchanged anything: the time of one rank alone while as many processes as the layout has ranks do the
same, each for itself, over its time while they don't. `own` is the first over the second: what the layout itself costs.
`busy` is the CPU time of each rank's busiest thread over the time, without what other work on the machine made it wait for a
core; ranks of a stage wait for each other awake. `kB/token` is what rank 0 puts into exchanges, `theory` the same by ring sums,
as `kvasir plan` has it. `plan` is predicted from speeds that are measured right after the layout ran.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from checkpoint import COMMON, SHAPES
from messages import report

from kvasir.engine.arch import load_spec
from kvasir.engine.config import EngineConfig
from kvasir.engine.cpu_device import cpu_device
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Place
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.parallel_plan import Plan, bytes_sent, plan
from kvasir.engine.request import SamplingParams

KV_BYTES = 1 << 28
"""Copies of a model side by side shall not ask for all of the memory each."""


@dataclass(frozen=True)
class Row:
    """One layout, one load."""

    tp: int
    pp: int
    load: str
    seconds: float
    """Per step of a decode, or of the whole prompt."""
    busy: list[float]
    """CPU time of each rank's busiest thread over the time in which it had a core or wanted none."""
    calls: float
    """Exchanges of rank 0 per step."""
    sent: float
    """Bytes that rank 0 put into them per token."""
    theory: float
    """The same by theory."""
    planned: float
    """Seconds that the plan predicts."""
    crowded: dict[int, float] = field(default_factory=dict)
    """Of one rank: `seconds` while so many do the same, each for itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help=f"folder, GGUF file, or one of {', '.join(SHAPES)}")
    parser.add_argument("--layouts", default="1x1,2x1,1x2", help="TPxPP, separated by commas (default: 1x1,2x1,1x2)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="streams that decode")
    parser.add_argument("--tokens", type=int, default=24, help="decode steps per run")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt that is computed alone")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    print("a step's message to the other ranks of a node:")
    report([1, 3], 2000)
    rows = []
    heads = (
        ("ms", 9),
        ("x work", 8),
        ("machine", 9),
        ("own", 6),
        ("busy", 12),
        ("calls", 7),
        ("kB/token", 10),
        ("theory", 8),
        ("plan ms", 9),
        ("of it", 7),
    )
    print(f"{'model':<10}{'ranks':<7}{'load':<13}" + "".join(f"{name:>{width}}" for name, width in heads))
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            options = shaped(model, Path(folder))
            layouts = [tuple(map(int, layout.split("x"))) for layout in args.layouts.split(",")]
            sizes = sorted({tp * pp for tp, pp in layouts} - {1})
            found = [row for tp, pp in layouts for row in measure(options, tp, pp, sizes, args)]
        show(Path(model).name, found)
        rows += found
    if args.json:
        with open(args.json, "w") as file:
            json.dump([vars(row) for row in rows], file, indent=1)


def show(model: str, found: list[Row]) -> None:
    """A line for each, beside one rank's."""
    alone = {row.load: row for row in found if row.tp * row.pp == 1}
    nan = float("nan")
    for row in found:
        size, one = row.tp * row.pp, alone.get(row.load)
        work = row.seconds * size / one.seconds if one else nan
        machine = 1.0 if size == 1 else one.crowded.get(size, nan) / one.seconds if one else nan
        busy = " ".join(f"{share:.0%}" for share in row.busy)
        print(
            f"{model:<10}{row.tp}x{row.pp:<5}{row.load:<13}{row.seconds * 1e3:>9.1f}{work:>8.2f}{machine:>9.2f}"
            f"{work / machine:>6.2f}{busy:>12}{row.calls:>7.0f}{row.sent / 1e3:>10.1f}{row.theory / 1e3:>8.1f}"
            f"{row.planned * 1e3:>9.1f}{row.planned / row.seconds:>7.2f}",
            flush=True,
        )


def shaped(model: str, folder: Path) -> dict[str, Any]:
    """The engine's options for a model, or for random weights in a shape, whose configuration goes into `folder`."""
    if model not in SHAPES:
        return {"model": model}
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[model]))
    return {"model": str(folder), "load_format": "dummy"}


def measure(model: dict[str, Any], tp: int, pp: int, sizes: list[int], args: argparse.Namespace) -> list[Row]:
    """Every load on one layout: the medians of several runs, and what is predicted for each. Of one rank also beside others,
    so that there are as many as in `sizes`."""
    options = {
        **model, "num_threads": 1, "max_model_len": 1024, "enable_prefix_caching": False, "dtype": "bfloat16",
        "kv_cache_memory_bytes": KV_BYTES,
    }  # fmt: skip
    loads = {f"decode {count}": (count, 1, args.tokens) for count in args.sequences}
    loads[f"prefill {args.prompt}"] = 1, args.prompt, 1
    llm = LLM(tensor_parallel_size=tp, pipeline_parallel_size=pp, skip_tokenizer_init=True, **options)
    found: list[Row] = []
    try:
        executor: Any = llm.engine._executor
        hub = getattr(executor, "_hub", None)
        pids = [os.getpid(), *(hub._peers[rank].pid for rank in range(1, tp * pp))]
        share = executor.loaded.decoder.share
        traffic = share.mesh.traffic

        def timed(count: int, length: int, new: int) -> tuple[float, list[float], float, float]:
            traffic.calls, traffic.bytes = 0, 0.0
            used, start = [threads(pid) for pid in pids], time.perf_counter()
            generate(llm, count, length, new)
            took = time.perf_counter() - start
            busy = [busiest(before, threads(pid), took) for pid, before in zip(pids, used, strict=True)]
            return took, busy, traffic.calls, traffic.bytes

        def median(load: tuple[int, int, int]) -> tuple[float, list[float], float, float]:
            return sorted(timed(*load) for _ in range(args.repeat))[args.repeat // 2]

        timed(1, 16, 2)
        for name, load in loads.items():
            seconds, busy, calls, sent = median(load)
            count, length, new = load
            rows = count * (length + new - 1)  # a stream's last token is no row
            theory = bytes_sent(share, 2)
            found.append(Row(tp, pp, name, seconds / new, busy, calls / new, sent / rows, theory, float("nan")))
        for size in sizes if tp * pp == 1 else ():
            with others(options, size - 1) as begin:
                for row, load in zip(found, loads.values(), strict=True):
                    begin(load)
                    row.crowded[size] = median(load)[0] / load[2]
    finally:
        llm.shutdown()
    said = planned(options, tp, pp, args)
    return [replace(row, planned=seconds) for row, seconds in zip(found, said, strict=True)]


def generate(llm: LLM, count: int, length: int, new: int) -> None:
    """So many streams behind prompts of so many tokens, which nobody has seen."""
    prompts = [[random.randrange(3, 3000) for _ in range(length)] for _ in range(count)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False)


@contextmanager
def others(options: dict[str, Any], count: int) -> Iterator[Callable[[tuple[int, int, int]], None]]:
    """So many processes with a model each; `begin(load)` has all of them do that, again and again."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(count)]
    running = [spawn.Process(target=on_and_on, args=(options, pipe), daemon=True) for _, pipe in pipes]
    for process, (_, end) in zip(running, pipes, strict=True):
        process.start()
        end.close()  # so that a process that died is an EOFError
    try:
        for pipe, _ in pipes:
            pipe.recv()

        def begin(load: tuple[int, int, int]) -> None:
            for pipe, _ in pipes:
                pipe.send(load)
            for pipe, _ in pipes:
                pipe.recv()

        yield begin
    finally:
        for pipe, _ in pipes:
            with suppress(OSError):  # it died
                pipe.send(None)
        for process in running:
            process.join()


def on_and_on(options: dict[str, Any], pipe: Connection) -> None:
    """One of `others`. It isn't killed: a lock of its libraries' would be left behind, of which Python warns."""
    with LLM(skip_tokenizer_init=True, **options) as llm:
        generate(llm, 1, 16, 2)
        pipe.send("ready")
        while (load := pipe.recv()) is not None:
            pipe.send("begun")
            while not pipe.poll():
                generate(llm, *load)


def planned(options: dict[str, Any], tp: int, pp: int, args: argparse.Namespace) -> list[float]:
    """Seconds of each load on that layout."""
    config = EngineConfig(**options)
    spec = load_spec(ModelFiles(config).config)
    device = cpu_device(tp * pp, spec, max(args.sequences), torch.bfloat16, 1)

    def said(streams: int, length: int) -> Plan:
        return plan(config, spec, torch.bfloat16, device, Place(tp, pp), 1, streams=streams, length=length)

    steps = [said(streams, args.tokens).step_s for streams in args.sequences]
    return [*steps, said(1, args.prompt).prompt_s]


def threads(pid: int) -> dict[str, tuple[int, int]]:
    """Of each thread, nanoseconds on a core and nanoseconds in which it waited for one."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            ran, waited, _ = (task / "schedstat").read_text().split()
            found[task.name] = int(ran), int(waited)
    return found


def busiest(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], took: float) -> float:
    spent = [
        (ran - before.get(task, (0, 0))[0], waited - before.get(task, (0, 0))[1])
        for task, (ran, waited) in after.items()
    ]
    ran, waited = max(spent)
    return ran / (took * 1e9 - waited)


if __name__ == "__main__":
    main()
