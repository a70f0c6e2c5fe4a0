"""KV caches in other types than the model's, through the whole engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.llm import LLM
from kvasir.engine.load import _agree
from kvasir.engine.memory import CACHE_DTYPES
from kvasir.engine.mesh import Mesh
from kvasir.engine.model_facts import model_facts
from kvasir.engine.request import SamplingParams
from kvasir.engine.spec import Latent, Layer, Spec

EIGHT_BITS = ["int8", "fp8", "fp8_e5m2"]
GREEDY = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
SPEC = Spec(
    vocab=9, hidden=8, heads=4, kv_heads=2, head_dim=6, ffn=8, eps=1e-5, max_len=64, layers=(Layer(), Layer(), Layer())
)
PROMPTS = [
    [random.Random(seed).randrange(3, 90) for _ in range(length)] for seed, length in enumerate((90, 33, 7, 150))
]


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., tuple[Path, Any]]) -> str:
    return str(checkpoint("Llama")[0])


def answers(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    found = [list(r.outputs[0].token_ids) for r in llm.generate([list(p) for p in prompts], GREEDY, use_tqdm=False)]
    assert llm.engine.pool.check() == []
    return found


def preempted(llm: LLM) -> bool:
    """Whether a sequence ever was; counts are told after the step."""
    deadline = time.monotonic() + 60
    while not llm.engine.stats().preemptions and time.monotonic() < deadline:
        time.sleep(0.01)
    return llm.engine.stats().preemptions > 0


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("model", "dtype"), [("skald", "bfloat16"), ("llama", "float32")])
def test_greedy_is_the_same_in_any_batch_chunk_and_from_any_tier(
    kind: str, model: str, dtype: str, llama: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "kv_cache_dtype": kind, "num_threads": 1, "skip_tokenizer_init": True}
    name = llama if model == "llama" else model
    with LLM(name, **options) as llm:
        assert llm.engine.info.kv_cache_dtype == {"int8": "int8", "fp8": "float8_e4m3fn"}[kind]
        alone = [answers(llm, [p])[0] for p in PROMPTS]
        assert answers(llm, PROMPTS) == alone  # together, from the prefix cache
        block = llm.engine._executor.loaded.cache.bytes_per_block
    small = options | {"max_num_batched_tokens": 20, "max_model_len": 256, "kv_cache_memory_bytes": 17 * block}
    with LLM(name, **small) as llm:
        assert answers(llm, PROMPTS) == alone
        assert preempted(llm)
    kept = small | {"kv_disk_path": str(tmp_path)}
    for turn in range(2):
        with LLM(name, **kept) as llm:
            assert answers(llm, PROMPTS[3:]) == alone[3:]
            assert llm.engine._tiers is not None
            assert (llm.engine._tiers.counts()["disk_loaded"] > 0) == (turn == 1)


@pytest.mark.parametrize(("kind", "close"), [("float16", 1e-2), ("int8", 0.05), ("fp8", 0.15), ("fp8_e5m2", 0.3)])
def test_close_to_the_float_cache(kind: str, close: float) -> None:
    """Log probabilities of a text that the model knows: the mean difference."""
    text = "Once upon a time there was a king who had three daughters. The youngest was so beautiful that the sun"
    scores = []
    for chosen in ("float32", kind):
        with LLM("skald", dtype="float32", kv_cache_dtype=chosen, num_threads=1) as llm:
            (output,) = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
            rows = [row for row in output.prompt_logprobs or () if row]
            scores.append(torch.tensor([next(iter(row.values())).logprob for row in rows]))
    assert (scores[0] - scores[1]).abs().mean() < close


@pytest.mark.parametrize("name", CACHE_DTYPES)
@pytest.mark.parametrize("latent", [False, True])
def test_blocks_of_any_type_are_read_written_and_copied_whole(name: str, latent: bool) -> None:
    spec, dtype = SPEC, CACHE_DTYPES[name]
    if latent:
        spec = Spec(**{**vars(SPEC), "latent": Latent(kv_rank=5, nope_dim=4, rope_dim=2, v_dim=4)})
    cache = KVCache(spec, 6, 3, dtype, torch.device("cpu"))
    assert cache.arena.numel() == 6 * KVCache.block_bytes(spec, 3, dtype)
    torch.manual_seed(0)
    cache.arena.copy_(torch.randint(0, 256, cache.arena.shape))
    before = cache.read(range(6))
    cache.copy([(1, 4), (1, 0), (3, 5)])
    assert torch.equal(cache.read(range(6)), before[[1, 1, 2, 3, 1, 3]])
    cache.write([2, 0], before[[4, 5]])
    assert torch.equal(cache.read([2, 0, 1]), before[[4, 5, 1]])


def test_eight_bits_take_half_and_their_scales() -> None:
    sizes = {name: KVCache.block_bytes(SPEC, 16, dtype) for name, dtype in CACHE_DTYPES.items()}
    assert sizes["bfloat16"] == 2 * 3 * 16 * 2 * 6 * 2
    assert sizes["int8"] == sizes["fp8"] == sizes["fp8_e5m2"] == 2 * 3 * 16 * 2 * (6 + 4)


def test_planning_and_content_ids_know_the_type(llama: str) -> None:
    facts = {kind: model_facts(EngineConfig(model=llama, kv_cache_dtype=kind)) for kind in ("float32", "int8")}  # type: ignore[arg-type]
    assert facts["int8"].kv_cache_dtype == "int8"
    assert facts["int8"].memory.kv_cache * 64 == facts["float32"].memory.kv_cache * 20  # heads of 16 and a scale
    salts, blocks = set(), {}
    for kind in ("float32", "int8", "fp8"):
        options = {"dtype": "float32", "kv_cache_dtype": kind, "kv_cache_memory_bytes": 1 << 20}
        with LLM(llama, num_threads=1, skip_tokenizer_init=True, **options) as llm:
            salts.add(llm.engine.info.salt)
            blocks[kind] = llm.engine.info.num_blocks
    assert len(salts) == 3
    assert blocks["int8"] == blocks["fp8"] > 3 * blocks["float32"]


def test_a_type_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype must be one of .*int8, got 'q4_0'"):
        EngineConfig(kv_cache_dtype="q4_0")  # type: ignore[arg-type]


def test_ranks_that_would_take_different_types_say_so(on_ranks: Callable[..., list[Any]]) -> None:
    def work(mesh: Mesh) -> str:
        _agree(mesh, torch.float32, torch.int8)
        try:
            _agree(mesh, torch.float32 if mesh.place.rank else torch.bfloat16, torch.int8)
        except ConfigError as error:
            return error.message
        return "agreed"

    assert all("don't agree on a type" in found for found in on_ranks(2, 1, work))
