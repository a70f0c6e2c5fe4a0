"""The real 260k model, in process: its documented text comes out whatever else happens around it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import until

from kvasir.engine import LLM, AsyncLLM, SamplingParams
from kvasir.engine import rank as rank_module
from kvasir.engine.cache import KVCache
from kvasir.engine.engine import Engine
from kvasir.engine.errors import ClientError, ConfigError, ContextLengthError, UnavailableError
from kvasir.engine.event import Event, Finished
from kvasir.engine.memory import DTYPES
from kvasir.engine.output import RequestOutput

BLOCK_BYTES = 2 * 5 * 16 * 4 * 8 * 4
"""Two, layers, slots, kv heads, head dim, bytes of a float32."""
GREEDY = SamplingParams(temperature=0, max_tokens=256)


@pytest.fixture(scope="module")
def folder(data: Callable[[str], Path]) -> str:
    return str(data("model-stories260k/hf"))


@pytest.fixture(scope="module")
def story(data: Callable[[str], Path]) -> dict[str, Any]:
    """prompt_ids, greedy_ids (the prompt's in front) and text, as the model's author documents them."""
    found: dict[str, Any] = json.loads(data("model-stories260k/greedy_256.json").read_text())
    return found


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with LLM(folder, num_threads=1) as made:
        yield made


def others(story: dict[str, Any], count: int = 31) -> list[list[int]]:
    """Prompts of all lengths that begin differently and alike."""
    rng = random.Random(0)
    ids = story["greedy_ids"]
    cut = [ids[: rng.randint(2, 200)] for _ in range(count // 2)]
    return cut + [[1, *(rng.randint(3, 511) for _ in range(rng.randint(1, 120)))] for _ in range(count - len(cut))]


def wait_until_free(engine: Engine) -> None:
    until(lambda: not engine.pool.num_used)
    assert engine.pool.check() == []


def check_story(output: RequestOutput, story: dict[str, Any]) -> None:
    expected = story["greedy_ids"][len(output.prompt_token_ids) :]
    assert output.outputs[0].token_ids[: len(expected)] == expected


# -- the documented text


def test_greedy_alone(llm: LLM, story: dict[str, Any]) -> None:
    (output,) = llm.generate(story["prompt_ids"], GREEDY, use_tqdm=False)
    check_story(output, story)
    assert output.outputs[0].text.startswith(story["text"][: len(output.outputs[0].text) - 20])
    assert output.finished
    wait_until_free(llm.engine)


def test_greedy_from_a_text_prompt(llm: LLM, story: dict[str, Any]) -> None:
    (output,) = llm.generate("", GREEDY, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == ("", [1])
    check_story(output, story)


def test_greedy_among_32(llm: LLM, story: dict[str, Any]) -> None:
    prompts = [*others(story), story["prompt_ids"]]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == prompts
    check_story(outputs[-1], story)
    for output in outputs[:15]:
        check_story(output, story)


def test_greedy_with_the_prefix_cache_cold_and_hot(folder: str, story: dict[str, Any]) -> None:
    prompt = story["greedy_ids"][:100]
    with LLM(folder, num_threads=1) as llm:
        cold, hot, longer = (
            llm.generate(p, GREEDY, use_tqdm=False)[0] for p in (prompt, prompt, story["greedy_ids"][:150])
        )
    for output in (cold, hot, longer):
        check_story(output, story)
    assert (cold.num_cached_tokens, hot.num_cached_tokens, longer.num_cached_tokens) == (0, 96, 144)


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 16}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}])
def test_greedy_in_chunks(folder: str, story: dict[str, Any], options: dict[str, int]) -> None:
    with LLM(folder, num_threads=1, **options) as llm:
        outputs = llm.generate(
            [story["greedy_ids"][:90], *others(story, 5), story["prompt_ids"]], GREEDY, use_tqdm=False
        )
    check_story(outputs[0], story)
    check_story(outputs[-1], story)


def test_greedy_after_being_preempted(folder: str, story: dict[str, Any], fresh: Callable[..., Any]) -> None:
    blocks = 40  # of which each sequence wants 17
    with LLM(folder, num_threads=1, max_model_len=272, kv_cache_memory_bytes=blocks * BLOCK_BYTES) as llm:
        assert llm.engine.info.num_blocks == blocks
        outputs = llm.generate([story["prompt_ids"]] * 8, GREEDY, use_tqdm=False)
        wait_until_free(llm.engine)
        assert fresh(llm.engine).preemptions > 0
    for output in outputs:
        check_story(output, story)


def test_bfloat16_and_other_block_sizes(folder: str, story: dict[str, Any]) -> None:
    with LLM(folder, num_threads=1, block_size=5, enable_prefix_caching=False) as llm:
        check_story(llm.generate(story["prompt_ids"], GREEDY, use_tqdm=False)[0], story)
    with LLM(folder, num_threads=1, dtype="bfloat16") as llm:
        assert llm.engine.info.dtype == "bfloat16"
        (output,) = llm.generate(story["prompt_ids"], GREEDY, use_tqdm=False)
        assert output.outputs[0].text.startswith("Once upon a time, there was a little girl named")


# -- sampling


SEEDED = {"temperature": 1.0, "max_tokens": 60}


def test_seeded_draws_are_the_same_alone_in_a_batch_and_after_preemption(
    folder: str, story: dict[str, Any], fresh: Callable[..., Any]
) -> None:
    prompts = others(story, 12)
    prompts = [prompt[:100] for prompt in prompts]
    variants: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05, "presence_penalty": 1.0}]
    params = [SamplingParams(seed=i, **SEEDED, **variants[i % 4]) for i in range(12)]
    with LLM(folder, num_threads=1) as llm:
        alone = [
            llm.generate(p, s, use_tqdm=False)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)
        ]
        together = llm.generate(prompts, params, use_tqdm=False)
    with LLM(folder, num_threads=1, max_model_len=170, kv_cache_memory_bytes=24 * BLOCK_BYTES) as llm:
        preempted = llm.generate(prompts, params, use_tqdm=False)
        assert fresh(llm.engine).preemptions > 0
    assert [o.outputs[0].token_ids for o in together] == alone
    assert [o.outputs[0].token_ids for o in preempted] == alone


def test_n_with_a_seed(llm: LLM) -> None:
    sampling = SamplingParams(n=4, seed=7, **SEEDED)
    first, second = (llm.generate("Once upon a time", sampling, use_tqdm=False)[0].outputs for _ in range(2))
    assert [output.index for output in first] == [0, 1, 2, 3]
    assert len({output.text for output in first}) == 4
    assert [output.text for output in first] == [output.text for output in second]
    other = llm.generate("Once upon a time", SamplingParams(n=4, seed=8, **SEEDED), use_tqdm=False)[0].outputs
    assert [output.text for output in other[:3]] == [output.text for output in first[1:]]  # draws with seed + i


def test_unseeded_requests_differ(llm: LLM) -> None:
    outputs = llm.generate(["Once upon a time"] * 3, SamplingParams(**SEEDED), use_tqdm=False)
    assert len({output.outputs[0].text for output in outputs}) == 3


def test_stop_conditions(llm: LLM, story: dict[str, Any]) -> None:
    ids = story["greedy_ids"]

    def run(**options: Any) -> Any:
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": 100, **options})
        return llm.generate(story["prompt_ids"], sampling, use_tqdm=False)[0].outputs[0]

    by_id = run(stop_token_ids=[ids[20]])
    first = ids.index(ids[20], 1)
    assert (by_id.token_ids, by_id.finish_reason, by_id.stop_reason) == (ids[1 : first + 1], "stop", ids[20])
    late = run(stop_token_ids=[ids[20]], min_tokens=first + 5)
    assert len(late.token_ids) >= first + 5
    assert ids[20] not in late.token_ids[: first + 5]  # masked, as in vLLM
    by_text = run(stop=["Lily"])
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", "Lily")
    assert by_text.text == story["text"][: story["text"].index("Lily")]
    kept = run(stop=["Lily"], include_stop_str_in_output=True)
    assert kept.text == by_text.text + "Lily"
    wait_until_free(llm.engine)
    biased = run(logit_bias={77: 100}, max_tokens=3)
    assert biased.token_ids == [77] * 3
    ended = run(logit_bias={2: 100})
    assert (ended.finish_reason, ended.stop_reason, ended.text) == ("stop", None, "")
    ignored = run(logit_bias={2: 100}, ignore_eos=True, max_tokens=4)
    assert (ignored.token_ids, ignored.finish_reason) == ([2] * 4, "length")
    locked = run(logit_bias={2: 100}, min_tokens=5)
    assert locked.token_ids[:5] == ids[1:6]
    assert locked.token_ids[5:] == [2]


# -- log probabilities


@pytest.fixture
def exact(llm: LLM, ragged: Callable[..., Any]) -> Callable[[Sequence[int]], torch.Tensor]:
    """Log probabilities [T, V] after each token, from one forward over all of them in a cache of its own."""

    def compute(tokens: Sequence[int]) -> torch.Tensor:
        decoder = llm.engine._executor.loaded.decoder
        blocks = -(-len(tokens) // 16)
        cache = KVCache(decoder.spec, blocks, 16, DTYPES["float32"], torch.device("cpu"))
        rows = ragged([(range(blocks), 0, len(tokens))], 16)
        logits = decoder(torch.tensor(tokens), rows, cache, torch.arange(len(tokens)))
        return logits.double().log_softmax(-1)

    return compute


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 2}], ids=str)
def test_logprobs(
    folder: str,
    story: dict[str, Any],
    exact: Callable[[Sequence[int]], torch.Tensor],
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_module, "LEAST_LOGITS", 5)
    prompt = story["greedy_ids"][:50]
    asking = SamplingParams(temperature=1, top_k=3, seed=1, max_tokens=30, logprobs=5, prompt_logprobs=2, n=2)
    with LLM(folder, num_threads=1, **options) as llm:
        llm.generate(prompt, GREEDY, use_tqdm=False)  # the cache is hot, but scores need the forward
        output, silent = llm.generate([prompt, prompt], [asking, GREEDY], use_tqdm=False)
    assert silent.outputs[0].logprobs is None
    assert silent.prompt_logprobs is None
    for one in output.outputs:
        scores = exact([*prompt, *one.token_ids])
        assert one.logprobs is not None
        for at, (token, found) in enumerate(zip(one.token_ids, one.logprobs, strict=True), len(prompt) - 1):
            check_scores(scores[at], token, found, 5)
        own = [float(scores[at, token]) for at, token in enumerate(one.token_ids, len(prompt) - 1)]
        assert one.cumulative_logprob == pytest.approx(sum(own), abs=1e-3)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for at, found in enumerate(output.prompt_logprobs[1:]):
        assert found is not None
        check_scores(scores[at], prompt[at + 1], found, 2)


def check_scores(scores: torch.Tensor, token: int, found: dict[int, Any], count: int) -> None:
    order = scores.argsort(descending=True).tolist()
    assert next(iter(found)) == token
    assert set(found) == {token, *order[:count]}
    for id_, one in found.items():
        assert one.logprob == pytest.approx(float(scores[id_]), abs=1e-4)
        assert one.rank == order.index(id_) + 1
        assert isinstance(one.decoded_token, str)


# -- the interface


def test_prompts_in_all_shapes(llm: LLM) -> None:
    short = SamplingParams(temperature=0, max_tokens=3)
    ids = llm.get_tokenizer().encode("One day")  # type: ignore[union-attr]
    shapes: list[Any] = ["One day", ids, {"prompt": "One day"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(shapes, short, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["One day", None, "One day", None]
    assert len({tuple(o.prompt_token_ids) for o in outputs}) == 1
    assert len({o.outputs[0].text for o in outputs}) == 1
    for shape in shapes:
        assert llm.generate(shape, short, use_tqdm=False)[0].outputs[0].text == outputs[0].outputs[0].text
    assert llm.generate([], short, use_tqdm=False) == []
    assert len({o.request_id for o in outputs}) == 4


def test_token_ids_of_numpy_s(llm: LLM) -> None:
    """What comes back, and what goes further, are Python's: what hashes and sends them knows no others."""
    short, ids = SamplingParams(temperature=0, max_tokens=3), [5, 6, 7]
    wanted = llm.generate(ids, short, use_tqdm=False)[0].outputs[0].token_ids
    array = np.array(ids)
    for prompts in (array, [*array], [array, array], {"prompt_token_ids": array.astype(np.uint16)}):
        for output in llm.generate(prompts, short, use_tqdm=False):  # type: ignore[arg-type]
            assert output.outputs[0].token_ids == wanted
            assert output.prompt_token_ids == ids
            assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["fine", [1, 2.0]], "text or a list of token ids"),
        (["fine", [1, 512]], "token 512 at position 1"),
        (["fine", {"prompt": "a", "prompt_token_ids": [1]}], "exactly one"),
        (["fine", {"text": "a"}], "exactly one"),
        (["fine", 3.5], "text or a list of token ids"),
        (["fine", []], "empty"),
        (["fine", [1] * 512], "512"),
    ],
)
def test_bad_prompts_raise_before_anything_runs(
    llm: LLM, prompts: list[Any], words: str, fresh: Callable[..., Any]
) -> None:
    before = fresh(llm.engine).prompt_tokens
    with pytest.raises(ClientError, match=words):
        llm.generate(prompts, SamplingParams(max_tokens=5), use_tqdm=False)
    assert fresh(llm.engine).prompt_tokens == before


