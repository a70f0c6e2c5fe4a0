"""A step that is planned while the one before it is executed: the engine with and without, on real models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvasir.engine.llm import LLM
from kvasir.engine.request import SamplingParams, StructuredOutput
from kvasir.engine.step import Result, Step

MIX = (
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(temperature=0.8, seed=1, max_tokens=30, n=3, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12, n=2, use_beam_search=True),
    SamplingParams(temperature=1.0, seed=2, top_p=0.9, repetition_penalty=1.2, max_tokens=25, min_tokens=5),
    SamplingParams(temperature=1.0, seed=3, mirostat=2, max_tokens=20, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=4, max_tokens=40, structured_outputs=StructuredOutput(regex="[a-z ]{3,20}")),
    SamplingParams(temperature=0, max_tokens=30, bad_words=["the", " was"], repeat_last_n=8, frequency_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=40, stop=["."]),
)


def said(llm: LLM, prompts: Sequence[str]) -> list[Any]:
    """Everything that the outputs hold."""
    outputs = llm.generate(list(prompts), list(MIX), use_tqdm=False)
    return [
        (one.prompt_logprobs, [(c.token_ids, c.text, c.logprobs, c.finish_reason) for c in one.outputs])
        for one in outputs
    ]


@pytest.mark.parametrize("which", ["skald", "model-stories260k/hf"])
def test_outputs_are_the_same(which: str, data: Callable[[str], Path]) -> None:
    model = which if which == "skald" else str(data(which))
    prompts = ["Once upon a time there was a little girl. " * 3 + word for word in ("She", "Tom", "a", "The") * 2]
    found, counts = [], []
    for ahead in (True, False):
        options = {"dtype": "float32", "block_size": 8, "num_threads": 1, "enable_prefix_caching": False}
        llm = LLM(model, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 21, **options)
        executor = llm.engine._executor
        executor.ahead = executor._lane._apart = executor.rank.lags = ahead  # type: ignore[attr-defined]  # as on a GPU, as on a CPU
        executor.rank.sampler.constraints._apart = ahead  # type: ignore[attr-defined]
        found.append(said(llm, prompts))
        ended = time.monotonic()
        while llm.engine.stats_at <= ended:  # what is told is a little old
            time.sleep(0.01)
        stats = llm.engine.stats()
        counts.append(
            (stats.prompt_tokens, stats.ended)
        )  # stop strings are found outside: what was made by then varies
        assert llm.engine.pool.check() == []
        llm.shutdown()
    assert found[0] == found[1]
    assert counts[0] == counts[1]


def test_chunks_of_one_prompt_are_in_both_stages_at_once(data: Callable[[str], Path]) -> None:
    llm = LLM(
        str(data("model-stories260k/hf")), pipeline_parallel_size=2, max_num_batched_tokens=16, dtype="float32",
        num_threads=1,
    )  # fmt: skip
    happened: list[str] = []
    executor = llm.engine._executor
    launch, collect = executor.launch, executor.collect

    def launched(step: Step) -> None:
        happened.append(f"{step.slices[0].start}" if step.slices else "-")
        launch(step)

    def collected() -> Result:
        happened.append("result")
        return collect()

    executor.launch, executor.collect = launched, collected  # type: ignore[method-assign]
    try:
        sampling = SamplingParams(temperature=0, max_tokens=1)
        llm.generate([{"prompt_token_ids": [5] * 64}], sampling, use_tqdm=False)
    finally:
        llm.shutdown()
    assert happened[:7] == ["0", "16", "32", "result", "48", "result", "result"]
