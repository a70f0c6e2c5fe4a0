"""Groups of ranks in processes of their own give the answers of one rank."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cancelling import cancelled

from kvasir.engine import load as loading
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError, UnsupportedError
from kvasir.engine.executor import GroupExecutor, executor_of, places
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh
from kvasir.engine.request import SamplingParams, StructuredOutput

LAYOUTS = [(2, 1), (1, 2), (2, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
def group(request: pytest.FixtureRequest, stories: dict[str, Any]) -> Iterator[LLM]:
    tp, pp = request.param
    options = stories | {"kv_cache_memory_bytes": 1 << 20, "max_num_batched_tokens": 48}
    llm = LLM(**options, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def alone(stories: dict[str, Any]) -> LLM:
    return LLM(**stories, max_num_batched_tokens=48)


def test_no_exchange_begins_before_all_are_there(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, compilers and weights may take one rank minutes longer than another: while they load, ranks meet on the control
    channel before they meet in an exchange, which has a limit."""
    order: list[str] = []

    def noted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (order.append(name), call(*args, **kwargs))[1]

    for name in ("ModelFiles", "library", "_weights"):
        monkeypatch.setattr(loading, name, noted(name, getattr(loading, name)))
    mesh = Mesh()
    monkeypatch.setattr(mesh, "least", noted("exchange", mesh.least))
    mesh.assemble = noted("meet", mesh.assemble)
    loaded = loading.load(EngineConfig(**stories, kv_disk_path="auto", kv_disk_size=1 << 20), mesh)
    assert loaded.tiers is not None
    loaded.tiers.close()
    parts = ["ModelFiles", "library", "meet", *["exchange"] * 2, "_weights", "meet", *["exchange"] * 2]
    assert order == parts


def test_ranks_meet_while_they_load(group: LLM) -> None:
    executor = group.engine._executor
    assert isinstance(executor, GroupExecutor)
    assert [peer.gathered for peer in executor._hub._peers.values()] == [2] * (executor._hub.size - 1)


def test_documented_tokens(group: LLM, data: Callable[[str], Path]) -> None:
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    (output,) = group.generate([known["prompt_ids"]], replace(GREEDY, max_tokens=256), use_tqdm=False)
    assert [*known["prompt_ids"], *output.outputs[0].token_ids][: len(known["greedy_ids"])] == known["greedy_ids"]


def test_a_mixed_batch(group: LLM, alone: LLM) -> None:
    """Chunked prompts, hits in the prefix cache, branches, every kind of sampling, scores; twice, the second time cached."""
    long = "Once upon a time there was a little girl. " * 4
    prompts = [long + "She", long + "Her dog", "The", "One day, Tom", "x", "Lily and Tom"]
    params = [
        SamplingParams(temperature=0, max_tokens=30),
        SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=2, top_k=5, top_p=0.9, max_tokens=25, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=1.5, seed=3, min_p=0.05, max_tokens=40, min_tokens=10, logit_bias={300: 5.0}),
        SamplingParams(temperature=0, max_tokens=9, presence_penalty=1.0, stop=["the"]),
    ]
    for _ in range(2):
        ours, wanted = (llm.generate(prompts, params, use_tqdm=False) for llm in (group, alone))
        for got, want in zip(ours, wanted, strict=True):
            assert [each.token_ids for each in got.outputs] == [each.token_ids for each in want.outputs]
            assert [each.finish_reason for each in got.outputs] == [each.finish_reason for each in want.outputs]
        assert close(ours[3].outputs[0].logprobs, wanted[3].outputs[0].logprobs)
        assert close(ours[3].prompt_logprobs, wanted[3].prompt_logprobs)
    assert (ours[0].num_cached_tokens or 0) >= 40


def test_grammars_where_tokens_are_sampled(group: LLM, alone: LLM) -> None:
    """The rank that samples may be another process than the one that compiled."""
    kinds = [{"regex": "[a-z]{3,9}[.]"}, {"choice": ["once", "upon"]}, {"json_object": True}]
    params = [
        SamplingParams(temperature=1.0, seed=4, max_tokens=40, n=2, structured_outputs=StructuredOutput(**kind))
        for kind in kinds
    ]
    ours, wanted = (llm.generate(["Once", "The", "A"], params, use_tqdm=False) for llm in (group, alone))
    for got, want in zip(ours, wanted, strict=True):
        assert [each.token_ids for each in got.outputs] == [each.token_ids for each in want.outputs]
    assert all(re.fullmatch("[a-z]{3,9}[.]", each.text) for each in ours[0].outputs)
    assert {each.text for each in ours[1].outputs} <= {"once", "upon"}
    for llm in (group, alone):  # which rank compiles says why it can't
        with pytest.raises(UnsupportedError, match="oneOf constraints are not supported") as caught:
            llm.generate(["The"], SamplingParams(structured_outputs=StructuredOutput(json='{"oneOf": [{}, {}]}')))
        assert caught.value.param is None or caught.value.param == "structured_outputs"


def close(ours: Any, wanted: Any) -> bool:
    assert len(ours) == len(wanted)
    pairs = [(a[token].logprob, b[token].logprob) for a, b in zip(ours, wanted, strict=True) if b for token in b]
    return all(abs(a - b) < 1e-4 for a, b in pairs) and len(pairs) > 0


def test_preempted_and_cancelled(group: LLM, alone: LLM) -> None:
    """More than the cache holds: some wait, give up their blocks and come back; some are cancelled in between."""
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=100, ignore_eos=True)
    prompts = [f"Number {i}: once there" for i in range(24)]
    before = group.engine.stats().preemptions
    ours = group.generate(prompts, sampling, use_tqdm=False)
    wanted = alone.generate(prompts, sampling, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in wanted]
    assert group.engine.stats().preemptions > before
    cancelled(group)
    assert list(group.engine.pool.check()) == []


def test_a_fault_of_the_configuration_is_told_as_one(stories: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9: this model has 8 heads, so 1 to 8 work"):
        LLM(**stories, tensor_parallel_size=9)
    with pytest.raises(ConfigError, match=r"holds neither|no config"):
        LLM(**{**stories, "model": str(tmp_path)}, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_parallel_size": 2}, "copies of a model are groups of `kvasir serve`"),
        ({"distributed_executor_backend": "ray", "tensor_parallel_size": 2}, "runs its ranks with mp"),
    ],
)
def test_what_needs_a_cluster_is_refused_in_process(stories: dict[str, Any], options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM(**stories, **options)


def test_places_go_by_node() -> None:
    config = EngineConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    found = places(config, {0: "a", 1: "a", 2: "b", 3: "a"}, own_gpus=False)
    assert [(p.tp_rank, p.stage, p.local_ranks, p.device_index) for p in found] == [
        (0, 0, 3, 0), (1, 0, 3, 1), (0, 1, 1, 0), (1, 1, 3, 2),
    ]  # fmt: skip
    assert [p.samples for p in found] == [False, False, True, False]


def test_executor_of_one_rank_is_this_process(stories: dict[str, Any]) -> None:
    executor = executor_of(EngineConfig(**stories))
    assert (executor.depth, executor.loaded.decoder.mesh.place.size) == (1, 1)
