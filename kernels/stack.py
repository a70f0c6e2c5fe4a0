"""Consecutive layers of the commonest kind as one compiled call (stack_cpu.cpp): RMSNorm, attention, RMSNorm, and a gated MLP
or a mixture of them.

With few rows the Python between two operators takes longer than the operators: 30 layers of a 125M model for one row took
6 of 14 ms on one Zen 5 core. The operators are those that are called one by one otherwise, so not a bit of a result changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.kernels.activation_native import limit_of
from kvasir.kernels.linear import Product, ProductC, product_of
from kvasir.kernels.native import TYPES, CacheC, cache_of, library
from kvasir.kernels.node_sums import Meeting, check
from kvasir.kernels.packed_mixture import PackedMixture
from kvasir.kernels.quantise import Cache
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles

MOST_ROWS = 64
"""Beyond this the operators take longer than what is between them."""
P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class LayerC(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, ProductC) for name in ("qkv", "o", "up", "down")),
        ("mixture", P),
        ("cache", CacheC),
        *((name, P) for name in ("sinks", "slopes")),
        *((name, N) for name in ("window", "chunk", "rope", "interleaved", "group")),
    )


class ShapeC(ctypes.Structure):
    _fields_ = (
        *((name, N) for name in ("hidden", "ffn", "heads", "kv_heads", "dim", "gate", "causal")),
        *((name, F) for name in ("eps", "offset", "residual", "scale", "softcap", "limit")),
    )


class AnglesC(ctypes.Structure):
    _fields_ = (("cos", P), ("sin", P), ("turned", N))


class GroupC(ctypes.Structure):
    _fields_ = (("table", P), ("table_row", N), ("slots", P))


class StepC(ctypes.Structure):
    _fields_ = (("rows", N), ("sequences", N), ("starts", P), ("lengths", P), ("angles", P), ("groups", P))


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer reads. Norms are [M] or [D]; caches [N, P, K, D]; sinks and slopes float32. With a mixture there is no up
    and down."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Product
    o: Product
    up: Product | None
    down: Product | None
    mixture: PackedMixture | None
    k_cache: Cache
    v_cache: Cache
    sinks: Tensor | None
    slopes: Tensor | None
    window: int | None
    chunk: int | None
    rope: int
    """Which of a step's angles."""
    interleaved: bool
    group: int
    """Of layers that share their blocks."""


@dataclass(frozen=True)
class Shape:
    """What all layers have in common."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    gate: int
    causal: bool
    eps: float
    offset: float
    residual: float
    scale: float
    softcap: float | None
    limit: float | None


class Stack:
    """Layers that are called together; what they read must stay where it is. With a `meeting` they are a rank's part of
    each, and what the ranks of a node have to add up goes through it."""

    def __init__(self, layers: Sequence[Layer], shape: Shape, meeting: Meeting | None = None) -> None:
        compiled = library()
        assert compiled is not None
        self._compiled, self._layers, self._meeting = compiled, layers, meeting
        self._table = (LayerC * len(layers))(*map(_layer, layers))
        s = shape
        common = (s.hidden, s.ffn, s.heads, s.kv_heads, s.dim, s.gate, s.causal)
        self._shape = ShapeC(*common, s.eps, s.offset, s.residual, s.scale, s.softcap or 0.0, limit_of(s.limit))

    def __call__(self, x: Tensor, count: int, angles: Sequence[Angles], ragged: Ragged) -> tuple[Tensor, Tensor]:
        """x[T, M] through the first `count` layers -> (x, what is still to be added to it). RuntimeError when another rank
        is late or gone."""
        x, y = x.clone(), torch.empty_like(x)
        turns = (AnglesC * len(angles))(*(AnglesC(c.data_ptr(), s.data_ptr(), c.shape[-1]) for c, s in angles))
        all_groups = (ragged, *ragged.others)
        groups = (GroupC * len(all_groups))(
            *(GroupC(g.table.data_ptr(), g.table.stride(0), g.slots.data_ptr()) for g in all_groups)
        )
        step = StepC(
            len(x),
            len(ragged.lengths),
            ragged.starts.data_ptr(),
            ragged.lengths.data_ptr(),
            ctypes.addressof(turns),
            ctypes.addressof(groups),
        )
        status = self._compiled.run_layers(
            TYPES[x.dtype],
            ctypes.addressof(self._table),
            count,
            ctypes.addressof(self._shape),
            ctypes.addressof(step),
            x.data_ptr(),
            y.data_ptr(),
            True,
            None if self._meeting is None else self._meeting.address,
            torch.get_num_threads(),
        )
        check(status)
        return x, y


def _layer(layer: Layer) -> LayerC:
    norms = map(_address, (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm))
    products = map(product_of, (layer.qkv, layer.o, layer.up, layer.down))
    mixture = None if layer.mixture is None else layer.mixture.address
    cache = cache_of(layer.k_cache, layer.v_cache)
    assert cache is not None
    others = map(_address, (layer.sinks, layer.slopes))
    kind = (layer.window or 0, layer.chunk or 0, layer.rope, layer.interleaved, layer.group)
    return LayerC(*norms, *products, mixture, cache, *others, *kind)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
