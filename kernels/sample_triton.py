"""From logits to tokens by Triton: a row's filters and its draw in one kernel, without a sort and without waiting.

What a filter keeps is found by bisection: a float's bits, turned so that they order as integers, are tried from the top one
down. Sums of probabilities are sums of integers (see `WEIGHT_BITS`), so not a bit depends on the order of addition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels import sample as plain
from kvasir.kernels.tile_triton import dense, power_of_two

BLOCK = 4096
DRAW_BLOCK = 2048
"""A draw holds more of each token: twice as many spill registers on sm_80."""
ONE = tl.constexpr(2.0**plain.WEIGHT_BITS)


@triton.jit
def _log_weights(row_ptr, first, vocab, best, temperature, floor, BLOCK: tl.constexpr):
    """(logits - best) / temperature of BLOCK tokens from `first` on; -inf below `floor` and behind the vocabulary."""
    token = first + tl.arange(0, BLOCK)
    x = (tl.load(row_ptr + token, mask=token < vocab, other=-float("inf")).to(tl.float32) - best) / temperature
    return tl.where((x < floor) | (token >= vocab), -float("inf"), x)


@triton.jit
def _ordered(x):
    """Bits that order as the floats do, as int64 in 0..2^32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | -2147483648)
    return bits.to(tl.int64) & 4294967295


