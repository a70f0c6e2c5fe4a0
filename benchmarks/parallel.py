"""Ranks in parallel: what a step costs on each layout, what is exchanged, and how fast a step's message arrives.

python benchmarks/checkpoint.py 1B /tmp/llama-1b
python benchmarks/parallel.py /tmp/llama-1b

Every layout runs with one thread per rank, so that two ranks on two cores compare with one rank on one core: `work` is
what a rank of it computes in a step of the undivided model on one core, divided by the ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from kvasir.engine.codec import encode_step
from kvasir.engine.control import Hub, Spoke
from kvasir.engine.llm import LLM
from kvasir.engine.outcome import Outcome
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import Result, Slice, Step

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
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    rows = []
    for layout in args.layouts.split(","):
        tp, pp = map(int, layout.split("x"))
        rows += measure(args.model, tp, pp, args.sequences, args.tokens, args.repeat)
    alone = {row.load: row.seconds for row in rows if row.tp * row.pp == 1}
    print(f"{'ranks':<8}{'load':<16}{'ms':>9}{'x work':>9}{'busy':>7}{'calls':>8}{'MB sent':>10}")
    for row in rows:
        work = alone.get(row.load, float("nan")) / (row.tp * row.pp)
        print(
            f"{row.tp}x{row.pp:<6}{row.load:<16}{row.seconds * 1e3:>9.1f}{row.seconds / work:>9.2f}{row.busy:>7.0%}"
            f"{row.calls:>8.0f}{row.sent / 1e6:>10.3f}"
        )
    message = arrival()
    print(f"a step's message for 256 decoding sequences: {message['bytes'] / 256:.1f} bytes each,"
          f" {message['us']:.0f} us to another process and back / 2 (median)")  # fmt: skip
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": [vars(row) for row in rows], "message": message}, file, indent=1)


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


def arrival() -> dict[str, float]:
    """A step of 256 decoding sequences to a process that answers at once."""
    import os
    import threading

    hub = Hub("127.0.0.1", 2)
    child = os.fork()
    if child == 0:
        spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: os._exit(0))
        while True:
            _, frame = spoke.receive()
            spoke.send("result", frame[:64])
    try:
        hub.meet(10)
        slices = [Slice(seat, 1000, 1, True) for seat in range(256)]
        frame = encode_step(Step(1, slices=slices), [Result(0, list(range(256)))])
        seconds = []
        for _ in range(2000):
            start = time.perf_counter()
            hub.step(frame)
            hub.result()
            seconds.append(time.perf_counter() - start)
        return {"bytes": len(frame), "us": statistics.median(seconds) / 2 * 1e6, "threads": threading.active_count()}
    finally:
        hub.close()
        os.kill(child, 9)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
