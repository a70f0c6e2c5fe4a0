"""Steps of the bare decoder over batch and context: median and 99th percentile, as a share of the two ceilings.

    .venv/bin/python benchmarks/steps.py --model 125M 1B --threads 2
    .venv/bin/python benchmarks/steps.py --cpu-time       one thread, its own time: for busy machines
    KVASIR_KERNELS=torch .venv/bin/python benchmarks/steps.py      the same without compiled kernels

Ceilings, measured before and after each line: bytes per second of a float32 sum in huge pages, operations per second of a
large bfloat16 product. A step must read every weight and the keys and values of all contexts once, and do two operations for
every weight and row; "of bytes" is the share of the first floor, "of floor" of the larger one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from ceilings import Clock, ceilings, timed
from decoder import CPU, SHAPES, Paged, spec_of
from refusals import refuse

from kvasir.engine.decoder import Decoder
from kvasir.engine.memory import keep_freed_memory
from kvasir.engine.weights import random_decoder

DTYPE = torch.bfloat16
MIXES = ("1x1@128", "8x1@128", "32x1@128", "1x512@0", "8x1@8000")


class Steps:
    """Repeats one step: `sequences` sequences of `rows` rows each behind `context` tokens."""

    def __init__(self, decoder: Decoder, sequences: int, rows: int, context: int) -> None:
        self.decoder, self.sequences, self.rows, self.context = decoder, sequences, rows, context
        self.paged = Paged(decoder, sequences, context + rows + 1, 1 << 30)
        self.tokens = torch.randint(0, decoder.spec.vocab, (sequences * rows,))

    @torch.inference_mode()
    def __call__(self) -> None:
        ragged = self.paged.ragged([(s, self.context, self.rows) for s in range(self.sequences)])
        self.decoder(self.tokens, ragged, self.paged.cache, ragged.starts[1:].long() - 1)

    def floors(self) -> tuple[int, float]:
        """(bytes to read, operations to do)."""
        s = self.decoder.spec
        heads = s.head_dim * (2 * s.heads + 2 * s.kv_heads)
        layers = len(s.layers) * s.hidden * (heads + 3 * s.ffn)
        head = s.hidden * s.vocab
        length = self.context + self.rows
        kept = 2 * len(s.layers) * s.kv_heads * s.head_dim * self.sequences * length
        scores = len(s.layers) * s.heads * s.head_dim * self.sequences * self.rows * (self.context + self.rows / 2)
        work = 2.0 * self.sequences * (self.rows * layers + head) + 4.0 * scores
        return DTYPE.itemsize * (layers + head + kept), work


def measure(model: str, steps: Steps, name: str, args: argparse.Namespace, clock: Clock) -> None:
    before = ceilings(clock)
    steps()
    steps()
    budget, times = args.seconds, []
    while len(times) < 3 or (sum(times) < budget and len(times) < 200):
        times.append(timed(steps, clock))
    bandwidth, rate = (statistics.mean(pair) for pair in zip(before, ceilings(clock), strict=True))
    read, work = steps.floors()
    median, late = statistics.median(times), sorted(times)[int(0.99 * (len(times) - 1))]
    of_bytes, of_work = read / bandwidth / median, work / rate / median
    print(
        f"{model:>5} {name:>9} | {median * 1e3:9.2f} {late * 1e3:9.2f} {steps.sequences * steps.rows / median:9.1f}"
        f" | {bandwidth / 1e9:5.1f} {rate / 1e12:6.3f} | {of_bytes:8.2f} {max(of_bytes, of_work):8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["125M", "1B"])
    parser.add_argument("--mix", nargs="+", default=MIXES, help="SEQUENCESxROWS@CONTEXT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time instead of the clock's")
    args = parser.parse_args()
    if args.cpu_time:
        refuse(parser, args, "with --cpu-time", "threads")
    torch.manual_seed(0)
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    keep_freed_memory()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {DTYPE}")
    print(f"model       mix | {'ms, p50':>9} {'p99':>9} {'tok/s':>9} |  GB/s TFLOPs | of bytes of floor")
    for model in args.model:
        decoder = random_decoder(spec_of(model), DTYPE, CPU)
        for mix in args.mix:
            sequences, _, rest = mix.partition("x")
            rows, _, context = rest.partition("@")
            measure(model, Steps(decoder, int(sequences), int(rows), int(context)), mix, args, clock)


if __name__ == "__main__":
    main()
