"""What the programs of all peers have in common. Standard library only: they run in environments of their own."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], int]
"""(prompts, tokens) -> how many tokens were generated: greedy, all of them, nothing cached."""


def main(load: Callable[[str, int], Generate]) -> None:
    """FOLDER, THREADS and [[batch, prompt, outputs], ...] -> {"case", "prefill", "decode"} each, tokens per second.

    Prefill is the prompts' tokens over the time of asking for one token; decode what 1 + outputs take longer.
    """
    folder, threads, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    begin = time.perf_counter()
    generate = load(folder, threads)
    say({"ready": time.perf_counter() - begin})
    generate(prompts_of(1, 16), 2)
    for batch, prompt, outputs in cases:
        prompts, times = prompts_of(batch, prompt), []
        for tokens in (1, 1 + outputs):
            begin = time.perf_counter()
            made = generate(prompts, tokens)
            times.append(time.perf_counter() - begin)
            assert made == batch * tokens, f"{made} tokens instead of {batch * tokens}"
        longer = times[1] - times[0]
        decode = batch * outputs / longer if outputs and longer > 0 else None  # on a busy machine it may not be longer
        say({"case": [batch, prompt, outputs], "prefill": batch * prompt / times[0], "decode": decode})


def prompts_of(batch: int, length: int) -> list[list[int]]:
    rng = random.Random(batch * 1000 + length)
    return [[rng.randrange(10, 31990) for _ in range(length)] for _ in range(batch)]


def say(found: dict[str, object]) -> None:
    print("PEER " + json.dumps(found), flush=True)
