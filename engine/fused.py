"""Taking apart tensors that a checkpoint stores fused: shared by the files in `arch`. Views, no copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Spec


def stacked(name: str, tensor: Any, fused: str, rows: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    """tensor[sum(rows), ...] as its parts, one upon the other; `fused` in the name becomes each part's own fragment."""
    for part, piece in zip(rows, tensor.split(list(rows.values()), 0), strict=True):
        yield name.replace(fused, part), piece


def qkv_rows(spec: Spec, q: str, k: str, v: str) -> dict[str, int]:
    """The rows of queries, keys and values under these fragments."""
    kv = spec.kv_heads * spec.head_dim
    return {q: spec.heads * spec.head_dim, k: kv, v: kv}


def grouped(name: str, tensor: Any, fused: str, spec: Spec, q: str, k: str, v: str) -> Iterator[tuple[str, Any]]:
    """tensor[K * (H / K + 2) * D, ...]: for each kv head its queries, its key and its value."""
    queries = spec.heads // spec.kv_heads
    groups = tensor.view(spec.kv_heads, queries + 2, spec.head_dim, *tensor.shape[1:])
    parts = {q: groups[:, :queries], k: groups[:, queries : queries + 1], v: groups[:, queries + 1 :]}
    for part, piece in parts.items():
        yield name.replace(fused, part), piece.reshape(-1, *tensor.shape[1:])


def expect(name: str, tensor: Any, *shape: int) -> None:
    """ConfigError unless this tensor of all experts has this shape, before it is taken apart."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, config.json says {list(shape)}")


def per_expert(tensors: Mapping[str, Any], fragment: str) -> Iterator[tuple[str, Any]]:
    """Each tensor[E, ...] as one for each expert: `fragment` with its {} filled in replaces `experts` in the name.

    Expert by expert: what of a model makes one matrix becomes whole early, and lies together in the file.
    """
    for number, experts in enumerate(zip(*(tensor.unbind(0) for tensor in tensors.values()), strict=True)):
        for name, expert in zip(tensors, experts, strict=True):
            yield name.replace("experts", fragment.format(number), 1), expert
