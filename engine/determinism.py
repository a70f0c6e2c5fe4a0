"""Whether the logits of a sequence depend on what else is in the batch: what --deterministic and requests go by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kvasir.engine.attention import LatentAttention
from kvasir.engine.decoder import Decoder
from kvasir.engine.layers import Linear
from kvasir.kernels.linear import HeadsWeight, Packed, PackedHeads, Tiled, Weight, tiles
from kvasir.kernels.native import native

if TYPE_CHECKING:  # transformers, which is slow to import and seldom needed
    from kvasir.engine.fallback import Fallback


def indeterminate(decoder: Decoder | Fallback) -> str:
    """Why they may, down to the last bit; empty: they don't. Attention, norms and gates of the compiled CPU kernels and of
    Triton's add up each row in an order of its own; so do products in our own order and in tiles, and sums over two ranks."""
    if not isinstance(decoder, Decoder):
        return "the model runs by transformers' own code, whose products depend on the batch"
    if obstacle := of_device(decoder.device, decoder.attention_backend):
        return obstacle
    if decoder.device.type == "cpu":
        if native().library is None:
            return f"it needs the compiled CPU kernels ({native().text})"
        if any(layer.sparse for layer in decoder.spec.layers):
            return "block-sparse attention runs in torch, which cuts it by what is in the batch"
    if not all(isinstance(weight, (Packed, PackedHeads, Tiled)) for weight in multiplied(decoder)):
        return _of_products(decoder)
    place = decoder.mesh.place
    if place.tp > 2 and not decoder.mesh.invariant:
        return f"sums over {place.tp} ranks depend on how many rows a step has; start with --deterministic"
    return ""


def multiplied(decoder: Decoder) -> Iterator[Weight | HeadsWeight]:
    """All matrices that rows are multiplied by."""
    for module in decoder.modules():
        if isinstance(module, Linear):
            yield module.weight
        elif isinstance(module, LatentAttention):
            yield from module.expansion()
    if decoder.head is not None:
        yield decoder.head


def of_device(device: torch.device, attention_backend: str) -> str:
    """Why it can't be had on this device by these kernels of attention, whatever the model."""
    if device.type != "cpu" and not tiles(device):
        return f"products on {device.type} depend on how many rows a step has, and Triton, whose don't, isn't there"
    kernels = "native" if device.type == "cpu" else "triton"
    if attention_backend not in ("auto", kernels):
        return f"--attention-backend {attention_backend} cuts attention by what is in the batch; use {kernels}, or leave it out"
    return ""


def _of_products(decoder: Decoder) -> str:
    if not decoder.mesh.invariant:
        whose = "oneDNN's products" if decoder.device.type == "cpu" else f"products on {decoder.device.type}"
        return f"{whose} depend on how many rows a step has; start with --deterministic"
    return "a matrix has an odd number of inputs, or a type that the compiled kernels don't multiply"
