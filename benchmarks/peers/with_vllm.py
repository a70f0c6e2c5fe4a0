"""vLLM's part of compare.py, run by the Python that has it; eager unless KVASIR_PEER_COMPILED is set."""

from __future__ import annotations

import os

from peer import main


def load(folder: str, threads: int):  # type: ignore[no-untyped-def]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        dtype="bfloat16",
        enforce_eager=not os.environ.get("KVASIR_PEER_COMPILED"),
        max_model_len=1024,
    )

    def generate(prompts: list[list[int]], tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return sum(len(r.outputs[0].token_ids) for r in llm.generate(given, sampling, use_tqdm=False))

    return generate


if __name__ == "__main__":
    main(load)
