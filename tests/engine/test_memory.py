from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvasir.engine import memory
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.memory import PENALTY_BYTES, kernel_backends, plan_memory, resolve_device, resolve_dtype
from kvasir.engine.rank import Rank
from kvasir.engine.request import SamplingParams
from kvasir.engine.sampler import Sampler
from kvasir.engine.shaping import shaping_bytes
from kvasir.engine.share import share_of
from kvasir.engine.spec import Experts, Layer, Spec
from kvasir.engine.step import NewSequence
from kvasir.engine.weights import random_decoder
from kvasir.kernels.attention import MOST_WORK_BYTES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
SPEC = Spec(
    vocab=32000,
    hidden=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    ffn=8192,
    eps=1e-5,
    max_len=8192,
    layers=(Layer(),) * 16,
)
SMALL = dataclasses.replace(SPEC, vocab=8, hidden=8, heads=1, kv_heads=1, head_dim=8, ffn=8, layers=(Layer(),))
BLOCK = KVCache.block_bytes(SPEC, 16, torch.bfloat16)


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_ram", lambda: 12 * GIB)


def plan(config: EngineConfig, device: torch.device = CPU) -> memory.MemoryPlan:
    return plan_memory(config, share_of(SPEC), dtype=torch.bfloat16, device=device, weight_bytes=2 * GIB)


@pytest.mark.usefixtures("ram")
def test_cpu_takes_its_share_of_what_the_weights_leave() -> None:
    config = EngineConfig()
    got = plan(config)
    left = 12 * GIB - 2 * GIB - memory.activation_bytes(config, SPEC, torch.bfloat16, CPU)
    assert got.num_blocks == int(left * 0.4) // BLOCK
    assert got.max_model_len == 8192
    for words in ("available RAM", "weights", "2.00 GiB", "KV cache", f"{got.num_blocks} blocks of 16 tokens"):
        assert words in got.report


@pytest.mark.usefixtures("ram")
def test_no_more_than_is_useful() -> None:
    assert plan(EngineConfig(max_num_seqs=2, max_model_len=100)).num_blocks == 2 * 7


@pytest.mark.usefixtures("ram")
def test_explicit_size_is_kept_exactly() -> None:
    size = 1000 * BLOCK + 5
    assert plan(EngineConfig(kv_cache_memory_bytes=size, max_num_seqs=1)).num_blocks == 1000


@pytest.mark.usefixtures("ram")
def test_an_explicit_size_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes .*13.00 GiB.*: 12.00 GiB of RAM .* are free"):
        plan(EngineConfig(kv_cache_memory_bytes=13 * GIB))


@pytest.mark.usefixtures("ram")
def test_the_models_own_length_is_shrunk_and_said() -> None:
    got = plan(EngineConfig(kv_cache_memory_bytes=100 * BLOCK))
    assert (got.num_blocks, got.max_model_len) == (100, 1600)
    assert "max_model_len is 1600 instead of the model's 8192" in got.report


@pytest.mark.usefixtures("ram")
@pytest.mark.parametrize(
    "config", [{"max_model_len": 1601, "kv_cache_memory_bytes": 100 * BLOCK}, {"kv_cache_memory_bytes": 1}]
)
def test_a_wish_that_does_not_fit_is_an_error(config: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as error:
        plan(EngineConfig(**config))  # type: ignore[arg-type]
    for words in ("weights", "activations", "free for the KV cache", "--max-model-len", "--kv-cache-memory-bytes"):
        assert words in str(error.value)
    assert "--gpu-memory-utilization" in str(error.value)
    assert "--max-num-seqs" in str(error.value)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_ram", lambda: GIB)
    with pytest.raises(ConfigError, match=r"weights +2\.00 GiB"):
        plan(EngineConfig())


@pytest.mark.usefixtures("ram")
def test_longer_than_the_model() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 8193 is above the model's own limit of 8192"):
        plan(EngineConfig(max_model_len=8193))


def test_cuda_leaves_others_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what this process has, what torch keeps of tensors that are gone is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (63 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    config = EngineConfig(gpu_memory_utilization=0.5, max_num_seqs=4000)
    activations = memory.activation_bytes(config, SPEC, torch.bfloat16, CUDA)
    assert plan(config, CUDA).num_blocks == (40 * GIB - 10 * GIB - 2 * GIB - activations) // BLOCK


def test_activations() -> None:
    """A row of a mixture passes through several experts; on a GPU attention puts parts aside, and sampling has its tables."""
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=100)
    plain = memory.activation_bytes(config, SPEC, torch.bfloat16, CPU)
    aside = MOST_WORK_BYTES + 100 * SPEC.vocab * PENALTY_BYTES + shaping_bytes(64, SPEC.vocab)
    assert memory.activation_bytes(config, SPEC, torch.bfloat16, CUDA) == plain + aside
    for per_token, more in ((1, 0), (8, 64 * 2 * (8 * (3 * SPEC.ffn + 2 * SPEC.hidden) - 4 * SPEC.ffn))):
        facts = Experts(count=16, per_token=per_token, ffn=SPEC.ffn if per_token > 1 else 8)
        mixture = dataclasses.replace(SPEC, experts=facts)
        assert memory.activation_bytes(config, mixture, torch.bfloat16, CPU) - plain == more


def test_logits_of_a_scored_prompt_are_planned() -> None:
    """One seat's prompt may want more of them than there are seats: as many as a rank lets one forward give."""
    row = memory.activation_bytes(EngineConfig(max_num_batched_tokens=1), SPEC, torch.bfloat16, CPU)
    for tokens, seats, wanted in ((2000, 1, 256), (2000, 300, 300), (100, 1, 100)):
        config = EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=seats)
        logits = memory.activation_bytes(config, SPEC, torch.bfloat16, CPU) - tokens * (row - 16 * SPEC.vocab)
        assert logits == wanted * 16 * SPEC.vocab
        cache = KVCache(SMALL, 2, 16, torch.float32, CPU)
        rank = Rank(random_decoder(SMALL, torch.float32, CPU), cache, max_num_seqs=seats, max_model_len=16)
        assert min(tokens, rank.max_logits) == wanted


