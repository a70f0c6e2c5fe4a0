"""Ranks in parallel: what a step costs on each layout, and what is exchanged.

python benchmarks/checkpoint.py 1B /tmp/llama-1b
python benchmarks/parallel.py /tmp/llama-1b

`plan` is what `kvasir plan` predicts for a decode, of a device with the speeds that this machine shows in the same run: each of
so many ranks at once reads and multiplies as fast as that, and exchanges as --latency-us and --link say (`sums.py`).

Every layout runs with one thread per rank, so that two ranks on two cores compare with one rank on one core: `work` is
what a rank of it computes in a step of the undivided model on one core, divided by the ranks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from steps import ceilings

from kvasir.engine.arch import load_spec
from kvasir.engine.config import EngineConfig
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Place
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.outcome import Outcome
from kvasir.engine.parallel_plan import Device, plan
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import Step

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class Row:
    """One layout, one load."""

    tp: int
    pp: int
    load: str
    seconds: float
    """Per step of a decode, or of the whole prompt."""
    busy: float
    """Share of the time in which rank 0 computed (its stage, its exchanges within it included)."""
    calls: float
    """Exchanges of rank 0 per step."""
    sent: float
    """Bytes that rank 0 put into them per step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--layouts", default="1x1,2x1,1x2", help="TPxPP, separated by commas (default: 1x1,2x1,1x2)")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps per run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--latency-us", type=float, default=60.0, help="of a small sum")
    parser.add_argument("--link", type=float, default=2e9, help="bytes per second of a large one")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows = []
    for layout in args.layouts.split(","):
        tp, pp = map(int, layout.split("x"))
        rows += measure(args.model, tp, pp, args.sequences, args.tokens, args.repeat)
    alone = {row.load: row.seconds for row in rows if row.tp * row.pp == 1}
    print(f"{'ranks':<8}{'load':<16}{'ms':>9}{'x work':>9}{'busy':>7}{'calls':>8}{'MB sent':>10}{'plan ms':>9}")
    for row in rows:
        work = alone.get(row.load, float("nan")) / (row.tp * row.pp)
        predicted = planned(args, row) if row.load.startswith("decode") else float("nan")
        print(
            f"{row.tp}x{row.pp:<6}{row.load:<16}{row.seconds * 1e3:>9.1f}{row.seconds / work:>9.2f}{row.busy:>7.0%}"
            f"{row.calls:>8.0f}{row.sent / 1e6:>10.3f}{predicted * 1e3:>9.1f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump([vars(row) for row in rows], file, indent=1)


def measure(model: str, tp: int, pp: int, sequences: int, tokens: int, repeat: int) -> list[Row]:
    """Decode of `sequences`, and one prompt of 256 tokens."""
    options: dict[str, Any] = {"num_threads": 1, "max_model_len": 1024, "enable_prefix_caching": False}
    llm = LLM(model, tensor_parallel_size=tp, pipeline_parallel_size=pp, skip_tokenizer_init=True, **options)
    try:
        watch = Watch(llm)
        rng = random.Random(0)

        def prompts(count: int, length: int) -> list[list[int]]:
            return [[rng.randrange(3, 3000) for _ in range(length)] for _ in range(count)]

        def timed(count: int, length: int, new: int) -> tuple[float, float, float, float]:
            watch.reset()
            start = time.perf_counter()
            sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            llm.generate(prompts(count, length), sampling, use_tqdm=False)
            return time.perf_counter() - start, watch.busy, watch.traffic.calls, watch.traffic.bytes

        timed(1, 16, 2)
        rows = []
        for load, (count, length, new) in (
            (f"decode {sequences}", (sequences, 4, tokens)),
            ("prefill 256", (1, 256, 1)),
        ):
            runs = sorted(timed(count, length, new) for _ in range(repeat))
            seconds, busy, calls, sent = runs[len(runs) // 2]
            rows.append(Row(tp, pp, load, seconds / new, busy / seconds, calls / new, sent / new))
        return rows
    finally:
        llm.shutdown()


def planned(args: argparse.Namespace, row: Row) -> float:
    """Seconds of a step of that layout."""
    with multiprocessing.get_context("spawn").Pool(row.tp * row.pp) as pool:
        speeds = pool.map(speeds_of, range(row.tp * row.pp), 1)
    reads, rates = zip(*speeds, strict=True)
    device = Device(1 << 50, min(reads), min(rates), args.link, args.latency_us * 1e-6)
    config = EngineConfig(model=args.model)
    spec = load_spec(ModelFiles(config).config)
    place = Place(row.tp, row.pp)
    return plan(config, spec, torch.bfloat16, device, place, 1, streams=args.sequences, length=args.tokens).step_s


def speeds_of(_: int) -> tuple[float, float]:
    """(bytes, operations) per second of one thread while others do the same."""
    torch.set_num_threads(1)
    found = [ceilings(time.perf_counter) for _ in range(4)]
    return statistics.median(f[0] for f in found[1:]), statistics.median(f[1] for f in found[1:])


class Watch:
    """How long rank 0 computes, and what it exchanges."""

    def __init__(self, llm: LLM) -> None:
        executor = llm.engine._executor
        self.busy = 0.0
        self.traffic = executor.loaded.decoder.mesh.traffic
        launch = executor.rank.launch  # type: ignore[attr-defined]

        def watched(step: Step) -> Outcome:
            start = time.perf_counter()
            outcome: Outcome = launch(step)
            self.busy += time.perf_counter() - start
            return outcome

        executor.rank.launch = watched  # type: ignore[attr-defined]

    def reset(self) -> None:
        self.busy = 0.0
        self.traffic.calls = self.traffic.bytes = 0


if __name__ == "__main__":
    main()
