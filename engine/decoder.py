"""One decoder for every Spec: pre-norm blocks of attention over a paged cache and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvasir.engine.cache import KVCache
from kvasir.engine.layers import Linear, empty, rope_frequencies
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.kernels.activation import gated
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import write
from kvasir.kernels.linear import linear, packed
from kvasir.kernels.norm import rms_norm
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import rope_angles, rotate

Angles = dict[Rope, tuple[Tensor, Tensor]]
"""cos and sin of a step's positions, once per distinct rope."""


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, spec: Spec, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.layer, self.scale = spec, layer, spec.head_dim**-0.5
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.qkv = Linear(spec.hidden, {"q": q, "k": kv, "v": kv}, spec.qkv_bias, dtype, device)
        self.o = Linear(q, {"o": spec.hidden}, spec.o_bias, dtype, device)
        self.q_norm = empty(spec.head_dim, dtype=dtype, device=device) if spec.qk_norm else None
        self.k_norm = empty(spec.head_dim, dtype=dtype, device=device) if spec.qk_norm else None

    def forward(self, x: Tensor, angles: Angles, ragged: Ragged, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        spec = self.spec
        heads = self.qkv(x).view(len(x), -1, spec.head_dim)
        qk, v = heads.tensor_split((spec.heads + spec.kv_heads,), 1)
        qk = self._norm(qk)
        if self.layer.rope is not None:
            qk = rotate(qk, *angles[self.layer.rope])
        q, k = qk.tensor_split((spec.heads,), 1)
        write(k, v, k_cache, v_cache, ragged)
        y = attention(q, k_cache, v_cache, ragged, scale=self.scale, window=self.layer.window)
        out: Tensor = self.o(y.flatten(1))
        return out

    def _norm(self, qk: Tensor) -> Tensor:
        if self.q_norm is None or self.k_norm is None:
            return qk
        q, k = qk.tensor_split((self.spec.heads,), 1)
        return torch.cat((rms_norm(q, self.q_norm, self.spec.eps), rms_norm(k, self.k_norm, self.spec.eps)), 1)


class MLP(nn.Module):
    """down(activation(gate) * up)."""

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = Linear(spec.hidden, {"gate": spec.ffn, "up": spec.ffn}, spec.mlp_bias, dtype, device)
        self.down = Linear(spec.ffn, {"down": spec.hidden}, spec.mlp_bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated(self.gate_up(x), self.activation))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: Spec, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = spec.eps
        self.attn_norm = empty(spec.hidden, dtype=dtype, device=device)
        self.attn = Attention(spec, layer, dtype, device)
        self.mlp_norm = empty(spec.hidden, dtype=dtype, device=device)
        self.mlp = MLP(spec, dtype, device)

    def forward(
        self, x: Tensor, angles: Angles, ragged: Ragged, k_cache: Tensor, v_cache: Tensor, rows: Tensor | None
    ) -> Tensor:
        """x[T, M] -> [T, M], or [R, M] when only some rows are wanted: the others end with their keys and values."""
        x = x + self.attn(rms_norm(x, self.attn_norm, self.eps), angles, ragged, k_cache, v_cache)
        if rows is not None:
            x = x.index_select(0, rows)
        out: Tensor = x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))
        return out


class Decoder(nn.Module):
    """tokens[T] of any number of sequences, at any positions, to logits. Parameters are unfilled until loaded."""

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.dtype, self.device = spec, dtype, device
        self.embed = empty(spec.vocab, spec.hidden, dtype=dtype, device=device)
        self.blocks = nn.ModuleList(Block(spec, layer, dtype, device) for layer in spec.layers)
        self.norm = empty(spec.hidden, dtype=dtype, device=device)
        self.head: Tensor = self.embed if spec.tied else empty(spec.vocab, spec.hidden, dtype=dtype, device=device)
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        self.frequencies = {rope: rope_frequencies(rope, spec.head_dim).to(device) for rope in ropes}

    @torch.inference_mode()
    def forward(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor) -> Tensor:
        """tokens[T] int64, rows[R] int64 -> float32 logits[R, V] of those rows; keys and values go into the cache."""
        x = F.embedding(tokens, self.embed)
        angles = {rope: rope_angles(ragged.positions, f, x.dtype) for rope, f in self.frequencies.items()}
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, angles, ragged, *cache.layer(i), rows if i == last else None)
        x = rms_norm(x, self.norm, self.spec.eps)
        return linear(x, self.head).float()

    def pack(self) -> None:
        """Once filled: give every matrix the order this device reads fastest. A tied head becomes a copy if need be."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        head = packed(self.head)
        del self.head
        self.head = head

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, view to fill) of every tensor, stacked ones one by one: `blocks.0.attn.q.weight`."""
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                parent = path.rpartition(".")[0]
                yield from ((f"{parent}.{name}", view) for name, view in module.places())
            else:
                own = module.named_parameters(prefix=path, recurse=False)
                yield from ((name + ".weight" * (name in ("embed", "head")), tensor) for name, tensor in own)
