"""Every family's tokens in every layout are those of one rank: chunked prompts with a common beginning that is cached, branches,
mixed sampling, sequences that give up their blocks and come back, cancelled ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cancelling import cancelled

from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.layout import Room, layout
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.output import RequestOutput
from kvasir.engine.request import SamplingParams
from kvasir.engine.share import share_of, stages

LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma3Text": {"norm": 0.0, "head_dim": 16, "sliding_window": 9, "num_hidden_layers": 7},
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "DeepseekV2": LATENT,
}
LAYOUTS = [(2, 1, False), (1, 2, False), (2, 2, False)]
WITH_EXPERTS = [(2, 1, True), (2, 2, True)]
"""(ranks per stage, stages, experts dealt out whole)"""
CASES = [
    *((family, *each) for family in FAMILIES for each in LAYOUTS),
    *((family, *each) for family in ("Mixtral", "DeepseekV2") for each in WITH_EXPERTS),
]
LENGTH, BLOCK, ROWS = 112, 8, 24
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1, "max_model_len": LENGTH, "block_size": BLOCK,
    "max_num_batched_tokens": ROWS,
}  # fmt: skip
PROMPTS = [[5, 6, 7], list(range(3, 60)), [9], *([3 + i] * 30 for i in range(5))]
KINDS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=2, top_k=5, top_p=0.9, repetition_penalty=1.3, max_tokens=24, ignore_eos=True),
]
MIXED = [KINDS[i % 3] for i in range(len(PROMPTS))]
Alone = Callable[[str], tuple[Path, list[list[list[int]]]]]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(checkpoint: Any) -> Alone:
    """A family's checkpoint, and what one rank writes."""

    @functools.cache
    def find(family: str) -> tuple[Path, list[list[list[int]]]]:
        folder, _ = checkpoint(family, vocab_size=97, **FAMILIES[family])
        with LLM(str(folder), **OPTIONS, kv_cache_memory_bytes=1 << 23) as llm:
            return folder, tokens(llm.generate(PROMPTS, MIXED, use_tqdm=False))

    return find


def scarce(folder: Path, tp: int, pp: int, *, dealt: bool) -> int:
    """Bytes of a cache that holds one and a half of the longest sequences on the rank whose blocks are largest."""
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    shape = layout(spec, LENGTH, stages(spec, pp))
    held = [share_of(spec, Mesh(Place(tp, pp, rank)), expert_parallel=dealt) for rank in range(tp * pp)]
    block = max(KVCache.block_bytes(share.spec, BLOCK, torch.float32, shape.height) for share in held)
    return block * Room(shape, BLOCK, ROWS).blocks(LENGTH) * 3 // 2


@pytest.mark.parametrize(("family", "tp", "pp", "dealt"), CASES)
def test_tokens_are_those_of_one_rank(alone: Alone, family: str, tp: int, pp: int, dealt: bool) -> None:
    folder, wanted = alone(family)
    ranks: dict[str, Any] = {
        "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "enable_expert_parallel": dealt,
        "kv_cache_memory_bytes": scarce(folder, tp, pp, dealt=dealt),
    }  # fmt: skip
    with LLM(str(folder), **OPTIONS, **ranks) as llm:
        assert tokens(llm.generate(PROMPTS, MIXED, use_tqdm=False)) == wanted
        assert llm.engine.stats().preemptions > 0
        llm.generate(PROMPTS[1:2], SamplingParams(max_tokens=1), use_tqdm=False)
        again = llm.generate(PROMPTS[1:2], KINDS[1], use_tqdm=False)
        assert (again[0].num_cached_tokens or 0) >= 40
        assert tokens(again) == wanted[1:2]
        cancelled(llm)
        assert list(llm.engine.pool.check()) == []


@pytest.mark.parametrize(("tp", "pp"), [(tp, pp) for tp, pp, _ in LAYOUTS])
def test_vectors_are_those_of_one_rank(checkpoint: Any, tp: int, pp: int) -> None:
    folder, _ = checkpoint("Bert", auto="AutoModel", vocab_size=97, num_key_value_heads=None)
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1}
    wanted, found = [], []
    for into, ranks in ((wanted, {}), (found, {"tensor_parallel_size": tp, "pipeline_parallel_size": pp})):
        with LLM(str(folder), **options, **ranks) as llm:
            into += llm.embed([[5, 6, 7], [8] * 30, [9]], use_tqdm=False)
    for got, want in zip(found, wanted, strict=True):
        pairs = zip(got.outputs.embedding, want.outputs.embedding, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5
