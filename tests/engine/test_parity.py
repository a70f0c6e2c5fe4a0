"""Every family equals transformers' float32 model on small random checkpoints, however rows are cut, batched and placed."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine import rows
from kvasir.engine.arch import load_spec
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh
from kvasir.engine.request import SamplingParams
from kvasir.engine.share import share_of
from kvasir.engine.weights import load_decoder

CPU = torch.device("cpu")
TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
DEEP_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 1.1, "beta_fast": 4, "beta_slow": 1}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2}
LONG = {"short_factor": [1.0 + i / 20 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
SUSPENDED = {"rope_type": "longrope", "rope_theta": 1e4, **LONG, "original_max_position_embeddings": 128}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
# transformers' eager Falcon adds the distances twice, its sdpa path once; Gemma's norms store weight - 1
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-whole": ("Llama", {"rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.3}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-mha-gelu": ("Llama", {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mistral-nemo": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "ministral3": (
        "Ministral3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "gemma": ("Gemma", {"norm": 0.0, "head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {"norm": 0.0, "head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 20, "num_hidden_layers": 4},
    ),
    "gemma3": ("Gemma3Text", {"norm": 0.0, "head_dim": 32, "sliding_window": 9, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {"sliding_window": 9, "pad_token_id": 0}),
    "phi3-longrope": ("Phi3", {"rope_parameters": SUSPENDED, "pad_token_id": 0}),
    "phi4-mini": (
        "Phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
            "pad_token_id": 0,
        },
    ),
    "cohere": ("Cohere", {"logit_scale": 0.25, "pad_token_id": 0}),
    "cohere-plus": ("Cohere", {"use_qk_norm": True, "pad_token_id": 0}),
    "cohere2": ("Cohere2", {"sliding_window": 9, "num_hidden_layers": 5, "pad_token_id": 0}),
    "falcon-7b": ("Falcon", {"ffn_hidden_size": 112}),
    "falcon-40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-11b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": (
        "Falcon",
        {"attention": "sdpa", "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "falcon-alibi-6": ("Falcon", {"attention": "sdpa", "alibi": True, "num_attention_heads": 6, "hidden_size": 96}),
    "starcoder2": ("Starcoder2", {"sliding_window": 9}),
    "opt": ("OPT", {"ffn_dim": 112}),
    "opt-350m": ("OPT", {"ffn_dim": 112, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0}),
    "internlm3": ("InternLM3", {"qkv_bias": True, "bias": True, "head_dim": 24}),
    "mixtral": ("Mixtral", MOE),
    "mixtral-window": ("Mixtral", {**MOE, "sliding_window": 9, "tie_word_embeddings": True}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "phimoe": ("Phimoe", {**MOE, "attention_bias": True, "lm_head_bias": True}),
    "dbrx": (
        "Dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
        },
    ),
    "gpt-oss": ("GptOss", {**MOE, "head_dim": 16, "sliding_window": 9, "rope_parameters": {**YARN, "truncate": False}}),
    "llama4": (
        "Llama4Text",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 5,
            "attention_chunk_size": 12,
            "floor_scale": 16,
            "pad_token_id": 0,
        },
    ),
    "deepseek-v2-lite": ("DeepseekV2", {**MLA, **EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **MLA,
            **EXPERTS,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": DEEP_YARN,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {**MLA, **EXPERTS, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "rope_parameters": DEEP_YARN},
    ),
    "minicpm3": ("MiniCPM3", {**MLA, "dim_model_base": 32}),
}


Built = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def built(checkpoint: Callable[..., tuple[Path, Any]]) -> Built:
    """A case's checkpoint, as `checkpoint` has it, for all tests of this module."""

    @functools.cache
    def build(case: str) -> tuple[Path, Any]:
        family, changes = {**CASES, **OUTGROWN}[case]
        return checkpoint(family, **changes)

    return build


@pytest.mark.parametrize("case", CASES)
def test_logits_equal(case: str, built: Built, in_chunks: Any) -> None:
    folder, model = built(case)
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    decoder = load_decoder(folder, spec, dtype=torch.float32, device=CPU)
    rng = random.Random(case)
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (70, 1, 33, 16, 12)]
    with torch.no_grad():
        wanted = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for block_size in (16, 3):
        ours = in_chunks(decoder, prompts, block_size, seed=block_size)
        for got, want in zip(ours, wanted, strict=True):
            assert (got - want).abs().max() <= TOLERANCE, f"{len(want)} tokens, max logit {want.abs().max():.1f}"


LAYOUTS = ((2, 2, True), (3, 1, False))
"""(ranks per stage, stages, experts dealt out whole where there are some)"""
DENSE_LAYOUTS = ((1, 2, False), (3, 1, False))
EVERY_LAYOUT = ((2, 1, False), (1, 2, False), (2, 2, False), (2, 1, True), (4, 1, True), (3, 2, True), *LAYOUTS)
IN_EVERY_LAYOUT = ("llama", "qwen3", "gemma3", "mixtral", "deepseek-v2")


