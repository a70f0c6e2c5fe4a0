"""The choice of experts by compiled code (route_cpu.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvasir.kernels import moe as plain
from kvasir.kernels.moe import Routing
from kvasir.kernels.native import TYPES, library

SCORINGS = {"softmax": 0, "sigmoid": 1, "sparsemixer": 2}
P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class RoutingC(ctypes.Structure):
    """How a router's logits choose (mixture.h)."""

    _fields_ = (
        *((name, N) for name in ("count", "per_token", "scoring", "renormalise", "groups", "groups_used", "best_two")),
        *((name, F) for name in ("scale", "jitter")),
        ("bias", P),
    )


def routing_of(routing: Routing, count: int, choice_bias: Tensor | None) -> RoutingC:
    """As the compiled code takes it, for so many experts; choice_bias[E] in float32 must stay where it is. ValueError names
    what doesn't fit: the code reads what it is told is there."""
    r, best_two = routing, routing.group_score != "max"
    r.check(count)
    fits = choice_bias is None or (choice_bias.shape == (count,) and choice_bias.dtype == torch.float32)
    if choice_bias is not None and not (fits and choice_bias.is_contiguous()):
        raise ValueError(f"choice_bias{list(choice_bias.shape)} in {choice_bias.dtype} for {count} experts")
    numbers = (count, r.per_token, SCORINGS[r.scoring], r.renormalise, r.groups, r.groups_used, best_two)
    return RoutingC(*numbers, r.scale, r.jitter, None if choice_bias is None else choice_bias.data_ptr())


def route(logits: Tensor, routing: Routing, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the definition says."""
    compiled = library()
    if compiled is None or logits.dtype not in TYPES:
        return plain.route.reference(logits, routing, choice_bias)
    rows, count = logits.shape
    logits = logits.float().contiguous()
    bias = None if choice_bias is None else choice_bias.float().contiguous()
    facts = routing_of(routing, count, bias)
    index = torch.empty(rows, routing.per_token, dtype=torch.int64)
    weight = torch.empty(rows, routing.per_token)
    threads = torch.get_num_threads()
    compiled.route(ctypes.addressof(facts), logits.data_ptr(), index.data_ptr(), weight.data_ptr(), rows, threads)
    return index, weight
