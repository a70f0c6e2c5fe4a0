"""What the programs of all peers have in common. Standard library only: they run in environments of their own."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], int]
"""(prompts, tokens) -> how many tokens were generated: greedy, all of them, nothing cached."""
PAIRS, CASE_S = 5, 20.0
"""So many times each case is measured, unless it took so long before."""


def main(load: Callable[[str, int], Generate]) -> None:
    """FOLDER, THREADS and [[batch, prompt, outputs], ...] -> {"case", "prefill", "decode"} each, tokens per second.

    Prefill is the prompts' tokens over the time of asking for one token; decode what 1 + outputs take longer. Medians: with
    many prompts prefill takes most of both times (3.6 of 4.6 s with 32 sequences of a 125M model), so a tenth more or less in
    one of them would move one difference by a third.
    """
    folder, threads, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    begin = time.perf_counter()
    generate = load(folder, threads)
    say({"ready": time.perf_counter() - begin})
    generate(prompts_of(1, 16), 2)
    for batch, prompt, outputs in cases:
        prompts = prompts_of(batch, prompt)
        first, longer, case_begin = [], [], time.perf_counter()
        while not first or (len(first) < PAIRS and time.perf_counter() - case_begin < CASE_S):
            first.append(timed(generate, prompts, 1))
            longer.append(timed(generate, prompts, 1 + outputs) - first[-1] if outputs else 0.0)
        seconds = statistics.median(longer)  # on a busy machine it may not be longer
        decode = batch * outputs / seconds if seconds > 0 else None
        say({"case": [batch, prompt, outputs], "prefill": batch * prompt / statistics.median(first), "decode": decode})


def timed(generate: Generate, prompts: list[list[int]], tokens: int) -> float:
    begin = time.perf_counter()
    made = generate(prompts, tokens)
    seconds = time.perf_counter() - begin
    assert made == len(prompts) * tokens, f"{made} tokens instead of {len(prompts) * tokens}"
    return seconds


def prompts_of(batch: int, length: int) -> list[list[int]]:
    rng = random.Random(batch * 1000 + length)
    return [[rng.randrange(10, 31990) for _ in range(length)] for _ in range(batch)]


def say(found: dict[str, object]) -> None:
    print("PEER " + json.dumps(found), flush=True)
