"""What requests ask of the sampler, with a real model: against transformers, and over preemption, resumption and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.engine import LLM, SamplingParams, StructuredOutput
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import Request

BLOCK_BYTES = 2 * 5 * 16 * 4 * 8 * 4
"""Two, layers, slots, kv heads, head dim, bytes of a float32."""
QUIET = {"use_tqdm": False}
PROMPT = "Once upon a time, there was a little girl named Lily."
VARIANTS: list[dict[str, Any]] = [
    {"typical_p": 0.8},
    {"tfs_z": 0.9, "top_p": 0.95},
    {"repetition_penalty": 1.3, "repeat_last_n": 8, "penalize_newline": False},
    {"bad_words": ["Lily", "was", "the park"], "presence_penalty": 0.5},
    {"allowed_token_ids": list(range(300, 512)), "frequency_penalty": 0.4, "repeat_last_n": 30},
    {"mirostat": 2, "mirostat_tau": 3.0},
    {"mirostat": 1, "mirostat_tau": 2.5, "top_k": 100},
    {"mirostat": 2, "mirostat_tau": 2.0, "repetition_penalty": 1.2, "repeat_last_n": 16, "mirostat_eta": 0.3},
]
"""Mirostat comes last, so that its sequences are the first to give up their blocks."""


@pytest.fixture(scope="module")
def folder(data: Callable[[str], Path]) -> str:
    return str(data("model-stories260k/hf"))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with LLM(folder, num_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def seeded(variant: dict[str, Any], seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 60, "ignore_eos": True, **variant, **more})


def tokens_of(llm: LLM, prompts: Any, params: Any) -> list[list[list[int]]]:
    return [[o.token_ids for o in output.outputs] for output in llm.generate(prompts, params, **QUIET)]


def test_the_same_alone_in_a_batch_and_after_preemption(folder: str, llm: LLM, fresh: Callable[..., Any]) -> None:
    params = [seeded(variant, i) for i, variant in enumerate(VARIANTS)]
    prompts = [PROMPT[: 20 + 4 * i] for i in range(len(VARIANTS))]
    alone = [tokens_of(llm, prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert tokens_of(llm, prompts, params) == alone
    assert len({tuple(ids[0]) for ids in alone}) == len(alone)
    for caching in (True, False):
        options: dict[str, Any] = {"enable_prefix_caching": caching, "max_num_batched_tokens": 16}
        with LLM(folder, num_threads=1, max_model_len=112, kv_cache_memory_bytes=16 * BLOCK_BYTES, **options) as small:
            assert tokens_of(small, prompts, params) == alone
            assert fresh(small.engine).preemptions > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: next(iter(variant)))
def test_goes_on_in_another_group(llm: LLM, variant: dict[str, Any]) -> None:
    """What was delivered before is all that the next engine is told."""
    sampling = seeded(variant, 9)
    ((whole,),) = tokens_of(llm, PROMPT, sampling)
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    for cut in (1, 23, 59):
        request = Request(
            request_id=f"cut {cut}",
            prompt_token_ids=tokenizer.encode(PROMPT),
            sampling=sampling,
            resume_token_ids=whole[:cut],
        )
        (output,) = llm._run([(request, None)], False)
        assert output.outputs[0].token_ids == whole[cut:]


def test_branches_draw_each_for_itself(llm: LLM) -> None:
    for variant in VARIANTS[-4:]:
        together = tokens_of(llm, PROMPT, seeded(variant, 40, n=4))[0]
        assert together == [tokens_of(llm, PROMPT, seeded(variant, 40 + i))[0][0] for i in range(4)]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_on_several_ranks(folder: str, llm: LLM, layout: tuple[int, int]) -> None:
    params = [seeded(variant, i, max_tokens=30) for i, variant in enumerate(VARIANTS)]
    wanted = tokens_of(llm, PROMPT, params[0]) and [tokens_of(llm, PROMPT, each)[0] for each in params]
    tp, pp = layout
    options = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "dtype": "float32"}
    with LLM(folder, num_threads=1, max_model_len=64, kv_cache_memory_bytes=20 * BLOCK_BYTES, **options) as group:
        assert tokens_of(group, [PROMPT] * len(params), params) == wanted


def test_bad_words_equal_transformers(llm: LLM, model: Any) -> None:
    """Greedy, token for token, with the sequences that our tokenizer writes the words as."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    words = ["big", "red ball", "She", "mom said"]
    sampling = SamplingParams(temperature=0, max_tokens=80, bad_words=words)
    spellings = llm.engine._grammars.words.barred(sampling)
    (output,) = llm.generate(PROMPT, sampling, **QUIET)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    bad = [list(spelling) for spelling in spellings]
    expected = model.generate(ids, do_sample=False, max_new_tokens=80, bad_words_ids=bad, eos_token_id=2)
    assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
    assert not any(word in output.outputs[0].text for word in words)
    (free,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=80), **QUIET)
    assert any(word in free.outputs[0].text for word in words)


