"""Tokens that another group delivered: the engine goes on as the one that died would have, whatever was asked."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.request import Request, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    with LLM("skald", dtype="float32", max_num_seqs=8, kv_cache_memory_bytes=1 << 23, max_model_len=512) as llm:
        yield llm


def answers(llm, sampling, *resumed):
    """To the same question asked at once, each where so much is known."""
    tokenizer = llm.get_tokenizer()
    asked = [{"role": "user", "content": "Tell me about Kvasir."}]
    prompt = tokenizer.encode(tokenizer.render_chat(asked, None, add_generation_prompt=True), False)
    requests = [
        Request(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling, resume_token_ids=ids)
        for number, ids in enumerate(resumed)
    ]
    return [output.outputs for output in llm._run([(request, None) for request in requests], False)]


def answer(llm, sampling, resumed=()):
    (found,) = answers(llm, sampling, resumed)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 2**63 - 1, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02, "logprobs": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
        {"temperature": 1.0, "logit_bias": {7: 5.0}, "min_tokens": 30, "stop_token_ids": [7]},
        {"temperature": 1.0, "ignore_eos": True, "max_tokens": 60},
        {"temperature": 1.0, "mirostat": 1, "mirostat_tau": 3.0},
        {"temperature": 1.0, "mirostat": 2, "mirostat_eta": 0.3, "logprobs": 0},
        {"temperature": 1.0, "repeat_last_n": 8, "repetition_penalty": 1.4, "penalize_newline": False},
        {"temperature": 1.0, "typical_p": 0.9, "bad_words": ["the", " Kvasir was"]},
        {"temperature": 1.0, "tfs_z": 0.9, "allowed_token_ids": [*range(100, 900)]},
        {"temperature": 1.0, "structured_outputs": StructuredOutput(json=json.dumps(PERSON)), "max_tokens": 120},
        {"temperature": 1.0, "structured_outputs": StructuredOutput(regex="([a-z]{3} ){12}"), "logprobs": 1},
    ],
)
def test_any_rest_is_the_rest(llm, fields):
    sampling = SamplingParams(**{"seed": 11, "max_tokens": 48, **fields})
    (whole,) = answer(llm, sampling)
    ids, draw = list(whole.token_ids), random.Random(0)
    assert len(ids) > 8
    cuts = sorted({1, len(ids) - 1, *(draw.randrange(1, len(ids)) for _ in range(5))})
    for cut, (rest,) in zip(cuts, answers(llm, sampling, *(ids[:cut] for cut in cuts)), strict=True):
        assert list(rest.token_ids) == ids[cut:], f"cut at {cut} of {len(ids)}"
        assert (rest.finish_reason, rest.stop_reason) == (whole.finish_reason, whole.stop_reason)
        if whole.logprobs is not None:
            expected = [score[token].logprob for score, token in zip(whole.logprobs[cut:], ids[cut:], strict=True)]
            found = [score[token].logprob for score, token in zip(rest.logprobs, ids[cut:], strict=True)]
            assert found == pytest.approx(expected, abs=1e-4)


def test_each_of_several_continuations_draws_with_its_own_seed(llm):
    sampling = SamplingParams(seed=11, max_tokens=32, n=3, temperature=1.0)
    for index, whole in enumerate(answer(llm, sampling)):
        alone = replace(sampling, n=1, seed=11 + index)
        (rest,) = answer(llm, alone, whole.token_ids[:10])
        assert list(rest.token_ids) == list(whole.token_ids[10:])
