"""Where the model runs, in what type, and how many blocks fit beside it: computed, never profiled."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig, served_len
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import Layout, Room, layout
from kvasir.engine.mlp import STACKED
from kvasir.engine.shaping import shaping_bytes
from kvasir.engine.share import Share, stages
from kvasir.engine.spec import Spec
from kvasir.kernels.attention import MOST_WORK_BYTES
from kvasir.kernels.linear import linear, multiplied_by, packed
from kvasir.kernels.native import native, vector_bytes
from kvasir.kernels.op import every_op

CPU_SHARE = 0.4
"""Of the RAM that is free beside the weights: the machine has other things to do."""
LEAST_LOGITS = 256
"""Rows whose logits one forward may give, however few seats there are: those of a scored prompt."""
PENALTY_BYTES = 5
"""For each token of each seat: its count and whether the prompt holds it, as `Sampler` keeps them from the first penalty on."""
UNCALLED = ("shrink", "expand")
"""Ops that no step calls: adapters are refused."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = DTYPES | {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided. `report` is a small table for people."""

    num_blocks: int
    max_model_len: int
    report: str
    layout: Layout


@dataclass(frozen=True)
class Budget:
    """What there is for keys and values, in bytes, and how it came about: (line of the report, bytes)."""

    free: int
    lines: tuple[tuple[str, int], ...]


def resolve_device(config: EngineConfig, index: int = 0) -> torch.device:
    """auto: cuda when there is one, this process's GPU `index`, else cpu. cuda where there is none is a ConfigError."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu", param="device")
    if not has_cuda or config.device == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"{index + 1} ranks on this node need a GPU each, torch finds {torch.cuda.device_count()}",
            param="tensor_parallel_size",
        )
    return torch.device("cuda", index)


def resolve_dtype(
    config: EngineConfig, config_json: Mapping[str, Any], device: torch.device, *, packs: bool = True
) -> torch.dtype:
    """--dtype, or for auto the checkpoint's own type where the device computes it well, else float32.

    float16 is no type for a CPU: 256 rows through a linear run at 0.03 TFLOP/s on one Zen 5 core, 0.25 in float32.
    float32 holds every float16 and bfloat16 value exactly, so nothing is lost but memory; --dtype bfloat16 halves that.
    packs: the model's products are ours; those of transformers' code are torch's.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    name = str(config_json.get("dtype") or config_json.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"config.json: dtype {name!r} is not supported; use --dtype {'|'.join(DTYPES)}", param="dtype"
        )
    dtype = DTYPES[name]
    return dtype if computes_well(dtype, device, packs=packs) else torch.float32


def resolve_cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """--kv-cache-dtype; auto: that of the activations."""
    return dtype if config.kv_cache_dtype == "auto" else CACHE_DTYPES[config.kv_cache_dtype]


def compiled_kernels() -> tuple[bool, str]:
    """Whether the CPU's kernels are compiled code, and where that lies or why not."""
    found = native()
    return found.library is not None, found.text


