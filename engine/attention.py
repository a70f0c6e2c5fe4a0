"""Attention of one layer over the paged cache: grouped-query heads, or a shared latent (MLA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Union

import torch
from torch import Tensor, nn

from kvasir.engine.cache import KVCache
from kvasir.engine.layers import Linear, Norm, empty
from kvasir.engine.share import Share
from kvasir.engine.spec import Latent, Layer, QueryScale, Rope, Spec
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import turn_and_write, write
from kvasir.kernels.huge_pages import Room
from kvasir.kernels.linear import HeadsWeight, PackedHeads, Tiled, linear_heads, packed_heads
from kvasir.kernels.norm import rms_norm, sum_of_squares
from kvasir.kernels.quantise import Cache, numbers
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles, rotate

Positional = dict[Union[Rope, QueryScale], Angles]
"""What depends on a step's positions alone: the angles of each distinct rope; a scale is (factors[T, 1, 1], same)."""


def module(share: Share, layer: Layer, dtype: torch.dtype, device: torch.device) -> Attention | LatentAttention:
    """The kind of attention that the spec asks for, of this rank's heads: what it gives is this rank's part of a sum."""
    if share.spec.latent is not None:
        return LatentAttention(share.spec, share.spec.latent, layer, dtype, device)
    return Attention(share, layer, dtype, device)


def refusal(backend: str, share: Share, dtype: torch.dtype, device: torch.device, cache: KVCache) -> str:
    """Why some layer of this rank can't be computed by these kernels; empty: all can. `cache` is one as theirs, on meta."""
    meta = torch.device("meta")
    distinct = {share.spec.layers[number]: number for number in share.layers}
    for layer, number in distinct.items():
        keys, values = cache.layer(number)
        q = torch.empty(1, share.spec.heads, numbers(keys).shape[-1], dtype=dtype, device=meta)
        facts = module(share, layer, dtype, meta).facts()
        if obstacle := attention.obstacle(backend, device.type, q, keys, values, None, **facts):
            return obstacle
    return ""


