"""Which decoders run as one compiled stack of layers (kernels/stack.py): those whose every layer is of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from kvasir.engine.attention import Attention
from kvasir.engine.cache import KVCache
from kvasir.engine.layers import Norm
from kvasir.engine.mlp import MLP, Mixture
from kvasir.engine.spec import Rope, Spec
from kvasir.kernels.activation_native import KINDS
from kvasir.kernels.native import library
from kvasir.kernels.stack import Layer, Shape, Stack

if TYPE_CHECKING:
    from kvasir.engine.decoder import Block, Decoder


def stack_of(decoder: Decoder, cache: KVCache) -> Stack | None:
    """The decoder's layers as one call over this cache; None where they aren't of the kind."""
    share = decoder.share
    numbers = list(share.layers)
    if decoder.attention_backend not in ("auto", "native"):  # the stack has its own
        return None
    mesh = share.mesh
    exchanges = mesh.tensor is not None
    if library() is None or not numbers or (exchanges and mesh.meeting is None) or not _common(share.spec):
        return None
    ropes = list(decoder.turnings)
    layers = [
        _layer(cast("Block", block), number, cache, ropes)
        for number, block in zip(numbers, decoder.blocks.values(), strict=True)
    ]
    whole = [layer for layer in layers if layer is not None]
    return Stack(whole, _shape(share.spec), mesh.meeting) if len(whole) == len(layers) else None


def _common(spec: Spec) -> bool:
    """Whether the facts that all layers share are those of the commonest kind."""
    branches = spec.placement == "pre" and spec.norm == "rms" and not spec.norm_bias and spec.latent is None
    heads = spec.qk_norm in (None, "head") and spec.clip_qkv is None and spec.head_dim % 2 == 0
    return branches and heads and spec.gated and spec.activation in KINDS


def _shape(spec: Spec) -> Shape:
    return Shape(
        hidden=spec.hidden,
        ffn=spec.ffn,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        dim=spec.head_dim,
        gate=KINDS[spec.activation],
        causal=spec.causal,
        eps=spec.eps,
        offset=spec.norm_offset,
        residual=spec.residual_scale,
        scale=spec.head_dim**-0.5 if spec.attn_scale is None else spec.attn_scale,
        softcap=spec.attn_softcap,
        limit=spec.activation_limit,
    )


def _layer(block: Block, number: int, cache: KVCache, ropes: list[Rope]) -> Layer | None:
    attn, mlp = block.attn, block.mlp
    if not isinstance(attn, Attention):
        return None
    up = down = mixture = None
    if isinstance(mlp, MLP):
        up, down = mlp.up.product(), mlp.down.product()
    elif isinstance(mlp, Mixture):
        mixture = mlp.whole
    norms = [_weight(norm) for norm in (block.attn_norm, block.mlp_norm)]
    facts, (k_cache, v_cache) = attn.layer, cache.layer(number)
    odd = facts.rope is None or facts.query_scale is not None or facts.sparse is not None
    if odd or v_cache is None:
        return None
    qkv, o = attn.qkv.product(), attn.o.product()
    attn_norm, mlp_norm = norms
    lacking = mixture is None and (up is None or down is None)
    if qkv is None or o is None or lacking or attn_norm is None or mlp_norm is None:
        return None
    assert facts.rope is not None
    return Layer(
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        q_norm=_weight(attn.q_norm),
        k_norm=_weight(attn.k_norm),
        qkv=qkv,
        o=o,
        up=up,
        down=down,
        mixture=mixture,
        k_cache=k_cache,
        v_cache=v_cache,
        sinks=None if attn.sinks is None else attn.sinks.float(),
        slopes=None if attn.slopes is None else attn.slopes.float(),
        window=facts.window,
        chunk=facts.chunk,
        rope=ropes.index(facts.rope),
        interleaved=facts.rope.interleaved,
        group=cache.group_of[number],
    )


def _weight(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight
