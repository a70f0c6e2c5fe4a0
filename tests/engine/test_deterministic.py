"""Bit for bit the same logits whatever else is in the batch, however a prompt was chunked, cached or preempted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import until

from kvasir.engine import determinism, load
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.request import SamplingParams
from kvasir.engine.share import share_of
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.weights import random_decoder
from kvasir.kernels import linear, native
from kvasir.kernels.native import Native
from kvasir.kernels.sample import draw, score

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
WITNESS = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5, deterministic=True)
needs_compiler = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
SPEC = Spec(
    vocab=97,
    hidden=96,
    ffn=112,
    heads=6,
    kv_heads=3,
    head_dim=16,
    eps=1e-5,
    max_len=512,
    layers=(Layer(Rope(10000.0, dim=16)),) * 2,
)
KINDS: dict[str, dict[str, Any]] = {
    "skald": {"dtype": "bfloat16"},
    "Llama": {"dtype": "float32"},
    "Llama in bfloat16": {"dtype": "bfloat16"},
    "Llama, int8": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "Llama, fp8 in bfloat16": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "Llama in float16": {"dtype": "float16"},
    "Mixtral": {"dtype": "float32"},
    "DeepseekV2": {"dtype": "float32"},
    "DeepseekV2 in bfloat16": {"dtype": "bfloat16"},
    "Gemma2": {"dtype": "float32"},
    "OPT": {"dtype": "float32"},
}
CHANGES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV2": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 6,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    },
    "Gemma2": {"head_dim": 16, "sliding_window": 24},
    "OPT": {"ffn_dim": 112, "word_embed_proj_dim": 64},
}


def seen(llm: LLM, prompts: list[list[int]]) -> list[list[Any]]:
    """Tokens and the log probabilities of the likeliest, in full precision."""
    outputs = llm.generate([list(p) for p in prompts], WITNESS, use_tqdm=False)
    return [
        [(token, entry.logprob) for row in output.outputs[0].logprobs or () for token, entry in row.items()]
        for output in outputs
    ]


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_gives_the_same_bits_in_any_mixture(kind: str, checkpoint: Callable[..., tuple[Path, Any]]) -> None:
    family = kind.partition(",")[0].partition(" in ")[0]
    model = "skald" if family == "skald" else str(checkpoint(family, **CHANGES.get(family, {}))[0])
    options: dict[str, Any] = KINDS[kind] | {"deterministic": True, "num_threads": 2, "skip_tokenizer_init": True}
    rng = random.Random(kind)
    start = [rng.randrange(3, 90) for _ in range(30)]
    prompts = [
        start[: rng.randint(0, 30)] + [rng.randrange(3, 90) for _ in range(rng.randint(1, 40))] for _ in range(9)
    ]
    with LLM(model, **options, enable_prefix_caching=False) as llm:
        want = [seen(llm, [prompt])[0] for prompt in prompts]
        block = llm.engine._executor.loaded.cache.bytes_per_block
    for budget, blocks in ((17, 16), (64, 40)):
        small = {"max_num_batched_tokens": budget, "max_model_len": 112, "kv_cache_memory_bytes": blocks * block}
        with LLM(model, **options, **small, block_size=16) as llm:
            for _ in range(2):  # the second time from the prefix cache, as far as it reaches
                order = rng.sample(range(9), 9)
                found = seen(llm, [prompts[i] for i in order])
                assert found == [want[i] for i in order]
            stats, counted = llm.engine.stats, "preemptions" if blocks == 16 else "prefix_hits"
            assert until(partial(lambda name, told: getattr(told(), name), counted, stats))  # told after a step


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_draws_of_one_row_are_those_among_others(rows: int) -> None:
    """torch cuts the sum over a single long row into threads' parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    logits, ids = torch.randn(7, 150_000) * 4, torch.arange(7)
    for own, every in zip(score(logits[:rows], ids[:rows], 5), score(logits, ids, 5), strict=True):
        assert torch.equal(own, every[:rows])
    facts = {"temperature": torch.ones(7), "top_p": torch.full((7,), 0.9)}
    uniforms = torch.rand(7).double()
    alone = draw(logits[:rows], uniforms[:rows], **{name: value[:rows] for name, value in facts.items()})
    assert torch.equal(alone, draw(logits, uniforms, **facts)[:rows])
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_over_ranks_do_not_depend_on_the_batch(
    ranks: int, in_chunks: Any, on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir.engine.links.ONE_SHOT_BYTES", 0)  # where gloo's ring would be used
    prompts = [[random.Random(n).randrange(97) for _ in range(n)] for n in (70, 21, 1)]

    def work(mesh: Mesh) -> list[list[torch.Tensor]]:
        mesh.invariant = True
        decoder = random_decoder(SPEC, torch.float32, CPU, mesh.place.rank, share=share_of(SPEC, mesh))
        assert not determinism.indeterminate(decoder)
        mesh.invariant = ranks == 2
        assert bool(determinism.indeterminate(decoder)) == (ranks > 2)
        mesh.invariant = True
        return [in_chunks(decoder, prompts, 16, seed) for seed in range(3)]

    first, *others = on_ranks(ranks, 1, work)[0]
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_without_a_compiler_it_is_refused(
    checkpoint: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint("Llama")[0])
    monkeypatch.setattr(determinism, "native", lambda: Native(None, "there is no C++ compiler"))
    with pytest.raises(ConfigError, match=r"^--deterministic: it needs the compiled CPU kernels \(there is no C\+\+"):
        LLM(folder, dtype="float32", deterministic=True, skip_tokenizer_init=True)
    with LLM(folder, dtype="float32", num_threads=1, skip_tokenizer_init=True) as llm:
        with pytest.raises(ClientError, match="deterministic can't be kept here: it needs the compiled CPU kernels"):
            llm.generate([[5, 6]], WITNESS, use_tqdm=False)
        llm.generate([[5, 6]], replace(WITNESS, deterministic=False), use_tqdm=False)


@pytest.mark.parametrize("backend", ["torch", "plain"])
def test_attention_that_depends_on_the_batch_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"model": "skald", "attention_backend": backend}
    refused = pytest.raises(ClientError, match=f"deterministic can't be kept here: --attention-backend {backend} cuts")
    with LLM(**options, num_threads=1) as llm, refused:
        llm.generate([[5, 6]], WITNESS, use_tqdm=False)
    monkeypatch.setattr(load, "resolve_dtype", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=f"--deterministic: --attention-backend {backend} cuts attention by what is"):
        load.load(EngineConfig(**options, deterministic=True))