def test_what_penalties_keep_is_what_is_planned() -> None:
    sampler = Sampler(3, 40, CPU)
    sampling = SamplingParams(presence_penalty=1.0)
    sampler.enter(NewSequence(1, [4, 5], 2, sampling, seed=0, stop_token_ids=frozenset()))
    assert sampler.counts is not None
    assert sampler.in_prompt is not None
    assert sampler.counts.nbytes + sampler.in_prompt.nbytes == 3 * 40 * PENALTY_BYTES


def test_only_ops_that_steps_call_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {(taken.device, taken.op) for taken in kernel_backends()}
    assert {("cpu", "attention"), ("cuda", "attention"), ("cuda", "stacked_experts")} <= found
    assert ("cpu", "stacked_experts") not in found
    assert not {op for _, op in found} & {"shrink", "expand"}


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(EngineConfig()) == CPU
    with pytest.raises(ConfigError, match="--device cuda"):
        resolve_device(EngineConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(EngineConfig(), 1) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="3 ranks on this node need a GPU each, torch finds 2"):
        resolve_device(EngineConfig(), 2)
    assert resolve_device(EngineConfig(device="cpu")) == CPU


@pytest.mark.parametrize(
    ("stored", "flags", "own", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, {"avx512_bf16"}, ("oneDNN", 0), torch.bfloat16),
        ({"dtype": "bfloat16"}, {"amx_bf16"}, ("oneDNN", 64), torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, {"avx2"}, ("torch", 0), torch.float32),
        ({"torch_dtype": "bfloat16"}, {"avx2"}, ("native", 32), torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, {"asimd"}, ("native", 16), torch.float32),
        ({"torch_dtype": "float16"}, {"avx512_bf16"}, ("native", 64), torch.float32),
        ({"torch_dtype": "float32"}, {"avx512_bf16"}, ("native", 64), torch.float32),
        ({}, {"avx512_bf16"}, ("native", 64), torch.float32),
    ],
)
def test_auto_dtype_on_cpu(
    stored: dict[str, str],
    flags: set[str],
    own: tuple[str, int],
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """own: whose products there are, and how many bytes ours take at once."""
    monkeypatch.setattr(memory, "cpu_flags", lambda: flags)
    monkeypatch.setattr(memory, "multiplied_by", lambda dtype, device: (own[0], "because"))
    monkeypatch.setattr(memory, "vector_bytes", lambda: own[1])
    assert resolve_dtype(EngineConfig(), stored, CPU) == expected
    by_torch = expected if {"avx512_bf16", "amx_bf16"} & flags else torch.float32
    assert resolve_dtype(EngineConfig(), stored, CPU, packs=False) == by_torch
    assert resolve_dtype(EngineConfig(dtype="float16"), stored, CPU) == torch.float16


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype 'float8_e4m3fn' is not supported; use --dtype"):
        resolve_dtype(EngineConfig(), {"dtype": "float8_e4m3fn"}, CPU)


def test_cgroup_limits_count(tmp_path: Path) -> None:
    """The tightest limit on the way up holds; a cgroup without one is passed over."""
    inner = tmp_path / "pod" / "box"
    inner.mkdir(parents=True)
    (tmp_path / "member").write_text("0::/pod/box\n")
    for folder, limit in ((inner, "max"), (tmp_path / "pod", "5000"), (tmp_path, "90000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("2000\n")
        (folder / "memory.stat").write_text("anon 1500\ninactive_file 300\n")
    assert memory._cgroup_ram(tmp_path, tmp_path / "member") == [3300, 88300]
    assert memory._cgroup_ram(tmp_path / "absent", tmp_path / "member") == []


def test_available_ram_is_plausible() -> None:
    assert 1 << 20 < memory.available_ram() < 1 << 50


def test_freed_memory_is_kept() -> None:
    """In a process of its own: a 64 MB temporary made and freed over and over soon costs no page faults any more.

    At first malloc may still look for the place where it fits: up to seven times, as measured.
    """
    code = """
import resource, torch
from kvasir.engine.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)
print(faults() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < (64 << 20) // 4096