def test_one_parameter_set_for_each_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)], use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 5]
    with pytest.raises(ClientError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)


def test_unknown_options_name_the_nearest(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"max_model_length.*did you mean 'max_model_len'"):
        LLM(folder, max_model_length=5)


def test_without_a_tokenizer(folder: str, story: dict[str, Any]) -> None:
    with LLM(folder, skip_tokenizer_init=True, num_threads=1) as llm:
        assert llm.get_tokenizer() is None
        (output,) = llm.generate([story["prompt_ids"]], GREEDY, use_tqdm=False)
        check_story(output, story)
        assert output.outputs[0].text == ""
        with pytest.raises(ClientError, match="skip_tokenizer_init"):
            llm.generate("text", use_tqdm=False)


def test_chat(llm: LLM) -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    short = SamplingParams(temperature=0, max_tokens=8)
    one = [{"role": "user", "content": "Once upon"}, {"role": "user", "content": "a time"}]
    (single,) = llm.chat(one, short, use_tqdm=False, chat_template=template)
    several = llm.chat([one, one[:1]], short, use_tqdm=False, chat_template=template)
    assert single.outputs[0].text == several[0].outputs[0].text
    assert len(several) == 2


def test_a_full_queue_is_no_error_for_a_batch(folder: str) -> None:
    """Branches of earlier requests wait in the queue, too."""
    with LLM(folder, num_threads=1, max_queue=3, max_num_seqs=2) as llm:
        outputs = llm.generate([[1, i] for i in range(3, 40)], SamplingParams(n=3, max_tokens=4), use_tqdm=False)
    assert [o.prompt_token_ids[1] for o in outputs] == list(range(3, 40))
    assert all(len(one.token_ids) == 4 or one.finish_reason == "stop" for o in outputs for one in o.outputs)


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a"] * 3, SamplingParams(max_tokens=2))
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a"] * 3, SamplingParams(max_tokens=2), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_default_sampling_comes_from_the_model(llm: LLM, folder: str) -> None:
    asked = json.loads((Path(folder) / "generation_config.json").read_text())
    default = llm.get_default_sampling_params()
    assert default.temperature == asked.get("temperature", 1.0)
    with LLM(folder, generation_config="none", num_threads=1) as other:
        assert other.get_default_sampling_params() == SamplingParams()


