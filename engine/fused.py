"""Taking apart tensors that a checkpoint stores fused: shared by the files in `arch`. Views, no copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Spec


def stacked(
    name: str, tensor: Any, fused: str, spec: Spec, rows: Mapping[str, int], dim: int = 0
) -> Iterator[tuple[str, Any]]:
    """tensor[sum(rows), hidden], or a bias [sum(rows)], as its parts, one upon the other; `fused` in the name becomes each
    part's own fragment. A matrix [hidden, sum(rows)] is divided along `dim` -1. ConfigError for another shape."""
    shape = shape_of(name, sum(rows.values()), spec)
    expect(name, tensor, *(shape if dim == 0 else reversed(shape)))
    for part, piece in zip(rows, tensor.split(list(rows.values()), dim), strict=True):
        yield name.replace(fused, part), piece


def qkv_rows(spec: Spec, q: str, k: str, v: str) -> dict[str, int]:
    """The rows of queries, keys and values under these fragments."""
    kv = spec.kv_heads * spec.head_dim
    return {q: spec.heads * spec.head_dim, k: kv, v: kv}


def grouped(name: str, tensor: Any, fused: str, spec: Spec, q: str, k: str, v: str) -> Iterator[tuple[str, Any]]:
    """tensor[K * (H / K + 2) * D, hidden], or a bias: for each kv head its queries, its key and its value. ConfigError for
    another shape."""
    expect(name, tensor, *shape_of(name, sum(qkv_rows(spec, q, k, v).values()), spec))
    queries = spec.heads // spec.kv_heads
    groups = tensor.view(spec.kv_heads, queries + 2, spec.head_dim, *tensor.shape[1:])
    parts = {q: groups[:, :queries], k: groups[:, queries : queries + 1], v: groups[:, queries + 1 :]}
    for part, piece in parts.items():
        yield name.replace(fused, part), piece.reshape(-1, *tensor.shape[1:])


def expect(name: str, tensor: Any, *shape: int) -> None:
    """ConfigError unless this tensor has this shape, before it is taken apart: its parts might fit by chance."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, config.json says {list(shape)}")


def shape_of(name: str, rows: int, spec: Spec) -> tuple[int, ...]:
    """Of a matrix of so many outputs of the hidden state, or of its bias, by its name."""
    return (rows,) if name.endswith("bias") else (rows, spec.hidden)


def per_expert(tensors: Mapping[str, Any], fragment: str) -> Iterator[tuple[str, Any]]:
    """Each tensor[E, ...] as one for each expert: `fragment` with its {} filled in replaces `experts` in the name.

    Expert by expert: what of a model makes one matrix becomes whole early, and lies together in the file.
    """
    for number, experts in enumerate(zip(*(tensor.unbind(0) for tensor in tensors.values()), strict=True)):
        for name, expert in zip(tensors, experts, strict=True):
            yield name.replace("experts", fragment.format(number), 1), expert
