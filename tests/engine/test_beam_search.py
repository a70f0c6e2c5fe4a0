"""Beam search and best_of with a real model: transformers' own beams, token for token, in crowds and under pressure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.errors import ClientError
from kvasir.engine.output import RequestOutput
from kvasir.engine.request import Request, StructuredOutput

BLOCK_BYTES = 2 * 5 * 16 * 4 * 8 * 4
"""Two, layers, slots, kv heads, head dim, bytes of a float32."""
QUIET = {"use_tqdm": False}
PROMPTS = [
    "Once upon a time, there was a",
    "One day, Tom and his mom went to the park.",
    "The big dog",
    "Lily likes cake. She",
]
END = 426
"""A full stop: the model has no end of its own that it would reach, so beams end with their first sentence."""


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


def beams(width: int, **more: Any) -> SamplingParams:
    given = {
        "use_beam_search": True,
        "n": width,
        "max_tokens": 24,
        "stop_token_ids": [END],
        "ignore_eos": True,
        "temperature": 0,
    }
    return SamplingParams(**{**given, **more})


def ids_of(output: RequestOutput) -> list[list[int]]:
    return [each.token_ids for each in output.outputs]


def wanted_of(model: Any, llm: LLM, prompt: str, width: int, **options: Any) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(prompt)])
    given = {
        "num_beams": width,
        "num_return_sequences": width,
        "max_new_tokens": 24,
        "eos_token_id": END,
        "do_sample": False,
    }
    found = model.generate(ids, pad_token_id=0, **{**given, **options})[:, ids.shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in found]


@pytest.mark.parametrize(
    ("width", "penalty", "patience"),
    [
        (2, 1.0, False), (3, 0.0, False), (5, 1.0, True), (16, 1.0, False), (3, 2.0, "never"), (4, 0.0, "never"),
        (4, -0.5, False), (3, -0.5, "never"), (4, 2.0, True), (7, 0.7, "never"),
    ],
)  # fmt: skip
def test_equals_transformers(llm: LLM, model: Any, width: int, penalty: float, patience: bool | str) -> None:
    options: dict[str, Any] = {"length_penalty": penalty, "early_stopping": patience}
    for prompt in PROMPTS[:2]:
        (output,) = llm.generate(prompt, beams(width, **options), **QUIET)
        assert ids_of(output) == wanted_of(model, llm, prompt, width, **options)


def test_fewer_are_delivered_than_kept(llm: LLM, model: Any) -> None:
    (output,) = llm.generate(PROMPTS[0], beams(2, best_of=6), **QUIET)
    assert ids_of(output) == wanted_of(model, llm, PROMPTS[0], 6)[:2]
    assert [each.index for each in output.outputs] == [0, 1]
    assert {each.finish_reason for each in output.outputs} <= {"stop", "length"}


def test_lengths_end_beams_too(llm: LLM, model: Any) -> None:
    (output,) = llm.generate(PROMPTS[0], beams(4, max_tokens=5), **QUIET)
    assert ids_of(output) == wanted_of(model, llm, PROMPTS[0], 4, max_new_tokens=5)
    assert {each.finish_reason for each in output.outputs} == {"length"}
    (one,) = llm.generate(PROMPTS[0], beams(1, max_tokens=9), **QUIET)
    (greedy,) = llm.generate(PROMPTS[0], beams(1, max_tokens=9, use_beam_search=False), **QUIET)
    assert ids_of(one) == ids_of(greedy)


def test_bad_words_and_penalties_move_beams(llm: LLM, model: Any) -> None:
    words = SamplingParams(bad_words=["little girl", "named"])
    bad = [list(spelling) for spelling in llm.engine._grammars.words.barred(words)]
    (output,) = llm.generate(PROMPTS[0], beams(4, bad_words=words.bad_words), **QUIET)
    assert ids_of(output) == wanted_of(model, llm, PROMPTS[0], 4, bad_words_ids=bad)


MIXED = (beams(4), beams(3, length_penalty=0.0), SamplingParams(temperature=0, max_tokens=40), beams(6, best_of=7))


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Any]:
    """What each of PROMPTS says to MIXED where nothing else is asked."""
    return [ids_of(*llm.generate(p, s, **QUIET)) for p, s in zip(PROMPTS, MIXED, strict=True)]


@pytest.mark.parametrize(("blocks", "caching"), [(9, True), (9, False), (14, True), (40, False)])
def test_under_pressure(folder: str, alone: list[Any], blocks: int, caching: bool) -> None:
    """Fewer blocks and seats than beams: they wait for each other, and other requests stream between them."""
    options: dict[str, Any] = {"enable_prefix_caching": caching, "max_num_batched_tokens": 12, "max_num_seqs": 3}
    with LLM(folder, num_threads=1, max_model_len=64, kv_cache_memory_bytes=blocks * BLOCK_BYTES, **options) as small:
        for _ in range(2):
            found = small.generate(PROMPTS, MIXED, **QUIET)
            assert [ids_of(output) for output in found] == alone
            assert all(output.num_cached_tokens <= len(output.prompt_token_ids) for output in found)
        limit = time.monotonic() + 60
        while small.engine.pool.num_used and time.monotonic() < limit:
            time.sleep(0.02)
        assert small.engine.pool.check() == []
        assert small.engine.pool.num_used == 0


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_on_several_ranks(folder: str, llm: LLM, layout: tuple[int, int]) -> None:
    params = [beams(4), beams(3, length_penalty=0.0, logprobs=1), SamplingParams(seed=3, max_tokens=20, n=2), beams(2)]
    wanted = [ids_of(*llm.generate(p, s, **QUIET)) for p, s in zip(PROMPTS, params, strict=True)]
    tp, pp = layout
    with LLM(folder, num_threads=1, tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype="float32") as group:
        assert [ids_of(output) for output in group.generate(PROMPTS, params, **QUIET)] == wanted


def test_scores_are_reported(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], beams(3, logprobs=2, prompt_logprobs=0, length_penalty=0.0), **QUIET)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    totals = [each.cumulative_logprob for each in output.outputs]
    assert None not in totals
    assert totals == sorted(totals, reverse=True)  # type: ignore[type-var]
    for each in output.outputs:
        assert each.logprobs is not None
        assert [token in found for token, found in zip(each.token_ids, each.logprobs, strict=True)] == [True] * len(
            each.token_ids
        )
        again = [*output.prompt_token_ids, *each.token_ids]
        (scored,) = llm.generate(again, SamplingParams(max_tokens=1, prompt_logprobs=0), **QUIET)
        assert scored.prompt_logprobs is not None
        tail = scored.prompt_logprobs[len(output.prompt_token_ids) :]
        total = sum(found[token].logprob for token, found in zip(each.token_ids, tail, strict=True) if found)
        assert total == pytest.approx(each.cumulative_logprob, abs=1e-3)


def test_beams_follow_grammars(llm: LLM) -> None:
    choice = StructuredOutput(choice=["happy", "sad", "a dog"])
    (output,) = llm.generate(PROMPTS[0], beams(3, stop_token_ids=[], structured_outputs=choice), **QUIET)
    assert {each.text for each in output.outputs} <= {"a dog", "happy", "sad"}
    assert len({tuple(each.token_ids) for each in output.outputs}) == 3
    only = beams(16, stop_token_ids=[], structured_outputs=StructuredOutput(choice=["dog"]))
    (few,) = llm.generate(PROMPTS[0], only, **QUIET)
    assert {each.finish_reason for each in (*output.outputs, *few.outputs)} == {"stop"}
    assert (few.outputs[0].text, few.outputs[-1].text) == ("dog", "")  # there aren't sixteen ways to spell it


def test_stop_strings_cut_what_is_delivered(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], beams(2, stop=[" girl"], include_stop_str_in_output=True), **QUIET)
    assert any(each.text.endswith(" girl") and each.stop_reason == " girl" for each in output.outputs)


def test_min_tokens_hold_beams_back(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[2], beams(3, min_tokens=15), **QUIET)
    assert min(len(each.token_ids) for each in output.outputs) > 15


def test_a_search_is_cancelled_as_a_whole(llm: LLM) -> None:
    params = beams(4, max_tokens=300, stop_token_ids=[])
    request = Request(request_id="gone", prompt_token_ids=[1, 403], sampling=params)
    llm.engine.submit(request)
    events = [*llm._events.get(timeout=60)] if llm.engine.abort("gone") else []
    while len(events) < 4:
        events += llm._events.get(timeout=60)
    assert [(event.index, getattr(event, "reason", None)) for event in events] == [(i, "abort") for i in range(4)]
    limit = time.monotonic() + 60
    while llm.engine.pool.num_used and time.monotonic() < limit:
        time.sleep(0.02)
    assert llm.engine.pool.num_used == 0


def test_searches_begin_at_their_prompt(llm: LLM) -> None:
    request = Request(request_id="r", prompt_token_ids=[1], sampling=beams(2), resume_token_ids=[5])
    with pytest.raises(ClientError, match="no beam search"):
        llm.engine.check(request)


def test_best_of_draws_and_delivers_the_likeliest(llm: LLM) -> None:
    given: dict[str, Any] = {"seed": 5, "max_tokens": 30, "stop_token_ids": [END], "temperature": 1.0}
    (every,) = llm.generate(PROMPTS[0], SamplingParams(n=8, logprobs=0, **given), **QUIET)
    (best,) = llm.generate(PROMPTS[0], SamplingParams(n=3, best_of=8, **given), **QUIET)
    ranked = sorted(every.outputs, key=lambda o: (o.cumulative_logprob or 0) / len(o.token_ids), reverse=True)
    assert ids_of(best) == [o.token_ids for o in ranked[:3]]
    assert [o.index for o in best.outputs] == [0, 1, 2]
    assert [o.text for o in best.outputs] == [o.text for o in ranked[:3]]
    assert {o.logprobs for o in best.outputs} == {None}  # type: ignore[comparison-overlap]
    (stopped,) = llm.generate(
        PROMPTS[0], SamplingParams(best_of=4, stop=["a"], logprobs=1, seed=1, max_tokens=200), **QUIET
    )
    assert stopped.outputs[0].logprobs is not None
    assert "a" not in stopped.outputs[0].text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("best_of", 129),
        ("length_penalty", float("nan")),
        ("early_stopping", "maybe"),
        ("early_stopping", 1.5),
    ],
)
def test_ranges(field: str, value: Any) -> None:
    with pytest.raises(ClientError, match=field) as refused:
        SamplingParams(n=2, **{field: value})
    assert refused.value.param == field