def test_the_engine_ends_with_its_owner(folder: str) -> None:
    llm = LLM(folder, num_threads=1)
    thread = llm.engine._thread
    decoder = weakref.ref(llm.engine._executor.loaded.decoder)
    del llm
    gc.collect()
    assert not thread.is_alive()
    assert decoder() is None


def test_an_interrupted_batch_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "_feed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 64, SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)
    wait_until_free(llm.engine)
    assert len(llm.generate(["a"] * 10, SamplingParams(max_tokens=4), use_tqdm=False)) == 10


# -- asyncio


@pytest.fixture(scope="module")
def async_llm(folder: str) -> Iterator[AsyncLLM]:
    made = AsyncLLM(folder, num_threads=1, max_num_seqs=16, max_num_batched_tokens=64)
    yield made
    made.shutdown()


async def collect(llm: AsyncLLM, prompt: Any, sampling: SamplingParams, name: str) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, sampling, name)]


def test_async_outputs_grow(async_llm: AsyncLLM, story: dict[str, Any]) -> None:
    outputs = asyncio.run(collect(async_llm, story["prompt_ids"], GREEDY, "a"))
    assert len(outputs) > 10
    for before, after in itertools.pairwise(outputs):
        assert after.outputs[0].text.startswith(before.outputs[0].text)
        assert len(after.outputs[0].token_ids) >= len(before.outputs[0].token_ids)
    assert [output.finished for output in outputs[-2:]] == [False, True]
    check_story(outputs[-1], story)