def test_allowed_tokens_alone_are_chosen(llm: LLM) -> None:
    allowed = [261, 403, 407, 500]
    (output,) = llm.generate(PROMPT, seeded({"allowed_token_ids": allowed}, 1), **QUIET)
    assert set(output.outputs[0].token_ids) <= set(allowed)


def test_a_window_as_long_as_everything_is_no_window(llm: LLM) -> None:
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2, "temperature": 0}
    found = [tokens_of(llm, PROMPT, seeded(penalties, 0, repeat_last_n=n)) for n in (-1, 10_000, 0, 4)]
    assert found[0] == found[1]
    assert found[2] == tokens_of(llm, PROMPT, seeded({"temperature": 0}, 0))
    assert found[0] != found[3] != found[2]


def test_newlines_stay_likely(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    penalty = {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": 2.0, "max_tokens": 120}
    texts = [
        llm.generate("\n\n\n" + PROMPT, seeded(penalty, 0, penalize_newline=flag), **QUIET)[0].outputs[0].text
        for flag in (True, False)
    ]
    assert texts[1].count("\n") > texts[0].count("\n")


ASKED = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 14), "seed": st.integers(0, 9)},
    optional={
        "n": st.integers(1, 3),
        "best_of": st.integers(3, 4),
        "use_beam_search": st.booleans(),
        "length_penalty": st.sampled_from([-1.0, 0.0, 2.0]),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "temperature": st.sampled_from([0.0, 0.6, 1.5]),
        "top_k": st.integers(1, 40),
        "top_p": st.sampled_from([0.2, 0.9]),
        "min_p": st.sampled_from([0.0, 0.3]),
        "typical_p": st.sampled_from([0.3, 0.95]),
        "tfs_z": st.sampled_from([0.4, 0.99]),
        "mirostat": st.integers(0, 2),
        "mirostat_tau": st.sampled_from([0.0, 2.0, 8.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.5]),
        "frequency_penalty": st.sampled_from([-1.0, 1.0]),
        "repeat_last_n": st.sampled_from([-1, 0, 3]),
        "penalize_newline": st.booleans(),
        "bad_words": st.lists(st.sampled_from(["Lily", "a", "the park", "\n", "é"]), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 511), min_size=1, max_size=200),
        "logit_bias": st.dictionaries(st.integers(0, 511), st.sampled_from([-100.0, 30.0]), max_size=3),
        "min_tokens": st.integers(0, 1),
        "stop_token_ids": st.lists(st.sampled_from([426, 432, 261]), max_size=2),
        "stop": st.lists(st.sampled_from(["She", "e", " in"]), max_size=2),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.just(0),
        "truncate_prompt_tokens": st.sampled_from([-1, 3, 8]),
        "structured_outputs": st.sampled_from(
            [StructuredOutput(regex="[a-z ]{1,30}"), StructuredOutput(choice=["yes", "a dog"])]
        ),
    },
)


