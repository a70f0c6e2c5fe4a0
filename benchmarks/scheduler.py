"""What the scheduler costs: microseconds of plan + commit for each step, and of add, without a model.

Every sequence decodes one token a step. A step's cost must grow with the number of sequences and not with their context.
Example: python benchmarks/scheduler.py --sequences 1 32 --contexts 1000 100000
"""

from __future__ import annotations

import argparse
import statistics
import time

from kvasir.engine.blocks import BlockPool
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Scheduler
from kvasir.engine.step import Result, Step

BLOCK = 16


def turn(scheduler: Scheduler) -> tuple[Step, float]:
    """One step with a model that answers at once; seconds of plan + commit."""
    begin = time.perf_counter()
    step = scheduler.plan(0.0)
    planned = time.perf_counter() - begin
    assert step is not None
    result = Result(step.id, [1] * sum(part.sample for part in step.slices))
    begin = time.perf_counter()
    scheduler.commit(step, result, 0.0)
    return step, planned + time.perf_counter() - begin


def measure(sequences: int, context: int, steps: int) -> tuple[float, float]:
    """Median microseconds of a decode step, and of add."""
    pool = BlockPool(sequences * (-(-(context + 2 * steps) // BLOCK) + 2), BLOCK)
    scheduler = Scheduler(
        block_pool=pool, max_num_seqs=sequences, max_num_batched_tokens=1 << 30, max_model_len=context + 2 * steps
    )
    sampling, adds = SamplingParams(max_tokens=steps + 1, ignore_eos=True), []
    for number in range(sequences):
        request = Request(request_id=str(number), prompt_token_ids=[number] * context, sampling=sampling)
        begin = time.perf_counter()
        scheduler.add(request, 0.0)
        adds.append(time.perf_counter() - begin)
    turn(scheduler)  # all prompts
    times = []
    for _ in range(steps):
        step, seconds = turn(scheduler)
        assert len(step.slices) == sequences
        times.append(seconds)
    return statistics.median(times) * 1e6, statistics.median(adds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256], help="decoding at once")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1000, 100_000], help="tokens of each; 256 of 100k take 1 GB"
    )
    parser.add_argument("--steps", type=int, default=100, help="of which the median counts")
    args = parser.parse_args()
    print("sequences | context | plan + commit, us a step | add, us")
    for sequences in args.sequences:
        for context in args.contexts:
            step, add = measure(sequences, context, args.steps)
            print(f"{sequences:9} | {context:7} | {step:24.1f} | {add:7.1f}", flush=True)


if __name__ == "__main__":
    main()