def test_async_errors(async_llm: AsyncLLM) -> None:
    async def run() -> None:
        with pytest.raises(ClientError, match="vocabulary"):
            await collect(async_llm, [1, 512], GREEDY, "a")
        with pytest.raises(ContextLengthError):
            await collect(async_llm, [1] * 600, GREEDY, "a")
        stream = async_llm.generate("a", GREEDY, "twice")
        await stream.__anext__()
        with pytest.raises(ClientError, match="in use"):
            await collect(async_llm, "a", GREEDY, "twice")
        await stream.aclose()  # type: ignore[attr-defined]
        await collect(async_llm, "a", SamplingParams(max_tokens=1), "a")

    asyncio.run(run())
    wait_until_free(async_llm.engine)


def slow(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is asked for lasts longer than the event loop is held up."""
    rank = llm.engine._executor.rank
    launch = rank.launch
    monkeypatch.setattr(rank, "launch", lambda step: (time.sleep(0.02), launch(step))[1])


def test_async_abort_and_stop(async_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(async_llm, monkeypatch)

    async def run() -> tuple[RequestOutput, RequestOutput]:
        last = None
        async for output in async_llm.generate("Once", SamplingParams(max_tokens=400, ignore_eos=True), "a"):
            last = output
            await async_llm.abort("a")
        assert last is not None
        monkeypatch.undo()
        (*_, stopped) = await collect(async_llm, "", SamplingParams(temperature=0, max_tokens=400, stop="Lily"), "b")
        return last, stopped

    aborted, stopped = asyncio.run(run())
    assert aborted.outputs[0].finish_reason == "abort"
    assert stopped.outputs[0].stop_reason == "Lily"
    wait_until_free(async_llm.engine)


def test_async_id_is_used_again_before_the_loop_hears_of_its_end(
    async_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an end left in the event loop isn't the new stream's, and leaving the old one late doesn't end the new one."""
    deliver, ended = async_llm.engine._deliver, threading.Semaphore(0)

    def delivered(events: Sequence[Event]) -> None:
        deliver(events)
        if any(isinstance(event, Finished) for event in events):
            ended.release()

    monkeypatch.setattr(async_llm.engine, "_deliver", delivered)
    endless, brief = SamplingParams(max_tokens=400, ignore_eos=True), SamplingParams(max_tokens=2, ignore_eos=True)

    async def run() -> None:
        stream = async_llm.generate("Once", endless, "a")
        await stream.__anext__()
        await stream.aclose()  # type: ignore[attr-defined]
        assert ended.acquire(timeout=60)  # the loop stands still
        assert [output.outputs[0].finish_reason for output in await collect(async_llm, "b", brief, "a")][-1] == "length"
        assert ended.acquire(timeout=60)
        stream = async_llm.generate("Once", brief, "a")
        await stream.__anext__()
        assert ended.acquire(timeout=60)
        other = async_llm.generate("b", SamplingParams(max_tokens=50, ignore_eos=True), "a")
        await other.__anext__()
        await stream.aclose()  # type: ignore[attr-defined]
        assert [output.outputs[0].finish_reason async for output in other][-1] == "length"

    asyncio.run(run())
    wait_until_free(async_llm.engine)


def test_async_shutdown_ends_streams(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(folder, num_threads=1)
    slow(llm, monkeypatch)

    async def run() -> None:
        stream = llm.generate("Once", SamplingParams(max_tokens=400, ignore_eos=True), "a")
        await stream.__anext__()
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass

    asyncio.run(run())


def test_200_requests_of_which_a_third_is_cancelled(async_llm: AsyncLLM, llm: LLM, story: dict[str, Any]) -> None:
    rng = random.Random(3)
    prompts = others(story, 24)
    lengths = [rng.randint(1, 60) for _ in prompts]
    alone = [
        llm.generate(p, SamplingParams(temperature=0, max_tokens=n), use_tqdm=False)[0].outputs[0].token_ids
        for p, n in zip(prompts, lengths, strict=True)
    ]
    cancelled: dict[str, int] = dict.fromkeys(("queued", "task", "left", "aborted"), 0)

    async def complete(which: int, name: str) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=lengths[which])
        outputs = await collect(async_llm, prompts[which], sampling, name)
        assert outputs[-1].outputs[0].token_ids == alone[which]

    async def cancel(which: int, name: str, how: str) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        if how in ("queued", "task"):
            task = asyncio.ensure_future(collect(async_llm, prompts[which], sampling, name))
            await asyncio.sleep(0 if how == "queued" else rng.random() * 1.0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            cancelled[how] += task.cancelled()
            return
        stream, wanted = async_llm.generate(prompts[which], sampling, name), rng.randint(1, 40)
        async for output in stream:
            cancelled["aborted"] += output.outputs[0].finish_reason == "abort"
            if len(output.outputs[0].token_ids) >= wanted and how == "left":
                cancelled["left"] += 1
                break
            if len(output.outputs[0].token_ids) >= wanted:
                await async_llm.abort(name)
        await stream.aclose()  # type: ignore[attr-defined]

    async def malformed(prompt: list[int], name: str) -> None:
        with pytest.raises(ClientError):
            await collect(async_llm, prompt, GREEDY, name)

    async def run() -> None:
        tasks = [malformed([1, 9999], "bad 1"), malformed([], "bad 2")]
        for number in range(198):
            which = rng.randrange(len(prompts))
            how = rng.choice(list(cancelled))
            tasks.append(cancel(which, str(number), how) if number % 3 == 0 else complete(which, str(number)))
        rng.shuffle(tasks)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert sum(cancelled.values()) > 50  # the others were faster
    assert min(cancelled.values()) > 5
    wait_until_free(async_llm.engine)


def test_two_threads_take_turns(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: llm.generate(["Once"] * 3, sampling, use_tqdm=False), range(4)))
    assert all(len(result.outputs[0].token_ids) == 40 for results in found for result in results)