@settings(max_examples=40)
@given(ASKED)
def test_whatever_is_asked_is_done_or_refused(llm: LLM, asked: dict[str, Any]) -> None:
    """Alone as in a crowd; every request ends, and the engine lives on."""
    try:
        sampling = SamplingParams(**asked)
        (alone,) = llm.generate(PROMPT, sampling, **QUIET)
    except ClientError as error:
        refused = "no token to choose" in error.message or error.param == "best_of"
        assert refused
        assert llm.engine.failure is None
        return
    crowd = llm.generate([PROMPT[:20], PROMPT, PROMPT[5:]], [SamplingParams(seed=1), sampling, seeded({}, 2)], **QUIET)
    assert [o.token_ids for o in crowd[1].outputs] == [o.token_ids for o in alone.outputs]
    assert len(alone.outputs) == sampling.n
    for output in alone.outputs:
        assert len(output.token_ids) <= sampling.max_tokens  # type: ignore[operator]
        assert output.finish_reason in ("stop", "length")
        if sampling.allowed_token_ids and not sampling.structured_outputs:
            assert set(output.token_ids) <= {*sampling.allowed_token_ids}
        assert not any(word in output.text for word in sampling.bad_words if word.isalpha() and word != "a")
        assert (output.logprobs is None) == (sampling.logprobs is None or not output.token_ids)
    assert llm.engine.pool.check() == []


def test_no_share_of_probability_leaves_the_likeliest(llm: LLM) -> None:
    (greedy,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12), **QUIET)
    (found,) = llm.generate(PROMPT, SamplingParams(temperature=1.5, top_p=0, max_tokens=12, seed=1), **QUIET)
    assert found.outputs[0].token_ids == greedy.outputs[0].token_ids


def test_what_leaves_no_token_fails_by_name(llm: LLM) -> None:
    with pytest.raises(ClientError, match="allowed_token_ids"):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=[2], min_tokens=3), **QUIET)
    with pytest.raises(ClientError, match="allowed_token_ids"):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=[512]), **QUIET)


def test_texts_need_a_tokenizer(folder: str) -> None:
    with LLM(folder, num_threads=1, skip_tokenizer_init=True) as bare:
        for given in ({"bad_words": ["x"]}, {"penalize_newline": False}):
            with pytest.raises(UnsupportedError, match=next(iter(given))):
                bare.generate([1, 2], SamplingParams(**given), **QUIET)  # type: ignore[arg-type]
        assert bare.generate([1, 2], SamplingParams(allowed_token_ids=[5], max_tokens=2), **QUIET)


def test_prompts_are_cut_when_asked(llm: LLM) -> None:
    ids = list(range(3, 500)) * 2
    with pytest.raises(ClientError, match="512"):
        llm.generate(ids, SamplingParams(max_tokens=4), **QUIET)
    cut = SamplingParams(max_tokens=4, temperature=0, truncate_prompt_tokens=-1, num_keep=5)
    (output,) = llm.generate(ids, cut, **QUIET)
    assert output.prompt_token_ids == ids[:5] + ids[-503:]
    assert output.num_truncated_tokens == 994 - 508
    (plain,) = llm.generate(output.prompt_token_ids, SamplingParams(max_tokens=4, temperature=0), **QUIET)
    assert plain.outputs[0].token_ids == output.outputs[0].token_ids
    assert plain.num_truncated_tokens == 0


def test_what_leaves_no_token_isn_t_taken_for_an_end() -> None:
    """Of a row without any token the first is taken, which is this model's end; nor is it delivered as the last one."""
    choice, json = StructuredOutput(choice=["abc"]), StructuredOutput(json='{"enum": ["abc"]}')
    with LLM("skald", num_threads=1) as llm:
        assert 0 in llm.engine.info.eos_token_ids
        for asked in (
            {"structured_outputs": choice, "bad_words": ["abc"]},
            {"structured_outputs": json, "bad_words": ["abc"]},
            {"structured_outputs": choice, "allowed_token_ids": [5, 6]},
            {"structured_outputs": choice, "allowed_token_ids": [5, 6], "max_tokens": 1},
        ):
            for temperature in (0.0, 1.0):
                sampling = SamplingParams(**{"max_tokens": 20, "temperature": temperature} | asked)
                with pytest.raises(ClientError, match="leave no token to choose"):
                    llm.generate("Hi", sampling, **QUIET)
        (output,) = llm.generate("Hi", SamplingParams(structured_outputs=choice), **QUIET)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abc", "stop")