def computes_well(dtype: torch.dtype, device: torch.device, *, packs: bool = True) -> bool:
    """Whether products in this type are as fast on the device as in float32.

    bfloat16 is where there are instructions for it, and by our own products (`packs`) without: two Zen 3 cores computed a
    125M model at 46 / 183 / 261 tokens/s for 1 / 8 / 32 sequences, in float32 at 19 / 101 / 187; prompts alike.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype != torch.bfloat16:
        return False
    own = multiplied_by(dtype, device)[0] == "native" and vector_bytes() >= 32  # with shorter ones nobody has measured
    return (packs and own) or bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU, as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(flags.partition(":")[2].split())


def plan_memory(
    config: EngineConfig, share: Share, *, dtype: torch.dtype, device: torch.device, weight_bytes: int
) -> MemoryPlan:
    """Blocks for the KV cache, computed before the weights (`weight_bytes`) are loaded; the least that any rank can have.

    When one sequence of the model's own max_model_len doesn't fit, it is shrunk and the report says so; a length the
    user asked for is never shrunk: ConfigError says what took what.
    """
    spec, mesh = share.full, share.mesh
    wanted, rows = served_len(config, spec.max_len), token_budget(config, spec, device)
    shape = layout(spec, wanted, stages(spec, mesh.place.pp, config.pipeline_layer_partition))
    block = KVCache.block_bytes(share.spec, config.block_size, resolve_cache_dtype(config, dtype), shape.height)
    budget = _budget(config, share, dtype, device, weight_bytes)
    (fitting,) = mesh.least(max(0, budget.free) // block)
    held = Room(shape, config.block_size, rows)
    length = held.longest(fitting, wanted)
    if length < min(wanted, config.max_model_len or 1):
        raise ConfigError(
            _too_small(config, budget, wanted, length, held.blocks(wanted) * block), param="max_model_len"
        )
    useful = config.max_num_seqs * held.blocks(length)
    if not spec.causal:  # nothing outlives its step
        useful = -(-rows // config.block_size) + config.max_num_seqs
    num_blocks = fitting if config.kv_cache_memory_bytes is not None else min(fitting, useful)
    return MemoryPlan(num_blocks, length, _report(config, budget, num_blocks, block, wanted, length, held), shape)


def token_budget(config: EngineConfig, spec: Spec, device: torch.device) -> int:
    """--max-num-batched-tokens, or its default for the device; a model that reads whole prompts needs at least its own
    length, so a chosen one that is smaller is what prompts are held to."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    if spec.causal:
        return 8192 if device.type == "cuda" else 256
    # no stream waits for a step to end: 512 texts of 4 to 60 words took MiniLM 1.8 s by 1024 tokens, 2.6 s by 256 (2 cores)
    return max(8192 if device.type == "cuda" else 1024, config.max_model_len or spec.max_len)


def activation_bytes(config: EngineConfig, spec: Spec, dtype: torch.dtype, device: torch.device) -> int:
    """An upper estimate of what a step holds besides weights and cache: rows in the widest layer, logits, and on a GPU what
    attention puts aside, penalties count and shaped draws sort: a request that needs them must find room. `spec` is a rank's own.
    """
    heads, facts = spec.heads + 2 * spec.kv_heads, spec.experts
    widest = 4 * spec.ffn
    if facts is not None:
        widest = max(widest, facts.per_token * (3 * facts.ffn + 2 * spec.hidden) + 4 * facts.shared_ffn)
    row = 6 * spec.hidden + 3 * heads * spec.head_dim + widest
    logits = 4 * spec.vocab * torch.float32.itemsize
    rows = token_budget(config, spec, device)
    sampled, wanted = min(rows, config.max_num_seqs), min(rows, max(config.max_num_seqs, LEAST_LOGITS))
    aside = 0
    if device.type == "cuda":
        tables = config.max_num_seqs * spec.vocab * PENALTY_BYTES
        aside = MOST_WORK_BYTES + tables + shaping_bytes(sampled, spec.vocab)
    return rows * row * dtype.itemsize + wanted * logits + aside


@dataclass(frozen=True)
class Taken:
    """Which backend an op has on a type of device, why, and which can be had; `plain` is the definition."""

    device: str
    op: str
    backend: str
    why: str
    choices: tuple[str, ...]


def kernel_backends() -> Iterator[Taken]:
    """Of every op, and of products with weights of every type, on every type of device that is here and calls them."""
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        for name, found in every_op().items():
            if name in UNCALLED or (name == "stacked_experts" and device not in STACKED):
                continue
            yield Taken(device, name, found.taken(device), found.why(device), tuple(found.choices(device)))
        for kind, dtype in DTYPES.items():
            yield Taken(device, f"linear of {kind}", *multiplied_by(dtype, torch.device(device)), ())


def linear_speed() -> tuple[float, float]:
    """(bytes of weights a second for one row, operations a second for 256) in bfloat16 on the CPU, as models are computed."""
    weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    ours = packed(weight)

    def seconds(rows: int) -> float:
        x, times = torch.zeros(rows, 4096, dtype=torch.bfloat16), []
        for _ in range(6):
            started = time.perf_counter()
            linear(x, ours)
            times.append(time.perf_counter() - started)
        return min(times)

    return weight.nbytes / seconds(1), 2 * 256 * weight.numel() / seconds(256)


