"""Kvasir's part of compare.py: FOLDER and cases come on the command line, a line of JSON for each case goes out."""

from __future__ import annotations

import os

from peer import main

from kvasir.engine.llm import LLM
from kvasir.engine.request import SamplingParams


def load(folder: str, threads: int):  # type: ignore[no-untyped-def]
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "dtype": "bfloat16", "num_threads": threads}
    options["device"] = os.environ["KVASIR_PEER_DEVICE"]
    llm = LLM(folder, **options)

    def generate(prompts: list[list[int]], tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return sum(len(r.outputs[0].token_ids) for r in llm.generate(prompts, sampling, use_tqdm=False))

    return generate


if __name__ == "__main__":
    main(load)