@triton.jit
def _value(ordered):
    """The float whose `_ordered` this is."""
    bits = tl.where(ordered >= 2147483648, ordered - 2147483648, 4294967295 - ordered)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _mass(row_ptr, vocab, best, temperature, floor, border, ties, scale, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of exp(x) * scale over all above `border`, and of so many that equal it."""
    total = tl.zeros((BLOCK,), tl.int64 if INTEGER else tl.float32)
    for first in range(0, vocab, BLOCK):
        x = _log_weights(row_ptr, first, vocab, best, temperature, floor, BLOCK)
        weight = tl.where(_ordered(x) > border, tl.exp(x) * scale, 0.0)
        total += weight.to(total.dtype)
    edge = tl.where(ties > 0, tl.exp(_value(border)) * scale, 0.0)
    return tl.sum(total, 0) + edge.to(total.dtype) * ties.to(total.dtype)


@triton.jit
def _count(row_ptr, vocab, best, temperature, floor, border, BLOCK: tl.constexpr):
    """How many are at least `border`."""
    found = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        x = _log_weights(row_ptr, first, vocab, best, temperature, floor, BLOCK)
        token = first + tl.arange(0, BLOCK)
        found += ((_ordered(x) >= border) & (token < vocab)).to(tl.int64)
    return tl.sum(found, 0)


@triton.jit
def _draw(
    logits_ptr, uniforms_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, out_ptr, vocab, logits_row,
    MIN_P: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_row
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        best = tl.maximum(best, x)
    best = tl.max(best, 0)
    temperature = tl.load(temperature_ptr + row)
    floor = best * 0 - float("inf")
    if MIN_P:
        floor = tl.log(tl.load(min_p_ptr + row))
    none = tl.zeros((), tl.int64)
    border, ties = none, none  # all that weigh anything are above
    if TOP_K:
        wanted = tl.load(top_k_ptr + row).to(tl.int64)
        for bit in range(32):
            tried = border | (tl.full((), 2147483648, tl.int64) >> bit)
            border = tl.where(_count(row_ptr, vocab, best, temperature, floor, tried, BLOCK) >= wanted, tried, border)
        ties = wanted - _count(row_ptr, vocab, best, temperature, floor, border + 1, BLOCK)
        ties = tl.where(border == 0, 0, ties)  # more are wanted than there are
    if TOP_P:
        total = _mass(row_ptr, vocab, best, temperature, floor, border, ties, 1.0, False, BLOCK)
        scale = ONE / total
        wanted_mass = (tl.load(top_p_ptr + row).to(tl.float64) * ONE).to(tl.int64)
        edge = none
        for bit in range(32):
            tried = edge | (tl.full((), 2147483648, tl.int64) >> bit)
            above = tl.maximum(tried - 1, border)
            some = tl.where(tried <= border, ties, 0)
            mass = _mass(row_ptr, vocab, best, temperature, floor, above, some, scale, True, BLOCK)
            edge = tl.where(mass >= wanted_mass, tried, edge)
        if edge >= border:
            # enough of those on the edge to reach the mass: at least one
            missing = wanted_mass - _mass(row_ptr, vocab, best, temperature, floor, edge, none, scale, True, BLOCK)
            own = tl.maximum((tl.exp(_value(edge)) * scale).to(tl.int64), 1)
            needed = (missing + own - 1) // own
            ties = tl.where(edge == border, tl.minimum(ties, needed), needed)
            ties = tl.where(edge == 0, 0, ties)
            border = edge
    scale = ONE / _mass(row_ptr, vocab, best, temperature, floor, border, ties, 1.0, False, BLOCK)
    there = _count(row_ptr, vocab, best, temperature, floor, border, BLOCK)
    there -= _count(row_ptr, vocab, best, temperature, floor, border + 1, BLOCK)
    ties = tl.minimum(ties, there)
    total = _mass(row_ptr, vocab, best, temperature, floor, border, ties, scale, True, BLOCK)
    target = (tl.load(uniforms_ptr + row) * total.to(tl.float64)).to(tl.int64)
    before, on_edge, place = none, none, none
    for first in range(0, vocab, BLOCK):
        x = _log_weights(row_ptr, first, vocab, best, temperature, floor, BLOCK)
        ordered = _ordered(x)
        equal = (ordered == border).to(tl.int64)
        kept = (ordered > border) | ((ordered == border) & (on_edge + tl.cumsum(equal, 0) <= ties))
        weight = tl.where(kept, tl.exp(x) * scale, 0.0).to(tl.int64)
        sums = before + tl.cumsum(weight, 0)
        token = first + tl.arange(0, BLOCK)
        place += tl.sum(((sums <= target) & (token < vocab)).to(tl.int64), 0)
        before += tl.sum(weight, 0)
        on_edge += tl.sum(equal, 0)
    tl.store(out_ptr + row, tl.maximum(tl.minimum(place, vocab - 1), 0))


def draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    most: int = 0,
) -> Tensor:
    """As the definition says; of several that are equally likely, the first are kept."""
    assert logits.stride(-1) == 1, "a row lies in one piece"
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(DRAW_BLOCK, power_of_two(vocab, 16))
    if rows:
        _draw[(rows,)](
            logits, *dense(uniforms, temperature, min_p, top_k, top_p), out, vocab, logits.stride(0),
            MIN_P=min_p is not None, TOP_K=top_k is not None, TOP_P=top_p is not None, BLOCK=block, num_warps=16,
        )  # fmt: skip
    return out


@triton.jit
def _greedy(logits_ptr, out_ptr, vocab, logits_row, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_row
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.arange(0, BLOCK)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        where = tl.where(x > best, token, where)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    first_best = tl.min(tl.where(best == top, where, vocab - 1), 0)
    tl.store(out_ptr + row, first_best.to(tl.int64))


def greedy(logits: Tensor) -> Tensor:
    """As the definition says."""
    assert logits.stride(-1) == 1, "a row lies in one piece"
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = min(BLOCK, power_of_two(vocab, 16))
        _greedy[(rows,)](logits, out, vocab, logits.stride(0), BLOCK=block, num_warps=8)
    return out


@triton.jit
def _score(logits_ptr, tokens_ptr, own_ptr, rank_ptr, total_ptr, vocab, logits_row, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_row
    own = tl.load(row_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    rank = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
        top = tl.maximum(best, x)
        safe = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp(best - safe) + tl.exp(x - safe)
        best = top
        rank += (x > own).to(tl.int64)
    top = tl.max(best, 0)
    sum_log = tl.log(tl.sum(total * tl.exp(best - top), 0)) + top
    tl.store(own_ptr + row, own - sum_log)
    tl.store(rank_ptr + row, tl.sum(rank, 0) + 1)
    tl.store(total_ptr + row, sum_log)


def score(logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the definition says; the best are found by torch."""
    assert logits.stride(-1) == 1, "a row lies in one piece"
    rows, vocab = logits.shape
    own, total = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    rank = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(BLOCK, power_of_two(vocab, 16))
    if rows:
        _score[(rows,)](
            logits, tokens.contiguous(), own, rank, total, vocab, logits.stride(0), BLOCK=block, num_warps=8
        )
    top, ids = logits.topk(best)
    return own, rank, ids, top - total[:, None]


@triton.jit
def _penalise(
    logits_ptr, outputs_ptr, prompts_ptr, repetition_ptr, presence_ptr, frequency_ptr, seats_ptr, out_ptr, vocab,
    REPETITION: tl.constexpr, PROMPTS: tl.constexpr, SEATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    at = row.to(tl.int64) * vocab + token
    kept = at
    if SEATS:
        kept = tl.load(seats_ptr + row).to(tl.int64) * vocab + token
    x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(outputs_ptr + kept, mask=inside, other=0)
    if REPETITION:
        seen = count > 0
        if PROMPTS:
            seen = seen | (tl.load(prompts_ptr + kept, mask=inside, other=0) != 0)
        r = tl.load(repetition_ptr + row).to(tl.float32)
        x = tl.where(seen, tl.where(x > 0, x / r, x * r), x)
    x -= tl.load(frequency_ptr + row).to(tl.float32) * count.to(tl.float32)
    x -= tl.load(presence_ptr + row).to(tl.float32) * (count > 0).to(tl.float32)
    tl.store(out_ptr + at, x, mask=inside)


def penalise(
    logits: Tensor,
    outputs: Tensor,
    prompts: Tensor | None,
    *,
    repetition: Tensor | None,
    presence: Tensor,
    frequency: Tensor,
    seats: Tensor | None = None,
) -> Tensor:
    """As the definition says."""
    rows, vocab = logits.shape
    out = logits.new_empty(rows, vocab)
    if rows:
        _penalise[(rows, triton.cdiv(vocab, BLOCK))](
            *dense(logits, outputs, prompts, repetition, presence, frequency, seats), out, vocab,
            REPETITION=repetition is not None, PROMPTS=prompts is not None, SEATS=seats is not None,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return out
