"""What an engine makes of the machine: prefill and decode over batches and contexts, as shares of what the ceilings of the same
run allow. `engine.py --sweep` runs it.

A step reads its weights once (of a mixture's experts as many as so many rows are expected to choose) and the keys and values
of its contexts, and computes what its rows meet: the larger of bytes over bandwidth and operations over rate is its floor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ceilings import ceilings, gpu_ceilings
from checkpoint import COMMON, SHAPES
from decoder import fastest

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.share import head_cost, layer_cost
from kvasir.engine.spec import Layer, Spec

if TYPE_CHECKING:
    from engine import Bench

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "max_position_embeddings": 16_384,
            "tie_word_embeddings": False}  # fmt: skip
RANDOM = {name: COMMON | shape for name, shape in (SHAPES | {"8B": LLAMA_8B}).items()}
"""config.json of models whose weights are drawn here, and written nowhere."""
TITLES = "{:>12} {:>5} {:>7} | {:>9} {:>6} | {:>9} {:>6} | {:>8} {:>8} | {:>7} {:>8}"
HEAD = TITLES.format(
    "model", "batch", "context", "prefill", "share", "decode", "share", "ms, p50", "p99", "GB/s", "TFLOP/s"
)
LINE = "{:>12} {:5} {:7} | {:9.1f} {:6.0%} | {:9.1f} {:6.0%} | {:8.2f} {:8.2f} | {:7.1f} {:8.2f}"


@dataclass(frozen=True)
class Work:
    """What must be done at least."""

    bytes_: float
    operations: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        return max(self.bytes_ / bandwidth, self.operations / rate)


@dataclass(frozen=True)
class Found:
    """Tokens per second, shares of the floors, a decoding step in seconds, and bytes and operations per second beside it."""

    model: str
    batch: int
    context: int
    prefill: float
    prefill_share: float
    decode: float
    decode_share: float
    p50: float
    p99: float
    bandwidth: float
    rate: float


def decoding(spec: Spec, dtype: torch.dtype, kept: torch.dtype, batch: int, length: int) -> Work:
    """Of one step of `batch` sequences of so many tokens."""
    read, met = _matrices(spec, batch)
    head, contexts = head_cost(spec), sum(min(length, _reach(layer, length)) for layer in spec.layers)
    moved = (read + head) * dtype.itemsize + batch * contexts * KVCache.block_bytes(spec, 1, kept, 1)
    return Work(moved, batch * (2.0 * (met + head) + _pair(spec) * contexts))


def prefilling(spec: Spec, dtype: torch.dtype, kept: torch.dtype, batch: int, length: int) -> Work:
    """Of `batch` prompts of so many tokens, the last of which is sampled from."""
    read, met = _matrices(spec, batch * length)
    head, pairs = head_cost(spec), sum(_pairs(length, _reach(layer, length)) for layer in spec.layers)
    written = batch * length * len(spec.layers) * KVCache.block_bytes(spec, 1, kept, 1)
    work = batch * (2.0 * met * length + 2.0 * head + _pair(spec) * pairs)
    return Work((read + head) * dtype.itemsize + written, work)


def _matrices(spec: Spec, rows: int) -> tuple[float, float]:
    """(numbers that a step of so many rows reads, those that each row meets) of all layers."""
    read = met = 0.0
    for number, layer in enumerate(spec.layers):
        own = layer_cost(spec, number)
        read, met = read + own, met + own
        if layer.experts and (facts := spec.experts) is not None:
            chosen = facts.count * (1 - (1 - facts.per_token / facts.count) ** rows)
            read += (3 if spec.gated else 2) * spec.hidden * facts.ffn * (chosen - facts.per_token)
    return read, met


def _reach(layer: Layer, length: int) -> int:
    """Tokens that a row sees at most."""
    return min(length, layer.window or length, layer.chunk or length)


def _pairs(length: int, reach: int) -> float:
    """Of a query and a key that it sees."""
    return reach * (reach + 1) / 2 + (length - reach) * reach


def _pair(spec: Spec) -> float:
    """Operations of a pair in one layer."""
    return 2.0 * spec.heads * (spec.key_dim + (spec.latent.kv_rank if spec.latent else spec.value_dim))


@contextmanager
def chosen(name: str, args: argparse.Namespace) -> Iterator[EngineConfig]:
    """A random shape, or a real model."""
    longest = max(args.contexts) + args.outputs + 1
    facts = {"device": args.device, "max_num_seqs": max(args.batch), "max_model_len": longest}
    facts |= {"num_threads": args.threads, "max_num_batched_tokens": args.budget, "dtype": args.dtype or "auto"}
    if name not in RANDOM:
        yield EngineConfig(model=name, **facts)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = RANDOM[name] | {"max_position_embeddings": max(longest, RANDOM[name]["max_position_embeddings"])}
        Path(folder, "config.json").write_text(json.dumps(config))
        yield EngineConfig(model=folder, load_format="dummy", skip_tokenizer_init=True, **facts)


def sweep(
    bench: Callable[[EngineConfig], Bench], draw: Callable[..., list[list[int]]], args: argparse.Namespace
) -> None:
    """A line for each batch and context; what doesn't fit into the cache is left out, and said so."""
    limits, found = gpu_ceilings if args.device == "cuda" else ceilings, list[Found]()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"torch {torch.__version__}, {where}, {args.outputs} tokens decoded, tok/s\n{HEAD}")
    for name in args.sweep:
        with chosen(name, args) as config:
            running = bench(config)
            info, loaded = running.engine.info, running.engine._executor.loaded
            spec, dtype, kept = loaded.decoder.spec, loaded.decoder.dtype, loaded.cache.dtype
            running.run(draw(1, 16, info.vocab_size), 1)
            for context in args.contexts:
                for batch in args.batch:
                    if batch * -(-(context + args.outputs + 1) // info.block_size) > info.num_blocks:
                        print(
                            f"left out: {batch} x {context}, the cache holds {info.num_blocks * info.block_size} tokens"
                        )
                        continue
                    before, prompts = limits(), draw(batch, context, info.vocab_size)
                    speed, _ = fastest([running.run(prompts, args.outputs) for _ in range(args.repeat)])
                    bandwidth, rate = (sum(pair) / 2 for pair in zip(before, limits(), strict=True))
                    form = spec, dtype, kept, batch
                    begun = prefilling(*form, context).seconds(bandwidth, rate)
                    step = decoding(*form, context + args.outputs // 2).seconds(bandwidth, rate)
                    line = Found(
                        name, batch, context, speed.prefill, begun * speed.prefill / (batch * context),
                        speed.decode, step * speed.decode / batch, *speed.late(), bandwidth, rate,
                    )  # fmt: skip
                    found.append(line)
                    scaled = line.p50 * 1e3, line.p99 * 1e3, bandwidth / 1e9, rate / 1e12
                    print(LINE.format(Path(name).name, *list(asdict(line).values())[1:7], *scaled), flush=True)
                    if args.json:  # whoever stops this keeps what was measured
                        args.json.write_text(json.dumps([asdict(line) for line in found], indent=1))
            running.engine.shutdown()
