"""Greedy and random choice without torch's argmax and sort of whole vocabularies, which are slow on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels import sample as reference
from kvasir.kernels.sample import choose, tempered

FEW = 256
"""Candidates that are looked at first: a top_p set is rarely larger. Measured on 128,256 logits a row, one Zen 5 core:
topk of 256 0.5 ms, of 1024 1.5 ms, a sort 20 ms."""
MARGIN = 1e-6
"""A sum of float32 probabilities may be off by this."""


def greedy(logits: Tensor) -> Tensor:
    """As the definition. numpy's argmax is vectorised and takes the first of several."""
    return torch.from_numpy(logits.numpy().argmax(-1))


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
    """As the definition, but for top_p alone only rows whose set is larger than a few candidates are sorted."""
    if top_k is not None or top_p is None or logits.shape[-1] <= FEW:
        return reference.draw.reference(logits, uniforms, temperature, min_p=min_p, top_k=top_k, top_p=top_p, most=most)
    x = tempered(logits, temperature, min_p)
    values, ids = x.topk(FEW)
    reached = x.log_softmax(-1).gather(-1, ids).double().exp().sum(-1)  # no logsumexp: see `sample.score`
    tokens = choose(values, ids, uniforms, None, top_p / reached)  # `choose` takes the candidates' sum for 1
    wide = (reached < top_p + MARGIN).nonzero()[:, 0]
    if len(wide):
        values, ids = x[wide].sort(-1, descending=True)
        tokens[wide] = choose(values, ids, uniforms[wide], None, top_p[wide])
    return tokens