def huge_pages() -> str:
    """Whether the system gives huge pages: always, madvise (to who asks, as we do) or never; empty: it has none."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else ""


def allocator() -> str:
    """Whose malloc this process has."""
    maps = Path("/proc/self/maps")
    mapped = maps.read_text() if maps.exists() else ""
    loaded = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if f"/lib{name}" in mapped), None)
    return loaded or ("glibc's, told to keep what is freed" if "/libc.so.6" in mapped else "the system's")


def keep_freed_memory() -> None:
    """Tell glibc's malloc not to hand freed memory back at every step: a process that steps calls it once.

    By default large temporaries are mapped anew each time, and pay a page fault per 4 KiB: attention of 32 sequences of
    160 tokens (32 / 8 heads of 64) took 2.0 ms of CPU time instead of 1.2. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 28)


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that new tensors can have, bytes of all). What torch keeps of tensors that are gone it gives to new ones."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def available_ram() -> int:
    """Bytes that new allocations can have: the machine's, or less where a cgroup sets a limit."""
    return min([_machine_ram(), *_cgroup_ram(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _machine_ram() -> int:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    if kilobytes is not None:
        return int(kilobytes) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_ram(root: Path, membership: Path) -> list[int]:
    """What each limited cgroup (v2) around this process has left; pages of files count as free."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = root / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    left = []
    for folder in (own, *own.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if folder.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
            left.append(int(limit.read_text()) - int(used.read_text()) + _file_pages(folder / "memory.stat"))
    return left


def _file_pages(stat: Path) -> int:
    lines = stat.read_text().splitlines() if stat.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _budget(config: EngineConfig, share: Share, dtype: torch.dtype, device: torch.device, weight_bytes: int) -> Budget:
    activations = activation_bytes(config, share.spec, dtype, device)
    taken = (("weights", weight_bytes), ("activations (estimate)", activations))
    on_gpu = device.type == "cuda"
    if (size := config.kv_cache_memory_bytes) is not None:
        free = gpu_memory(device)[0] if on_gpu else available_ram() // share.mesh.place.local_ranks
        if size > free:
            where = "on the GPU" if on_gpu else "of RAM to each rank here"
            message = f"--kv-cache-memory-bytes {size} ({_human(size)}): {_human(free)} {where} are free"
            raise ConfigError(message, param="kv_cache_memory_bytes")
        return Budget(size, taken)
    if on_gpu:
        free, total = gpu_memory(device)
        usable = int(total * config.gpu_memory_utilization)
        lines = ((f"GPU memory x {config.gpu_memory_utilization:g}", usable), ("used by others", total - free), *taken)
        return Budget(usable - (total - free) - weight_bytes - activations, lines)
    available = available_ram() // share.mesh.place.local_ranks
    rest = available - weight_bytes - activations
    return Budget(int(rest * CPU_SHARE), (("available RAM", available), *taken, ("left", rest)))


def _report(
    config: EngineConfig, budget: Budget, num_blocks: int, block: int, wanted: int, length: int, room: Room
) -> str:
    size, groups = config.block_size, len(room.layout.groups)
    lines = _table((*budget.lines, ("KV cache", num_blocks * block)))
    blocks = f"{num_blocks} blocks of {size} tokens ({_human(block)} each)"
    if groups == 1:
        lines.append(f"{blocks} hold {num_blocks * size} tokens")
    else:
        most = room.blocks(length)
        lines.append(f"{blocks}; layers form {groups} groups, and a sequence of {length} tokens takes {most} blocks")
    if length < wanted:
        lines.append(f"max_model_len is {length} instead of the model's {wanted}: more doesn't fit")
    return "\n".join(lines)


def _too_small(config: EngineConfig, budget: Budget, wanted: int, fitting: int, needed: int) -> str:
    rows = (*budget.lines, ("free for the KV cache", budget.free), (f"one sequence of {wanted} tokens", needed))
    return "\n".join(
        (
            f"the KV cache has room for {fitting} tokens, not for one sequence of {wanted}:",
            *_table(rows),
            "lower --max-model-len or --max-num-seqs, or raise --kv-cache-memory-bytes"
            " (on CUDA: --gpu-memory-utilization)",
        )
    )


def _table(rows: tuple[tuple[str, int], ...]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {_human(size):>10}" for label, size in rows]


def _human(size: int) -> str:
    if abs(size) >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB" if abs(size) >= 1 << 20 else f"{size / 1024:.1f} KiB"