def asked(case: str, built: Built) -> tuple[Path, Any, list[list[int]], list[torch.Tensor]]:
    """(the model's folder and spec, prompts, the logits that transformers gives for them)."""
    folder, model = built(case)
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    rng = random.Random(case)
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (40, 1, 33)]
    with torch.no_grad():
        return folder, spec, prompts, [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_on_many_ranks(case: str, built: Built, in_chunks: Any, on_ranks: Any) -> None:
    """Heads, columns and vocabulary that don't divide evenly; more ranks than kv heads; stages; whole experts."""
    folder, spec, prompts, wanted = asked(case, built)

    def logits(mesh: Mesh, dealt: bool) -> list[torch.Tensor]:
        share = share_of(spec, mesh, expert_parallel=dealt and spec.experts is not None)
        decoder = load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=share)
        found: list[torch.Tensor] = in_chunks(decoder, prompts, 16, seed=3)
        return found

    few = DENSE_LAYOUTS if spec.experts is None else LAYOUTS
    for tp, pp, dealt in EVERY_LAYOUT if case in IN_EVERY_LAYOUT else few:
        if dealt and spec.experts is None:
            continue  # the same as without
        found = on_ranks(tp, pp, partial(logits, dealt=dealt))[tp * (pp - 1)]
        for got, want in zip(found, wanted, strict=True):
            assert (got - want).abs().max() <= TOLERANCE, f"{tp} x {pp} ranks, experts dealt out whole: {dealt}"
            assert got.argmax(-1).tolist() == want.argmax(-1).tolist(), "greedy tokens"


@pytest.mark.parametrize("case", IN_EVERY_LAYOUT)
def test_logits_equal_over_the_process_group_alone(case: str, built: Built, in_chunks: Any, on_ranks: Any) -> None:
    """As GPUs exchange everything but small sums: neither memory of the node's nor connections of our own, but gloo in the place
    of NCCL."""
    folder, spec, prompts, wanted = asked(case, built)

    def logits(mesh: Mesh) -> list[torch.Tensor]:
        mesh.one_shot = mesh.links = mesh.inward = mesh.onward = None
        share = share_of(spec, mesh, expert_parallel=spec.experts is not None)
        decoder = load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=share)
        found: list[torch.Tensor] = in_chunks(decoder, prompts, 16, seed=3)
        return found

    for got, want in zip(on_ranks(2, 2, logits)[2], wanted, strict=True):
        assert (got - want).abs().max() <= TOLERANCE
        assert got.argmax(-1).tolist() == want.argmax(-1).tolist(), "greedy tokens"


DEALT = ("llama", "qwen3", "gemma3", "mixtral", "deepseek-v2", "opt-350m", "falcon-11b", "cohere-plus")
"""Every placement of norms, every kind of attention and mixture."""


@pytest.mark.parametrize("case", DEALT)
def test_logits_equal_where_rows_are_dealt_out(
    case: str, built: Built, in_chunks: Any, on_ranks: Any, monkeypatch: Any
) -> None:
    """Sequence parallelism: counts of rows that don't divide, fewer rows than ranks, stages."""
    monkeypatch.setattr(rows, "dealing_wins", lambda mesh, *_: mesh.place.tp > 1)
    folder, spec, prompts, wanted = asked(case, built)

    def logits(mesh: Mesh) -> list[torch.Tensor]:
        decoder = load_decoder(folder, spec, dtype=torch.float32, device=CPU, share=share_of(spec, mesh))
        found: list[torch.Tensor] = in_chunks(decoder, prompts, 16, seed=3)
        return found

    for got, want in zip(on_ranks(2, 2, logits)[2], wanted, strict=True):
        assert (got - want).abs().max() <= TOLERANCE
        assert got.argmax(-1).tolist() == want.argmax(-1).tolist(), "greedy tokens"


OUTGROWN = {
    "phi3-outgrown": (
        "Phi3",
        {"rope_parameters": {**SUSPENDED, "original_max_position_embeddings": 25}, "pad_token_id": 0},
    ),
}
"""Longer than the ropes were trained for: prompts of 22 and 24 tokens, 12 more."""


@pytest.mark.parametrize("case", {**CASES, **OUTGROWN})
def test_greedy_tokens_equal(case: str, built: Built) -> None:
    """Through the whole engine: prompts cut into odd chunks, two at a time, then again out of the prefix cache."""
    folder, model = built(case)
    rng = random.Random(case)
    common = [rng.randrange(97) for _ in range(21)]
    prompts = [[*common, 5], [*common, 7, 8, 9]]
    options: dict[str, Any] = {"dtype": "float32", "block_size": 4, "max_num_batched_tokens": 7, "num_threads": 1}
    llm = LLM(str(folder), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 22, **options)
    runs = [
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        for _ in range(2)
    ]
    first, again = ([list(output.outputs[0].token_ids) for output in run] for run in runs)
    assert first == again
    assert (runs[1][0].num_cached_tokens or 0) > 0
    for prompt, tokens in zip(prompts, first, strict=True):
        assert len(tokens) == 12
        assert tokens == likeliest(model, prompt, tokens, at_once=case not in OUTGROWN)


def likeliest(model: Any, prompt: list[int], tokens: list[int], *, at_once: bool) -> list[int]:
    """The model's choice behind the prompt and each of these: the same when it would have written them itself. `at_once`: by
    one pass, where what comes later doesn't change the ropes of what came before."""
    ids = torch.tensor([prompt + tokens[:-1]])
    lengths = [ids.shape[1]] if at_once else range(len(prompt), ids.shape[1] + 1)
    with torch.no_grad():
        logits = [model(ids[:, :length]).logits[0, len(prompt) - 1 if at_once else -1 :] for length in lengths]
    found: list[int] = torch.cat(logits).argmax(-1).tolist()
    return found
