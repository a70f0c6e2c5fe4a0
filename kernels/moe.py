"""Mixture of experts: who computes which row (Shazeer et al. 2017, arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.activation import gated, plain
from kvasir.kernels.groups import few_rows
from kvasir.kernels.op import op


@dataclass(frozen=True)
class Routing:
    """How a router's logits choose experts, and weigh them."""

    per_token: int
    scoring: str = "softmax"
    """Or sigmoid, or sparsemixer, which knows no more than `per_token` and `jitter`."""
    renormalise: bool = True
    """The chosen scores are divided by their sum."""
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    """Only experts of the best groups are chosen, which the best expert decides, or the sum of the best two (top2)."""
    group_score: str = "max"
    jitter: float = 0.01

    def check(self, count: int) -> None:
        """ValueError if `count` experts can't be chosen from like this."""
        if not 0 < self.per_token <= count:
            raise ValueError(f"{self.per_token} of {count} experts can't be chosen")
        scored = 1 if self.group_score == "max" else 2
        fits = count % self.groups == 0 and count >= scored * self.groups and 0 < self.groups_used <= self.groups
        if self.groups > 1 and not fits:
            raise ValueError(
                f"{count} experts in {self.groups} groups, of which the best {self.groups_used} are chosen by "
                f"{self.group_score}"
            )


@op("native", "triton")
def route(logits: Tensor, routing: Routing, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits[T, E] of a router -> the chosen experts' index[T, k] and weight[T, k] float32, the best first, the first of
    equals. choice_bias[E] decides who is chosen, but not how much it counts.

    In float64, so that no rounding of a softmax or sigmoid decides who is chosen. ValueError as of `Routing.check`.
    """
    routing.check(logits.shape[1])
    scores = logits.double()
    if routing.scoring == "sparsemixer":
        return _sparsemixer(scores, routing)
    scores = scores.softmax(-1) if routing.scoring == "softmax" else scores.sigmoid()
    choice = scores if choice_bias is None else scores + choice_bias
    if routing.groups > 1:
        choice = _best_groups(choice, routing.groups, routing.groups_used, routing.group_score)
    index = choice.sort(dim=-1, descending=True, stable=True)[1][:, : routing.per_token]
    weight = scores.gather(-1, index)
    if routing.renormalise:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return index, (weight * routing.scale).float()


def _best_groups(choice: Tensor, groups: int, used: int, score: str) -> Tensor:
    """choice[T, E] with 0 for the experts of all groups but the best (DeepSeek-V2, arXiv:2405.04434, 2.2.2)."""
    grouped = choice.view(len(choice), groups, choice.shape[1] // groups)
    best = grouped.amax(-1) if score == "max" else grouped.topk(2, -1)[0].sum(-1)
    chosen = best.sort(dim=-1, descending=True, stable=True)[1][:, :used]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~kept[..., None], 0.0).flatten(1)


def _sparsemixer(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The best, each weighed among those experts that come close to it (arXiv:2310.00811)."""
    indices, weights = [], []
    for _ in range(routing.per_token):
        best, index = logits.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * routing.jitter
        weights.append(logits.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
        indices.append(index)
        logits = logits.scatter(-1, index, -torch.inf)
    return torch.cat(indices, -1), torch.cat(weights, -1).float()


def experts(
    x: Tensor, index: Tensor, weight: Tensor, run: Callable[[int, Tensor], Tensor | None], *, on_input: bool = False
) -> Tensor:
    """Sum over k of weight[T, k] times expert index[T, k] of x[T, M] -> [T, M]; `run(e, rows)` is expert e, None where it
    adds nothing because it lives elsewhere.

    Each expert runs once, over all of its rows. A row's k results are added in the order of `index`, whatever the batch.
    """
    if not len(x):  # a chunk of a prompt of which no row's logits are wanted
        return x
    k = index.shape[1]
    flat, weight = index.flatten(), weight.to(x.dtype)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat).tolist()
    rows = x[order // k]
    if on_input:
        rows = rows * weight.flatten()[order, None]
    parts = [_run(run, e, part) for e, part in enumerate(torch.split(rows, counts)) if len(part)]
    out = torch.empty_like(rows).index_copy_(0, order, torch.cat(parts)).view(len(x), k, -1)
    if on_input:
        return out.sum(1)
    return (out * weight[..., None]).sum(1)


def _run(run: Callable[[int, Tensor], Tensor | None], expert: int, rows: Tensor) -> Tensor:
    found = run(expert, rows)
    return torch.zeros_like(rows) if found is None else found


def _few(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, *_: Any, **__: Any) -> bool:
    return few_rows(index.numel(), len(up))


@op("triton", "torch", few=_few)
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
    """`experts` whose matrices lie stacked: up[E, 2 F, M] (gate and up; [E, F, M] without a gate), down[E, M, F].

    They are the experts first..first + E - 1; those that live elsewhere add nothing.
    """

    def run(expert: int, rows: Tensor) -> Tensor | None:
        own = expert - first
        if not 0 <= own < len(up):
            return None
        y = F.linear(rows, up[own], None if up_bias is None else up_bias[own])
        y = gated(y, activation, limit) if gate else plain(y, activation)
        return F.linear(y, down[own], None if down_bias is None else down_bias[own])

    return experts(x, index, weight, run, on_input=on_input)
