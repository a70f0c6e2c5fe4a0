"""Mixture of experts by Triton: the choice in one kernel, experts as two grouped products (Gale et al. 2022, arXiv:2211.15841)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels import moe as plain
from kvasir.kernels.activation import gated
from kvasir.kernels.activation import plain as ungated
from kvasir.kernels.grouped_triton import grouped
from kvasir.kernels.groups import Groups
from kvasir.kernels.moe import Routing
from kvasir.kernels.tile_triton import dense, power_of_two

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For results of size 1 to 4: products are added up in another order."""
BLOCK = 1024
"""Numbers of a row that one program adds up."""


@triton.jit
def _route(
    logits_ptr, bias_ptr, index_ptr, weight_ptr, scale,
    E: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr, KEPT: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, USED: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """One row. The best of what is left is taken, again and again; the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
    if SOFTMAX:
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = 1 / (1 + tl.exp(-x))
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    if GROUPS > 1:
        grouped = tl.reshape(choice, (GROUPS, BLOCK // GROUPS))
        best = tl.max(grouped, 1)
        if TOP2:
            place = tl.argmax(grouped, 1, tie_break_left=True)
            number = tl.arange(0, BLOCK // GROUPS)[None, :]
            best += tl.max(tl.where(number == place[:, None], -float("inf"), grouped), 1)
        g = tl.arange(0, GROUPS)
        kept = tl.zeros((GROUPS,), tl.int32)
        for _ in tl.static_range(USED):
            taken = tl.argmax(best, 0, tie_break_left=True)
            kept = tl.where(g == taken, 1, kept)
            best = tl.where(g == taken, -float("inf"), best)
        grouped = tl.where(kept[:, None] == 1, grouped, 0.0)
        choice = tl.reshape(grouped, (BLOCK,))
    choice = tl.where(e < E, choice, -float("inf"))
    k = tl.arange(0, KEPT)
    index = tl.zeros((KEPT,), tl.int32)
    weight = tl.zeros((KEPT,), tl.float32)
    for i in tl.static_range(CHOSEN):
        taken = tl.argmax(choice, 0, tie_break_left=True)
        index = tl.where(k == i, taken, index)
        weight = tl.where(k == i, tl.sum(tl.where(e == taken, scores, 0.0), 0), weight)
        choice = tl.where(e == taken, -float("inf"), choice)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(index_ptr + row * CHOSEN + k, index.to(tl.int64), mask=k < CHOSEN)
    tl.store(weight_ptr + row * CHOSEN + k, weight * scale, mask=k < CHOSEN)


@triton.jit
def _combine(parts_ptr, out_ptr, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of the sum of a row's COUNT parts, one part after the other."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(COUNT):
        at = parts_ptr + (row * COUNT + i) * width + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def route(logits: Tensor, routing: Routing, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the definition says, but in float32, which may take scores for equal that aren't; sparsemixer, and groups of which
    there aren't powers of two, are left to torch."""
    rows, count = logits.shape
    routing.check(count)
    r, block = routing, power_of_two(count, 16)
    odd = r.groups > 1 and (block != count or r.groups & (r.groups - 1))
    if r.scoring == "sparsemixer" or odd:
        return plain.route.reference(logits, routing, choice_bias)
    index = torch.empty(rows, r.per_token, dtype=torch.int64, device=logits.device)
    weight = torch.empty(rows, r.per_token, dtype=torch.float32, device=logits.device)
    if rows:
        _route[(rows,)](
            *dense(logits, choice_bias), index, weight, r.scale, E=count, BLOCK=block, CHOSEN=r.per_token,
            KEPT=power_of_two(r.per_token), SOFTMAX=r.scoring == "softmax", RENORMALISE=r.renormalise,
            BIAS=choice_bias is not None, GROUPS=r.groups, USED=r.groups_used, TOP2=r.group_score != "max", num_warps=1,
        )  # fmt: skip
    return index, weight


def stacked_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    limit: float | None = None,
    gate: bool = True,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    on_input: bool = False,
    first: int = 0,
    deterministic: bool = False,
) -> Tensor:
    """As the definition says."""
    rows, k = index.shape
    if not rows:
        return x
    groups = Groups.of(index.flatten() - first, len(up))
    factors = weight.to(x.dtype).flatten()
    h = x.new_empty(rows * k, up.shape[1])
    grouped(
        x, up, groups, h, bias=up_bias, divide=k, scatter=False, factors=factors if on_input else None,
        on_input=on_input, deterministic=deterministic,
    )  # fmt: skip
    h = gated(h, activation, limit) if gate else ungated(h, activation)
    out = x.new_zeros(rows * k, down.shape[1])
    grouped(
        h, down, groups, out, bias=down_bias, gather=False, factors=None if on_input else factors,
        deterministic=deterministic,
    )  # fmt: skip
    total = x.new_empty(rows, down.shape[1])
    _combine[(rows, triton.cdiv(down.shape[1], BLOCK))](out, total, down.shape[1], COUNT=k, BLOCK=BLOCK)
    return total