def attend_by(backend: str, device: torch.device, modules: Iterable[nn.Module], *, deterministic: bool = False) -> None:
    """All of ours among `modules` by these kernels from now on. ValueError names those there are. `deterministic`: in pieces
    that don't depend on what else is in the batch, if Triton's run."""
    attend: Callable[..., Tensor] = attention.backend(backend, device.type)
    if deterministic and (attention.choices(device.type)[0] if backend == "auto" else backend) == "triton":
        triton: Callable[..., Tensor] = attention.backend("triton", device.type)
        attend = partial(triton, deterministic=True)
    for module in modules:
        if isinstance(module, (Attention, LatentAttention)):
            module.attend = attend


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, share: Share, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        spec = share.spec
        self.spec, self.layer, self.share = spec, layer, share
        self.attend: Callable[..., Tensor] = attention
        self.scale = spec.head_dim**-0.5 if spec.attn_scale is None else spec.attn_scale
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.qkv = Linear(spec.hidden, {"q": q, "k": kv, "v": kv}, spec.qkv_bias, dtype, device)
        self.o = Linear(q, {"o": spec.hidden}, spec.o_bias, dtype, device)
        self.q_norm = self._norm(spec.heads, dtype, device)
        self.k_norm = self._norm(spec.kv_heads, dtype, device)
        self.sinks = empty(spec.heads, dtype=dtype, device=device) if spec.sinks else None
        own = slice(share.heads.start, share.heads.stop)
        slopes = torch.tensor(alibi_slopes(share.full.heads)[own]) * spec.alibi if spec.alibi else None
        self.slopes = slopes if slopes is None or device.type == "meta" else slopes.to(device)
        s = layer.sparse
        shift = 0 if s is None else max(1, s.stride // share.full.heads)
        self.sparse = None if s is None else (s.block, s.local, s.stride, shift, share.heads.start)

    def _norm(self, heads: int, dtype: torch.dtype, device: torch.device) -> Norm | None:
        dim = self.spec.head_dim
        shapes = {"head": (dim,), "row": (heads * dim,), "each_head": (heads, dim)}
        shape = shapes.get(self.spec.qk_norm or "")
        return Norm(self.spec, shape, dtype, device) if shape else None

    def forward(self, x: Tensor, positional: Positional, ragged: Ragged, k_cache: Cache, v_cache: Cache) -> Tensor:
        """x[T, M] -> [T, M]."""
        spec, layer = self.spec, self.layer
        x = self.qkv(x)
        if spec.clip_qkv is not None:
            x = x.clamp(-spec.clip_qkv, spec.clip_qkv)
        heads = x.view(len(x), -1, spec.head_dim)
        q, k, v = heads.split_with_sizes([spec.heads, spec.kv_heads, spec.kv_heads], 1)
        q = self._placed(*self._normed(q, k), v, positional, ragged, k_cache, v_cache)
        if layer.query_scale is not None:
            q = q * positional[layer.query_scale][0]
        y = self.attend(q, k_cache, v_cache, ragged, **self.facts())
        out: Tensor = self.o(y.flatten(1))
        return out

    def facts(self) -> dict[str, Any]:
        """What shapes its attention, in the operator's words."""
        spec, layer = self.spec, self.layer
        return {
            "scale": self.scale, "window": layer.window, "chunk": layer.chunk, "softcap": spec.attn_softcap,
            "causal": spec.causal, "sinks": self.sinks, "slopes": self.slopes, "sparse": self.sparse,
        }  # fmt: skip

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q[T, H, D] and k[T, K, D] behind their norms."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        if self.spec.qk_norm != "row":
            return self.q_norm(q), self.k_norm(k)
        q, k = self._whole_rows(self.q_norm, self.k_norm, q.flatten(1), k.flatten(1))
        return q.view(len(q), -1, self.spec.head_dim), k.view(len(k), -1, self.spec.head_dim)

    def _placed(
        self, q: Tensor, k: Tensor, v: Tensor, positional: Positional, ragged: Ragged, k_cache: Cache, v_cache: Cache
    ) -> Tensor:
        """The turned queries; turned keys and the values go into the cache."""
        rope, l2 = self.layer.rope, self.spec.qk_norm == "l2"
        if rope is not None and not l2:
            return turn_and_write(q, k, v, positional[rope], k_cache, v_cache, ragged, interleaved=rope.interleaved)
        if rope is not None:
            q, k = (
                rms_norm(rotate(t, positional[rope], interleaved=rope.interleaved), None, self.spec.eps) for t in (q, k)
            )
        write(k, v, k_cache, v_cache, ragged)
        return q

    def _whole_rows(self, q_norm: Norm, k_norm: Norm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q[T, H * D] and k[T, K * D], normalised over the heads of all ranks."""
        share, full = self.share, self.share.full
        if share.mesh.tensor is None:
            return q_norm(q), k_norm(k)
        sums = [sum_of_squares(q), sum_of_squares(k) / share.kv_copies]
        squares = share.mesh.reduce(torch.stack(sums, -1)) / full.head_dim
        return q_norm.part(q, squares[:, :1] / full.heads), k_norm.part(k, squares[:, 1:] / full.kv_heads)


class LatentAttention(nn.Module):
    """Multi-head latent attention, absorbed: heads attend to the latent itself, as if it were one wide key head, and what
    expands it to keys and values is applied to queries and outputs (DeepSeek-V2, arXiv:2405.04434, 2.1)."""

    def __init__(self, spec: Spec, latent: Latent, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.latent, self.layer = spec, latent, layer
        self.attend: Callable[..., Tensor] = attention
        head = latent.nope_dim + latent.rope_dim
        self.scale = head**-0.5 if spec.attn_scale is None else spec.attn_scale
        first = spec.heads * head if latent.q_rank is None else latent.q_rank
        name = "q" if latent.q_rank is None else "q_a"
        self.inputs = [first, latent.kv_rank, latent.rope_dim]
        parts = {name: first, "kv_a": latent.kv_rank + latent.rope_dim}
        self.down = Linear(spec.hidden, parts, spec.qkv_bias, dtype, device)
        self.kv_a_norm = Norm(spec, (latent.kv_rank,), dtype, device)
        self.q_a_norm = self.up = None
        if latent.q_rank is not None:
            self.q_a_norm = Norm(spec, (latent.q_rank,), dtype, device)
            self.up = Linear(latent.q_rank, {"q_b": spec.heads * head}, False, dtype, device)
        wide = spec.heads * (latent.nope_dim + latent.v_dim)
        self.kv_b: nn.Parameter | None = empty(wide, latent.kv_rank, dtype=dtype, device=device)
        self.to_key: PackedHeads | Tiled | None = None
        self.to_value: PackedHeads | Tiled | None = None
        self.o = Linear(spec.heads * latent.v_dim, {"o": spec.hidden}, spec.o_bias, dtype, device)

    def forward(self, x: Tensor, positional: Positional, ragged: Ragged, k_cache: Cache, v_cache: None) -> Tensor:
        """x[T, M] -> [T, M]."""
        rows, latent = len(x), self.latent
        q, compressed, k_turn = torch.split(self.down(x), self.inputs, -1)
        if self.q_a_norm is not None and self.up is not None:
            q = self.up(self.q_a_norm(q))
        q, q_turn = torch.split(
            q.view(rows, self.spec.heads, latent.nope_dim + latent.rope_dim), [latent.nope_dim, latent.rope_dim], -1
        )
        turning = torch.cat((q_turn, k_turn[:, None]), 1)
        if self.layer.rope is not None:
            rope = self.layer.rope
            turning = rotate(turning, positional[rope], interleaved=rope.interleaved)
        to_key, to_value = self.expansion()
        q = torch.cat((linear_heads(q, to_key), turning[:, :-1]), -1)
        write(torch.cat((self.kv_a_norm(compressed)[:, None], turning[:, -1:]), -1), None, k_cache, None, ragged)
        y = self.attend(q, k_cache, None, ragged, **self.facts())
        out: Tensor = self.o(linear_heads(y, to_value).reshape(rows, -1))
        return out

    def facts(self) -> dict[str, Any]:
        """What shapes its attention, in the operator's words."""
        return {"scale": self.scale, "window": self.layer.window, "value_dim": self.latent.kv_rank}

    def expansion(self) -> tuple[HeadsWeight, HeadsWeight]:
        """What is applied to queries[T, H, nope] and to outputs[T, H, rank]."""
        if self.kv_b is None:
            assert self.to_key is not None
            assert self.to_value is not None
            return self.to_key, self.to_value
        facts = self.latent
        halves = self.kv_b.view(self.spec.heads, -1, facts.kv_rank)
        to_key, to_value = torch.split(halves, [facts.nope_dim, facts.v_dim], 1)
        return to_key.transpose(1, 2), to_value

    def pack(self, *, invariant: bool = False, room: Room | None = None) -> None:
        """As Linear.pack, once `kv_b` is filled, which ends here if its halves have an order of our own."""
        if self.kv_b is None:
            return
        halves = (packed_heads(half, invariant=invariant, room=room) for half in self.expansion())
        self.to_key, self.to_value = halves
        if self.to_key is not None and self.to_value is not None:
            self.kv_b = None


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 i / H) for a power of two; otherwise the next lower power's, then every second of the next higher's
    (Press et al. 2021, arXiv:2108.12409)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
