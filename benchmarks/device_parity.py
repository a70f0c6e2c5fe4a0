"""Greedy tokens of the bundled model on a device must equal those on the CPU, in float32, alone and in a batch.

python benchmarks/device_parity.py --device cuda
"""

from __future__ import annotations

import argparse
import sys

from kvasir.engine import LLM, SamplingParams

PROMPTS = ["What is 47 + 38?", "Who are you?", "What is paged attention?", "Tell me a story.", "How do I start?"] * 8


def tokens(device: str, together: bool) -> list[list[int]]:
    """Greedy tokens of every prompt, all at once or one by one."""
    sampling = SamplingParams(temperature=0, max_tokens=64)
    with LLM("skald", device=device, dtype="float32") as llm:
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        groups = [chats] if together else [[chat] for chat in chats[:5]]
        results = [result for group in groups for result in llm.chat(group, sampling, use_tqdm=False)]
    return [result.outputs[0].token_ids for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    expected = tokens("cpu", together=True)
    wrong = sum(a != b for together in (True, False) for a, b in zip(tokens(device, together), expected, strict=False))
    print(f"{len(PROMPTS) + 5} continuations on {device}, {wrong} differ from the CPU's")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
