"""Compiles the Triton kernels for a GPU that needn't be there, and says what each takes: one line of JSON for each kernel.

    TRITON_INTERPRET=0 python tests/kernels/compile_triton.py few
    TRITON_INTERPRET=0 python tests/kernels/compile_triton.py cuda:90 [all | CASE... | variants]

The launchers run with real shapes and types on empty tensors, and what they would launch is compiled instead.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvasir.kernels import (
    activation_triton,
    attention_triton,
    bitmask_triton,
    blocks_triton,
    cache_triton,
    embedding_triton,
    linear_triton,
    lora_triton,
    moe_triton,
    norm_triton,
    rope_triton,
    sample_triton,
)
from kvasir.kernels.moe import Routing
from kvasir.kernels.quantise import Cache, Quantised
from kvasir.kernels.ragged import Ragged

BF16, FLOAT32, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2


class Driver:
    """As much of a GPU's driver as compiling needs."""

    def __init__(self, name: str) -> None:
        kind, _, arch = name.partition(":")
        self.target = GPUTarget(kind, int(arch) if arch.isdigit() else arch, 64 if kind == "hip" else 32)
        self._number = [*FEW].index(name)  # kernels are kept by device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def ragged(parts: list[tuple[int, int]]) -> Ragged:
    """Of (length, rows), in blocks of 16."""
    starts = np.cumsum([0, *(rows for _, rows in parts)]).astype(np.int32)
    lengths = np.array([length for length, _ in parts], np.int32)
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64)
    table = torch.zeros(len(parts), -(-int(lengths.max()) // 16), dtype=torch.int32)
    return Ragged(rows, rows, torch.from_numpy(starts), torch.from_numpy(lengths), table, starts, lengths)


def cache(heads: int, dim: int, dtype: torch.dtype) -> Cache:
    """Two blocks."""
    numbers = torch.zeros(2, heads, 16, dim, dtype=dtype).transpose(1, 2)
    return numbers if dtype.itemsize > 1 else Quantised(numbers, torch.zeros(2, heads, 16).transpose(1, 2))


def attend(
    dim: int, heads: int, kv_heads: int, kind: torch.dtype = BF16, *, type_: torch.dtype = BF16, **facts: Any
) -> None:
    """A mix of long decodes and a chunk."""
    step = ragged([(8000, 1), (300, 300)])
    keys, latent = cache(kv_heads, dim, kind), "value_dim" in facts
    q = torch.zeros(301, heads, dim, dtype=type_)
    attention_triton.attention(q, keys, None if latent else cache(kv_heads, dim, kind), step, scale=0.1, **facts)


def rows(hidden: int, ffn: int, heads: int, kv_heads: int, dim: int) -> None:
    """Norms, rotation with the write, activation, embedding, blocks."""
    x, weight = torch.zeros(8, hidden, dtype=BF16), torch.zeros(hidden, dtype=BF16)
    norm_triton.add_rms_norm(x, x, weight, 1e-5)
    norm_triton.layer_norm(x, weight, weight, 1e-5)
    activation_triton.gated(torch.zeros(8, 2 * ffn, dtype=BF16), "silu")
    embedding_triton.embed(torch.zeros(8, dtype=torch.int64), torch.zeros(4, hidden, dtype=BF16))
    blocks_triton.gather_blocks(torch.zeros(2, 4, 4096, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    qkv = torch.zeros(8, heads + 2 * kv_heads, dim, dtype=BF16).split_with_sizes([heads, kv_heads, kv_heads], 1)
    angles = torch.zeros(8, 1, dim, dtype=BF16), torch.zeros(8, 1, dim, dtype=BF16)
    for kind in (BF16, torch.int8, E4M3):
        caches = cache(kv_heads, dim, kind), cache(kv_heads, dim, kind)
        cache_triton.turn_and_write(*qkv, angles, *caches, ragged([(9, 1)] * 8), interleaved=False)


def sample(vocab: int) -> None:
    logits, ones = torch.zeros(4, vocab), torch.ones(4)
    whole = torch.ones(4, dtype=torch.int64)
    sample_triton.draw(logits, ones.double(), ones, min_p=ones, top_k=whole, top_p=ones, most=1)
    sample_triton.greedy(logits)
    sample_triton.score(logits, whole, 1)
    counts = torch.zeros(4, vocab, dtype=torch.int32)
    sample_triton.penalise(logits, counts, counts.bool(), repetition=ones, presence=ones, frequency=ones)
    bitmask_triton.allow(logits, whole, torch.zeros(4, -(-vocab // 32), dtype=torch.int32))


def mixture(hidden: int, ffn: int, count: int, rows: int, **facts: Any) -> None:
    x, logits = torch.zeros(rows, hidden, dtype=BF16), torch.zeros(rows, count)
    moe_triton.route(logits, Routing(4, **facts))
    index, weight = torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, 4)
    up, down = torch.zeros(2, 2 * ffn, hidden, dtype=BF16), torch.zeros(2, hidden, ffn, dtype=BF16)
    moe_triton.stacked_experts(x, index, weight, up, down, activation="silu")


def products(hidden: int, ffn: int, heads: int) -> None:
    """In both kinds of tiles: a bias, heads' matrices that lie turned."""
    x, weight = torch.zeros(300, hidden, dtype=BF16), torch.zeros(ffn, hidden, dtype=BF16)
    turned = torch.zeros(heads, 512, 128, dtype=BF16).transpose(1, 2)
    for rows in (1, 300):
        linear_triton.linear(x[:rows], weight, weight[:, 0], wide=True)
        linear_triton.linear_heads(torch.zeros(rows, heads, 512, dtype=BF16), turned, wide=True)
    norm_triton.sum_of_squares(x)


def adapters(hidden: int, rank: int) -> None:
    x, which = torch.zeros(8, hidden, dtype=BF16), torch.zeros(8, dtype=torch.int64)
    h = lora_triton.shrink(x, torch.zeros(2, rank, hidden, dtype=BF16), which)
    lora_triton.expand(h, torch.zeros(2, hidden, rank, dtype=BF16), which, torch.ones(2), x)


CASES: dict[str, Callable[[], None]] = {
    "D 64": lambda: attend(64, 32, 8),
    "D 128": lambda: attend(128, 32, 8),
    "D 256": lambda: attend(256, 16, 8, window=4096, softcap=50.0),
    "latent": lambda: attend(576, 128, 1, value_dim=512),
    "fp8": lambda: attend(128, 32, 8, E4M3),
    "fp8 D 256": lambda: attend(256, 16, 8, E4M3),
    "fp8 latent": lambda: attend(576, 128, 1, E4M3, value_dim=512),
    "e5m2": lambda: attend(128, 32, 8, E5M2),
    "int8": lambda: attend(128, 32, 8, torch.int8),
    "float32": lambda: attend(128, 32, 8, FLOAT32, type_=FLOAT32),
    "float32 D 256": lambda: attend(256, 16, 8, FLOAT32, type_=FLOAT32),
    "float32 latent": lambda: attend(576, 128, 1, FLOAT32, type_=FLOAT32, value_dim=512),
    "ALiBi": lambda: attend(128, 32, 32, slopes=torch.zeros(32)),
    "sparse": lambda: attend(128, 32, 8, sparse=(64, 16, 8, 1, 0)),
    "deterministic 128": lambda: attend(128, 32, 8, deterministic=True),
    "deterministic 256": lambda: attend(256, 16, 8, deterministic=True),
    "deterministic latent": lambda: attend(576, 128, 1, value_dim=512, deterministic=True),
    "deterministic fp8": lambda: attend(128, 32, 8, E4M3, deterministic=True),
    "rows": lambda: rows(4096, 14336, 32, 8, 128),
    "sample": lambda: sample(128_256),
    "experts": lambda: mixture(2048, 1024, 256, 4, scoring="sigmoid", groups=8, groups_used=4, group_score="top2"),
    "many rows": lambda: mixture(2048, 1024, 256, 64),
    "adapters": lambda: adapters(4096, 16),
    "products": lambda: products(4096, 14336, 16),
}
ALL_BUT_ATTENTION = ["rows", "sample", "experts", "adapters", "products"]
FEW = {
    "cuda:80": ["D 128", *ALL_BUT_ATTENTION],
    "cuda:90": ["fp8", *ALL_BUT_ATTENTION],
    "cuda:100": ["deterministic 128", *ALL_BUT_ATTENTION],
    "hip:gfx942": ["latent", *ALL_BUT_ATTENTION],
}
"""What is compiled unless all is asked for: each kernel for each GPU, of attention's kinds, whose registers are scarcest, one."""


def steps(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The same kinds of work, of sizes that have nothing in common: (kind, launchers to run)."""
    counts = (1, 2, 3) if small else (16, 32, 48, 97)
    for n in counts:
        yield "decode", lambda n=n: decode([(300 + n, 1)] * n)
        yield "long decode", lambda n=n: decode([(4000 * n, 1), *[(9, 1)] * (n - 1)])
        yield "drafts", lambda n=n: decode([(700 * n, 2), *[(9, 1)] * (n - 1)])
        yield "prefill", lambda n=n: decode([(100 * n, 100)] * n)
        yield "rows", lambda n=n: of_rows(n)
        yield "few experts", lambda n=n: mixture(256, 128, 16, min(n, 16))


def decode(parts: list[tuple[int, int]]) -> None:
    step, keys = ragged(parts), cache(8, 128, BF16)
    attention_triton.attention(torch.zeros(len(step.positions), 32, 128, dtype=BF16), keys, keys, step, scale=0.1)


def of_rows(n: int) -> None:
    x, weight = torch.zeros(n, 256, dtype=BF16), torch.zeros(256, dtype=BF16)
    norm_triton.add_rms_norm(x, x, weight, 1e-5)
    norm_triton.rms_norm(torch.zeros(n, 4, 128, dtype=BF16), weight[:128], 1e-5)
    activation_triton.gated(x, "silu")
    whole = torch.zeros(n, dtype=torch.int64)
    embedding_triton.embed(whole, torch.zeros(4, 256, dtype=BF16))
    blocks_triton.gather_blocks(torch.zeros(2, 4, 4096, dtype=torch.uint8), whole)
    heads, kv = torch.zeros(n, 12, 64, dtype=BF16).split_with_sizes([8, 4], 1)
    angles = torch.zeros(n, 1, 64, dtype=BF16), torch.zeros(n, 1, 64, dtype=BF16)
    rope_triton.rotate(heads, angles)
    cache_triton.write(kv, kv, cache(4, 64, BF16), cache(4, 64, BF16), ragged([(9, 1)] * n))
    logits, ones = torch.zeros(n, 2048), torch.ones(n)
    sample_triton.draw(logits, ones.double(), ones, min_p=ones, top_k=whole, top_p=ones, most=1)
    sample_triton.greedy(logits)
    sample_triton.score(logits, whole, 1)
    counts = torch.zeros(n, 2048, dtype=torch.int32)
    sample_triton.penalise(logits, counts, counts.bool(), repetition=ones, presence=ones, frequency=ones)
    bitmask_triton.allow(logits, whole, torch.zeros(n, 64, dtype=torch.int32))
    h = lora_triton.shrink(x, torch.zeros(8, 16, 256, dtype=BF16), whole)
    lora_triton.expand(h, torch.zeros(8, 256, 16, dtype=BF16), whole, torch.ones(8), x)
    linear_triton.linear(x, torch.zeros(64, 256, dtype=BF16))
    linear_triton.linear_heads(torch.zeros(n, 4, 64, dtype=BF16), torch.zeros(4, 32, 64, dtype=BF16))
    norm_triton.sum_of_squares(x)


def variants(small: bool) -> set[str]:
    """What of each kernel would be compiled for these steps: by the types, sizes and constants that it is compiled for."""
    found: set[str] = set()
    now = ""

    def note(self: JITFunction, key: str, *_: Any) -> str:
        found.add(f"{now}: {self.fn.__name__}: {key}")
        return key

    compile_, run = JITFunction._do_compile, JITFunction.run
    JITFunction._do_compile = note
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    try:
        for now, launch in steps(small):  # noqa: B007
            launch()
    finally:
        JITFunction._do_compile, JITFunction.run = compile_, run
    return found


def usage(kernel: Any) -> dict[str, int]:
    """Bytes of stack that a thread spills to, and of memory that a block shares."""
    if "cubin" in kernel.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            call = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
    return {"registers": int(found["vgpr_count"]), "spilled": int(found["vgpr_spill_count"])}


def compiled(name: str) -> Iterator[dict[str, Any]]:
    """What a case launches, compiled."""
    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        CASES[name]()
    finally:
        JITFunction.run = run
    for function, kernel in launched:
        yield {"case": name, "kernel": function, "shared": kernel.metadata.shared, **usage(kernel)}


def main() -> None:
    name, *wanted = sys.argv[1:]
    if wanted == ["variants"]:
        driver.set_active(Driver(name))
        few, many = variants(True), variants(False)
        print(json.dumps({"kernels": len(few), "differ": sorted(few ^ many)}))
        return
    for target, cases in FEW.items() if name == "few" else ((name, wanted or FEW[name]),):
        driver.set_active(Driver(target))
        for case in CASES if cases == ["all"] else cases:
            for line in compiled(case):
                print(json.dumps({"target": target, **line}), flush=True)


if __name__ == "__main__":
    main()