@pytest.mark.parametrize(
    ("options", "triton", "why"),
    [
        ({}, False, "products on cuda depend on how many rows a step has, and Triton, whose don't, isn't there"),
        (
            {"attention_backend": "plain"},
            True,
            "--attention-backend plain cuts attention by what is in the batch; use triton",
        ),
    ],
)
def test_a_gpu_is_refused_before_anything_is_loaded(
    options: Any, triton: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "resolve_device", lambda *_: CUDA)
    monkeypatch.setattr(load, "resolve_dtype", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(linear, "has_triton", lambda: triton)
    with pytest.raises(ConfigError, match=f"^--deterministic: {why}"):
        load.load(EngineConfig(model="skald", deterministic=True, **options))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_gpu_keeps_it_when_it_was_started_for_it(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are Triton's, then; other requests are told."""
    monkeypatch.setattr(linear, "has_triton", lambda: True)
    mesh = Mesh(Place(ranks, 1, 0))
    decoder = random_decoder(SPEC, torch.float32, CPU, pack=False, share=share_of(SPEC, mesh))
    decoder.device = CUDA
    assert (
        determinism.indeterminate(decoder)
        == "products on cuda depend on how many rows a step has; start with --deterministic"
    )
    monkeypatch.setattr(linear, "TILED", ("cpu", "cuda"))
    decoder.pack(invariant=True)
    assert ("sums over 4 ranks depend" in determinism.indeterminate(decoder)) == (ranks > 2)
    mesh.invariant = True
    assert not determinism.indeterminate(decoder)
