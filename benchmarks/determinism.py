"""Whether --deterministic keeps its word on a device: tokens and log probabilities of every prompt, bit for bit, alone and among
others, in other chunks, from the prefix cache and after preemption. What it costs is said by `kvasir bench engine`, with and
without it.

    python benchmarks/determinism.py                        the bundled model on cuda, in bfloat16
    python benchmarks/determinism.py --model DIR --dtype float16 --device cpu
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from kvasir.engine import LLM, SamplingParams

SAMPLING = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5, deterministic=True)
Seen = list[list[tuple[int, float]]]


def seen(llm: LLM, prompts: list[list[int]]) -> list[Seen]:
    """Of every prompt: for each token the likeliest with their log probabilities, in full precision."""
    outputs = llm.generate([list(prompt) for prompt in prompts], SAMPLING, use_tqdm=False)
    return [
        [[(token, entry.logprob) for token, entry in row.items()] for row in output.outputs[0].logprobs or ()]
        for output in outputs
    ]


def differences(options: dict[str, Any], count: int, longest: int) -> tuple[int, int]:
    """(prompts that were asked again in some mixture, those whose answer then differed in a bit)"""
    rng = random.Random(0)
    start = [rng.randrange(3, 500) for _ in range(longest // 2)]
    prompts = [
        start[: rng.randint(0, len(start))] + [rng.randrange(3, 500) for _ in range(rng.randint(1, longest // 2))]
        for _ in range(count)
    ]
    options = options | {"block_size": 16}
    with LLM(**options, enable_prefix_caching=False) as llm:
        wanted = [seen(llm, [prompt])[0] for prompt in prompts]
        block = llm.engine.info.block_bytes
    asked = wrong = 0
    room = max(count * longest // 64, longest // 16 + 6) * block  # for a few of them: others are preempted
    limits: tuple[dict[str, int], ...] = ({}, {"max_num_batched_tokens": 97}, {"kv_cache_memory_bytes": room})
    for small in limits:
        with LLM(**options, **small) as llm:
            for _ in range(2):  # the second time from the prefix cache, as far as it reaches
                order = rng.sample(range(count), count)
                found = seen(llm, [prompts[i] for i in order])
                asked += count
                wrong += sum(ours != wanted[i] for ours, i in zip(found, order, strict=True))
    return asked, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="skald")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=400, help="tokens of a prompt, at most")
    args = parser.parse_args()
    options = {"model": args.model, "device": args.device, "dtype": args.dtype, "max_model_len": args.longest + 64}
    asked, wrong = differences(options | {"deterministic": True}, args.prompts, args.longest)
    print(f"{asked} answers on {args.device} in {args.dtype}, of which {wrong} have other bits than when asked alone")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
