"""What users of vLLM's `LLM` know: beam search, encode, refusals; outputs of AsyncLLM in three kinds."""

from __future__ import annotations

import asyncio

import pytest

from kvasir.engine import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from kvasir.engine.entry_points import REFUSED
from kvasir.engine.errors import ClientError, UnsupportedError


@pytest.fixture(scope="module")
def llm():
    with LLM("skald", max_num_seqs=8) as made:
        yield made


def test_beam_search(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    (found,) = llm.beam_search({"prompt": "Once upon a"}, params)
    search = SamplingParams(use_beam_search=True, n=3, best_of=3, max_tokens=8, logprobs=0)
    (plain,) = llm.generate("Once upon a", search, use_tqdm=False)
    assert len(found.sequences) == 3
    for beam, output in zip(found.sequences, plain.outputs, strict=True):
        assert beam.tokens == [*plain.prompt_token_ids, *output.token_ids]
        assert beam.text == "Once upon a" + output.text
        assert beam.cum_logprob == pytest.approx(output.cumulative_logprob)
        assert len(beam.logprobs) == len(output.token_ids)
    scores = [beam.cum_logprob / len(beam.logprobs) for beam in found.sequences]
    assert scores == sorted(scores, reverse=True)
    many = llm.beam_search(["Once upon a", plain.prompt_token_ids], params, concurrency_limit=1)
    assert [[beam.tokens for beam in one.sequences] for one in many] == [[b.tokens for b in found.sequences]] * 2
    assert many[1].sequences[0].text.endswith(plain.outputs[0].text)
    for limit in (None, 1, 2):  # one list of ids is one prompt
        (alone,) = llm.beam_search(plain.prompt_token_ids, params, concurrency_limit=limit)
        assert [beam.tokens for beam in alone.sequences] == [beam.tokens for beam in found.sequences]
    assert llm.beam_search([], params) == llm.beam_search([], params, concurrency_limit=1) == []


def test_what_a_beam_search_cant_do(llm):
    with pytest.raises(UnsupportedError, match="temperature"):
        llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2, temperature=0.5))
    with pytest.raises(ClientError, match="concurrency_limit"):
        llm.beam_search(["a"], BeamSearchParams(beam_width=2, max_tokens=2), concurrency_limit=0)
    with pytest.raises(ClientError, match="concurrency_limit"):
        llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2), concurrency_limit=0)
    with pytest.raises(ClientError, match="n must"):
        llm.beam_search("a", BeamSearchParams(beam_width=0, max_tokens=2))


def test_encode(llm):
    (vector,), (same,) = (run(["a b"], use_tqdm=False) for run in (llm.encode, llm.embed))
    assert vector.outputs.embedding == pytest.approx(same.outputs.embedding, abs=1e-5)
    with pytest.raises(UnsupportedError, match="token_embed"):
        llm.encode("a", pooling_task="token_embed")


@pytest.mark.parametrize("name", REFUSED)
def test_what_isnt_there_is_refused_by_name(llm, name):
    with pytest.raises(UnsupportedError, match=f"LLM.{name} isn't supported"):
        getattr(llm, name)()


def test_unknown_attributes_are_no_methods(llm):
    assert not hasattr(llm, "no_such_thing")


def test_from_optional():
    assert SamplingParams.from_optional(n=None, temperature=0.5, stop=None) == SamplingParams(temperature=0.5)


def joined(outputs, index):
    own = [one for output in outputs for one in output.outputs if one.index == index]
    return "".join(one.text for one in own), [token for one in own for token in one.token_ids], own[-1].finish_reason


def test_kinds_of_output():
    """Deltas add up to what comes cumulatively, step by step, and to what comes at the end."""
    sampling = SamplingParams(n=2, seed=1, max_tokens=12, logprobs=1, prompt_logprobs=1)

    async def run():
        llm = AsyncLLM("skald", max_num_seqs=8)
        try:
            found = {}
            for kind in ("cumulative", "delta", "final_only"):
                stream = llm.generate("Once upon", sampling, f"r-{kind}", output_kind=kind)
                found[kind] = [output async for output in stream]
            with pytest.raises(ClientError, match="output_kind"):
                await anext(llm.generate("a", sampling, "bad", output_kind="all"))
            return found
        finally:
            llm.shutdown()

    found = asyncio.run(run())
    (final,) = found["final_only"]
    last = found["cumulative"][-1]
    assert final.finished
    assert last.finished
    assert len(found["delta"]) > 1
    for index, output in enumerate(final.outputs):
        text, tokens, reason = joined(found["delta"], index)
        assert (text, tokens, reason) == (output.text, output.token_ids, output.finish_reason)
        cumulative = last.outputs[index]
        assert (cumulative.text, cumulative.token_ids, cumulative.logprobs) == (text, tokens, output.logprobs)
        assert cumulative.cumulative_logprob == pytest.approx(output.cumulative_logprob)
    lengths = [sum(len(one.token_ids) for one in output.outputs) for output in found["cumulative"]]
    assert lengths == sorted(lengths)
    assert [output.prompt_logprobs is not None for output in found["delta"]].count(True) == 1
    assert last.prompt_logprobs == final.prompt_logprobs is not None


def test_prompts_are_scored_from_a_token_on(llm):
    """What is cached before it is not computed again, and the scores are those of the whole prompt's."""
    prompt = llm.get_tokenizer().encode("The sea was calm and the ship went on and on to the north. " * 4)
    whole = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
    start = len(prompt) - 5
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprob_start=start)
    part = llm.generate([prompt], sampling, use_tqdm=False)[0]
    assert len(part.prompt_logprobs) == len(whole.prompt_logprobs) == len(prompt)
    assert 0 < part.num_cached_tokens < start
    assert whole.num_cached_tokens == 0
    for found, expected in zip(part.prompt_logprobs[start:], whole.prompt_logprobs[start:], strict=True):
        assert {t: s.logprob for t, s in found.items()} == pytest.approx(
            {t: s.logprob for t, s in expected.items()}, abs=2e-2
        )
