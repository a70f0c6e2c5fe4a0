"""One call of every op of kernels/ for each realistic shape, by everything that can do it; `kernels.py` times them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvasir.engine.memory import available_ram
from kvasir.kernels import huge_pages
from kvasir.kernels.activation import gated, plain
from kvasir.kernels.attention import attention
from kvasir.kernels.bitmask import allow, bar, best_allowed
from kvasir.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from kvasir.kernels.cache import turn_and_write, write
from kvasir.kernels.embedding import embed
from kvasir.kernels.linear import Weight, linear, linear_heads, packed, packed_heads
from kvasir.kernels.lora import expand, shrink
from kvasir.kernels.moe import Routing, experts, route, stacked_experts
from kvasir.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sum_of_squares
from kvasir.kernels.op import Op
from kvasir.kernels.packed_experts import Expert, packed_experts
from kvasir.kernels.quantise import LARGEST, Quantised, quantise
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import rotate
from kvasir.kernels.sample import draw, greedy, penalise, score

BLOCK, DTYPE = 16, torch.bfloat16
ADAPTERS, RANK = 8, 16
PERIOD = (1 << 22) - 3
"""Random numbers repeat themselves after so many, a prime: drawing them took longer than what is measured."""
USED = 0.5
"""Of the memory that is free, for the tensors of a case."""
PATIENCE = 1 << 22
"""Pairs of a query and a key for which plain torch is worth waiting."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Model:
    """hidden, ffn, heads, kv heads, head dim of one rank; experts, how many a row takes; the width of a latent's values."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    experts: int = 0
    taken: int = 0
    latent: int | None = None
    vocab: int = 128_256


MODELS = {
    "tiny": Model(64, 128, 4, 2, 64, 8, 2, vocab=1000),
    "tiny latent": Model(64, 128, 4, 1, 80, latent=64, vocab=1000),
    "125M": Model(576, 1536, 9, 3, 64, vocab=32000),
    "1B": Model(2048, 8192, 32, 8, 64, vocab=32000),
    "8 experts": Model(1024, 1024, 16, 4, 64, 8, 2, vocab=32000),
    "64 experts": Model(1024, 512, 16, 4, 64, 64, 8, vocab=32000),
    "128 experts": Model(2048, 768, 32, 4, 128, 128, 8, vocab=151_936),
    "8B": Model(4096, 14336, 32, 8, 128),
    "70B/TP8": Model(8192, 3584, 8, 1, 128),
    "Mixtral/TP2": Model(4096, 7168, 16, 4, 128, 8, 2, vocab=32000),
    "DeepSeek/TP8": Model(7168, 2048, 16, 1, 576, 32, 8, latent=512, vocab=129_280),
}
Mixes = tuple[tuple[int, int, int], ...]
"""sequences, length, rows of each"""


@dataclass(frozen=True)
class Sizes:
    """Steps that attention is measured on, those of them over caches in 8 bits and other blocks too, and rows of all other
    ops."""

    mixes: Mixes
    kept: Mixes
    rows: tuple[int, ...]
    cached: int = 64 << 20
    """Bytes that some cache may keep: smaller matrices are multiplied one after the other until they are as many."""


LONG = (1, 100_000, 1)
OTHER_BLOCKS = (32, 128, 256)
"""Tokens of a block, besides BLOCK; torch's attention on GPUs takes 256 alone."""
SIZES = {
    "tiny": Sizes(((2, 70, 1), (1, 40, 40)), ((2, 70, 1),), (1, 5), 1),
    "cpu": Sizes(
        ((1, 160, 1), (32, 160, 1), (8, 2000, 1), (8, 8000, 1), (1, 512, 512), LONG),
        ((1, 160, 1), (32, 160, 1), (8, 8000, 1)),
        (1, 8, 32, 512),
    ),
    "cuda": Sizes(
        ((1, 8000, 1), (64, 1000, 1), (64, 8000, 1), (1, 4096, 4096), (1, 16384, 16384), LONG),
        ((64, 8000, 1),),
        (1, 64, 4096),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call by several implementations, and what it must move and do at least."""

    op: str
    shape: str
    ways: dict[str, Run]
    bytes_: float
    operations: float = 0.0
    kind: str = ""
    """Of call, as the op tells them apart; empty: it is no op."""


class Place:
    """Where the tensors of cases lie."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> float:
        """Bytes that a case may take."""
        return USED * (torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else available_ram())

    def holds(self, case: str, size: float) -> bool:
        """Whether a case of so many bytes can be measured here; a line says so where it can't."""
        if size <= (free := self.free()):
            return True
        print(f"left out: {case} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the memory may be taken")
        return False

    def random(self, *shape: int) -> Tensor:
        """On a CPU in huge pages, as the engine's are."""
        if self.device.type == "cuda":
            return torch.randn(shape, device=self.device, dtype=DTYPE)
        flat = huge_pages.empty(size := math.prod(shape), dtype=DTYPE)
        drawn = torch.randn(min(size, PERIOD)).to(DTYPE)
        for begin in range(0, size, PERIOD):
            flat[begin : begin + PERIOD] = drawn[: size - begin]
        return flat.view(shape)

    def ragged(self, sequences: int, length: int, rows: int, block: int = BLOCK) -> Ragged:
        """Blocks in random order, as after hours of service."""
        per = -(-length // block)
        table = torch.randperm(sequences * per).view(sequences, per).int()
        starts = np.arange(sequences + 1, dtype=np.int32) * rows
        lengths = np.full(sequences, length, np.int32)
        positions = torch.arange(length - rows, length).repeat(sequences)
        owner = torch.arange(sequences).repeat_interleave(rows)
        slots = table[owner, positions // block].long() * block + positions % block
        sent = [
            t.to(self.device) for t in (positions, slots, torch.from_numpy(starts), torch.from_numpy(lengths), table)
        ]
        return Ragged(*sent, starts, lengths)

    def caches(self, step: Ragged, model: Model, block: int = BLOCK) -> tuple[Tensor, Tensor | None]:
        """Keys and values, or the keys of a latent alone."""
        shape = step.table.numel(), model.kv_heads, block, model.dim
        keys = self.random(*shape).transpose(1, 2)
        return keys, None if model.latent else self.random(*shape).transpose(1, 2)

    def case(
        self,
        op: Op[..., Any],
        shape: str,
        *args: Any,
        moved: float,
        work: float = 0.0,
        waits: bool = True,
        **options: Any,
    ) -> Case:
        """By all backends that can do it here; by plain torch only if somebody `waits` for it, or there is nothing else."""
        device = self.device.type
        names = [name for name in op.choices(device) if not op.obstacle(name, device, *args, **options)]
        wanted = [name for name in names if name != "plain" or waits or len(names) == 1]
        ways = {name: partial(op.backend(name, device), *args, **options) for name in wanted}
        return Case(op.reference.__name__, shape, ways, moved, work, op.kind(*args, **options))


def attention_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    for mix in sizes.mixes:
        yield from _attention(model, mix, place, [DTYPE])


def cache_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Attention over caches of other types; the floor is what each must read, scales included."""
    for mix in sizes.kept:
        yield from _attention(model, mix, place, [DTYPE, *LARGEST])


def block_size_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Attention over caches in other blocks."""
    for mix in sizes.kept:
        for block in OTHER_BLOCKS:
            yield from _attention(model, mix, place, [DTYPE], block)


def _attention(
    model: Model, mix: tuple[int, int, int], place: Place, kinds: list[torch.dtype], block: int = BLOCK
) -> Iterator[Case]:
    sequences, length, rows = mix
    name = f"{sequences} x {length}, {rows} rows" + (f", blocks of {block}" if block != BLOCK else "")
    heads = sequences * length * model.kv_heads * (1 if model.latent else 2)
    if not place.holds(f"attention, {name}", heads * model.dim * (DTYPE.itemsize + 8 * (len(kinds) > 1))):
        return
    step = place.ragged(*mix, block)
    q = place.random(sequences * rows, model.heads, model.dim)
    k, v = place.caches(step, model, block)
    pairs = sequences * sum(range(length - rows + 1, length + 1))
    work = 2.0 * pairs * model.heads * (model.dim + (model.latent or model.dim))
    waits = pairs < PATIENCE and length * model.heads * model.dim * 16 < place.free()
    for kind in kinds:
        kept = [k, v] if kind == DTYPE else [None if t is None else _quantised(t, kind) for t in (k, v)]
        moved = heads * (model.dim * kind.itemsize + (4 if kind in LARGEST else 0)) + 2.0 * q.nbytes
        said = name if len(kinds) == 1 else f"{name}, {str(kind).removeprefix('torch.')}"
        options = {"scale": model.dim**-0.5, "value_dim": model.latent}
        yield place.case(attention, said, q, *kept, step, moved=moved, work=work, waits=waits, **options)


def _quantised(cache: Tensor, kind: torch.dtype) -> Quantised:
    """Scales lie in memory as the rows do, like the engine's."""
    values, scales = quantise(cache.transpose(1, 2), kind)
    return Quantised(values.transpose(1, 2), scales.transpose(1, 2))


def product_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """torch's, those of weights in the order in which they are served, and those of --deterministic."""
    for outputs, inputs in ((2 * model.ffn, model.hidden), (model.hidden, model.ffn)):
        name = f"{inputs} -> {outputs}"
        count = -(-sizes.cached // (outputs * inputs * DTYPE.itemsize))
        if not place.holds(f"linear, {name}", 4 * count * outputs * inputs * DTYPE.itemsize):
            continue
        weights: list[Tensor] = [place.random(outputs, inputs) for _ in range(count)]
        orders: dict[str, list[Weight]] = {"torch": [*weights]}
        for invariant in (False, True):
            laid = [packed(weight, invariant=invariant) for weight in weights]
            orders.setdefault(_order(laid[0]), laid)
        for rows in sizes.rows:
            x = place.random(rows, inputs)
            ways: dict[str, Run] = {way: partial(_products, x, laid) for way, laid in orders.items()}
            moved = count * (weights[0].nbytes + x.nbytes + rows * outputs * DTYPE.itemsize)
            yield Case("linear", f"{rows} x {name}", ways, moved, 2.0 * rows * count * weights[0].numel())
    if model.latent:
        yield from _head_products(model, sizes, place)


def _order(weight: Weight) -> str:
    """Whose it is."""
    if isinstance(weight, Tensor):
        return "oneDNN" if weight.is_mkldnn else "torch"
    return "native" if hasattr(weight, "blocks") else "triton"


def _products(x: Tensor, weights: list[Weight]) -> list[Tensor]:
    return [linear(x, weight) for weight in weights]


def _head_products(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Into the latent: each head has a matrix of its own."""
    assert model.latent is not None
    weight = place.random(model.heads, model.latent, 128)
    laid = packed_heads(weight, invariant=True)
    for rows in sizes.rows:
        x = place.random(rows, model.heads, 128)
        ways: dict[str, Run] = {"torch": partial(linear_heads, x, weight)}
        if laid is not None:
            ways["native" if hasattr(laid, "blocks") else "triton"] = partial(linear_heads, x, laid)
        moved = weight.nbytes + x.nbytes + rows * model.heads * model.latent * DTYPE.itemsize
        yield Case("linear_heads", f"{rows} x {model.heads} heads", ways, moved, 2.0 * rows * weight.numel())


def expert_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    if not model.experts:
        return
    size, chosen = 3 * model.ffn * model.hidden, Routing(model.taken)
    what = f"{model.taken} of {model.experts}"
    if not place.holds(f"experts, {what}", model.experts * size * DTYPE.itemsize * 2.2):
        return
    up = place.random(model.experts, 2 * model.ffn, model.hidden).div_(model.hidden**0.5)
    down = place.random(model.experts, model.hidden, model.ffn).div_(model.ffn**0.5)
    together = _together(up, down) if place.device.type == "cpu" else {}
    for rows in sizes.rows:
        logits = torch.randn(rows, model.experts, device=place.device)
        yield place.case(route, f"{rows} x {what}", logits, chosen, moved=logits.nbytes)
        index, weight = route.reference(logits, chosen)
        x = place.random(rows, model.hidden)
        moved = len(index.unique()) * size * DTYPE.itemsize + 2.0 * x.nbytes
        work = 2.0 * rows * model.taken * size
        shape = f"{rows} rows, {what}, {model.hidden} -> {model.ffn}"
        given = x, index, weight
        case = place.case(stacked_experts, shape, *given, up, down, moved=moved, work=work, activation="silu")
        ways = {way: partial(run, *given) for way, run in together.items()}
        yield replace(case, ways=ways | case.ways)


def _together(up: Tensor, down: Tensor) -> dict[str, Callable[..., Tensor]]:
    """How a CPU multiplies experts in their own order: in one call where it can, and one by one."""
    room = huge_pages.Room()
    ours = [Expert(packed(u, room=room), None, packed(d, room=room), None) for u, d in zip(up, down, strict=True)]

    def run(number: int, rows: Tensor) -> Tensor:
        return linear(gated(linear(rows, ours[number].up), "silu"), ours[number].down)

    ways: dict[str, Callable[..., Tensor]] = {"one by one": lambda *given: experts(*given, run)}
    whole = packed_experts(ours, activation="silu", limit=None, gate=True, first=0)
    return ways if whole is None else {"native": partial(whole, on_input=False), **ways}


def row_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """Norms, activations, embedding, rotation, writing to the cache."""
    hidden, ffn, heads, kv_heads, dim = model.hidden, model.ffn, model.heads, model.kv_heads, model.dim
    weight, table = place.random(hidden), place.random(vocab := min(model.vocab, 32000), hidden)
    for rows in sizes.rows:
        case, shape = place.case, f"{rows} x {hidden}"
        x, y = place.random(2, rows, hidden)
        wide, tokens = place.random(rows, 2 * ffn), torch.randint(vocab, (rows,), device=place.device)
        yield case(rms_norm, shape, x, weight, 1e-5, moved=2 * x.nbytes)
        yield case(add_rms_norm, shape, x, y, weight, 1e-5, moved=4 * x.nbytes)
        yield case(layer_norm, shape, x, weight, weight, 1e-5, moved=2 * x.nbytes)
        yield case(add_layer_norm, shape, x, y, weight, weight, 1e-5, moved=4 * x.nbytes)
        yield case(sum_of_squares, shape, x, moved=x.nbytes)
        yield case(embed, shape, tokens, table, moved=2 * x.nbytes)
        yield case(gated, f"{rows} x {ffn}", wide, "silu", moved=1.5 * wide.nbytes)
        yield case(plain, f"{rows} x {2 * ffn}", wide, "gelu", moved=2 * wide.nbytes)
        step = place.ragged(rows, 160, 1)
        k_cache, v_cache = place.caches(step, model)
        turned = dim - (model.latent or 0)  # a latent carries its position beside it
        angles = tuple(torch.full((rows, 1, turned), on, dtype=DTYPE, device=place.device) for on in (1.0, 0.0))
        parts = place.random(rows, heads + 2 * kv_heads, dim).split_with_sizes([heads, kv_heads, kv_heads], 1)
        q, k, v = parts
        kept = rows * kv_heads * dim * DTYPE.itemsize * (1 if model.latent else 2)
        part = q[..., dim - turned :]
        yield case(rotate, f"{rows} x {heads} heads of {turned}", part, angles, moved=2 * part.numel() * DTYPE.itemsize)
        given = k, None if model.latent else v, k_cache, v_cache, step
        yield case(write, f"{rows} x {kv_heads} heads", *given, moved=2 * kept)
        if not model.latent:
            given = *parts, angles, k_cache, v_cache, step
            moved = 2 * (kept + rows * heads * dim * DTYPE.itemsize)
            shape = f"{rows} x {heads} + 2 x {kv_heads} heads"
            yield case(turn_and_write, shape, *given, moved=moved, interleaved=False)


def sampling_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    for rows in (count for count in sizes.rows if count <= 64):  # sequences, not tokens of a prompt
        device, case, shape = place.device, place.case, f"{rows} x {model.vocab}"
        logits, ones = torch.randn(rows, model.vocab, device=device), torch.ones(rows, device=device)
        uniforms = torch.rand(rows, dtype=torch.float64, device=device)
        moved = logits.nbytes
        yield case(greedy, shape, logits, moved=moved)
        yield case(draw, shape, logits, uniforms, ones, moved=moved)
        yield case(draw, f"{shape}, top-p", logits, uniforms, ones, moved=moved, top_p=ones * 0.9)
        fifty = torch.full((rows,), 50, device=device)
        yield case(draw, f"{shape}, top-k", logits, uniforms, ones, moved=moved, top_k=fifty, most=50)
        yield case(score, shape, logits, logits.argmax(-1), 5, moved=moved)
        counts = torch.zeros(rows, model.vocab, dtype=torch.int32, device=device)
        penalties = {"repetition": ones * 1.1, "presence": ones, "frequency": ones}
        seen = counts.bool()
        yield case(penalise, shape, logits, counts, seen, moved=2 * moved + counts.nbytes + seen.nbytes, **penalties)
        words = (rows, -(-model.vocab // 32))
        mask = torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, device=device)
        every = torch.arange(rows, device=device)
        yield case(allow, shape, logits, every, mask, moved=2 * moved + mask.nbytes)
        yield case(best_allowed, shape, logits, every, mask, moved=moved + mask.nbytes)
        yield case(bar, shape, logits.clone(), every, mask, moved=2 * moved + mask.nbytes)


def adapter_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """A mix of adapters in every step."""
    down, up = place.random(ADAPTERS, RANK, model.hidden), place.random(ADAPTERS, model.hidden, RANK)
    scales = torch.ones(ADAPTERS, device=place.device)
    for rows in sizes.rows:
        shape, which = f"{rows} rows, {ADAPTERS} adapters of {RANK}", torch.arange(rows, device=place.device) % ADAPTERS
        x, out = place.random(2, rows, model.hidden)
        read = min(rows, ADAPTERS) * RANK * model.hidden * DTYPE.itemsize
        yield place.case(shrink, shape, x, down, which, moved=x.nbytes + read)
        h = torch.randn(rows, RANK, device=place.device)
        yield place.case(expand, shape, h, up, which, scales, out, moved=2 * out.nbytes + read)


def block_cases(model: Model, sizes: Sizes, place: Place) -> Iterator[Case]:
    """The blocks of 16 layers, one in four of them; keys and values of a layer are a chunk each."""
    chunks, blocks = 16 * (1 if model.latent else 2), 64
    width = BLOCK * model.kv_heads * model.dim * DTYPE.itemsize
    cache = place.random(chunks, blocks, width // DTYPE.itemsize).view(torch.uint8)
    index = torch.randperm(blocks, device=place.device)
    some, others = index[: blocks // 4], index[blocks // 2 : blocks // 2 + blocks // 4]
    held = gather_blocks(cache, some)
    shape, moved = f"{len(some)} blocks, {chunks} x {width} bytes", 2.0 * held.nbytes
    yield place.case(gather_blocks, shape, cache, some, moved=moved)
    yield place.case(scatter_blocks, shape, cache, some, held, moved=moved)
    yield place.case(copy_blocks, shape, cache, some, others, moved=moved)


FAMILIES: dict[str, Callable[[Model, Sizes, Place], Iterator[Case]]] = {
    "attention": attention_cases,
    "linear": product_cases,
    "experts": expert_cases,
    "caches": cache_cases,
    "block sizes": block_size_cases,
    "rows": row_cases,
    "sampling": sampling_cases,
    "adapters": adapter_cases,
    "blocks": block_cases,
}
"""What matters most comes first: a run may have to end before all are measured."""


def cases(family: str, model: str, place: Place) -> Iterator[Case]:
    """Tensors are made as a case is reached, and may go with it."""
    sizes = SIZES["tiny" if model.startswith("tiny") else place.device.type]
    return FAMILIES[family](MODELS[model], sizes, place)
