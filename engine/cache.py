"""KVCache: keys and values of all layers in one arena of bytes, of which every layer's blocks are views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Union

import numpy as np
import torch
from torch import Tensor

from kvasir.engine.batch import send
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.spec import Spec
from kvasir.kernels import huge_pages
from kvasir.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from kvasir.kernels.quantise import LARGEST, Cache, Quantised

Views = tuple[Cache, Union[Cache, None]]
"""Keys and values of a layer; no values where the keys serve as such (latent attention)."""


class KVCache:
    """N blocks of P slots. Nothing is written until it is used: on a CPU, huge pages without a used block cost no memory.

    A block holds slots of as many layers as a group of the layout has; without a layout all layers are one group. A rank
    of several keeps its own heads in the `layers` of its stage: the spec is its share's. In 8 bits, the slots of a head in a
    block are followed by their scales.
    """

    def __init__(
        self,
        spec: Spec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
        layers: range | None = None,
    ) -> None:
        depth = len(spec.layers)
        here = range(depth) if layers is None else layers
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self.layout = layout or Layout((LayerGroup(tuple(range(depth))),), depth)
        bytes_ = num_blocks * self.block_bytes(spec, block_size, dtype, self.layout.height)
        cpu = device.type == "cpu"
        byte = torch.uint8
        self.arena = huge_pages.empty(bytes_, dtype=byte) if cpu else torch.empty(bytes_, dtype=byte, device=device)
        self.kinds, self.slot_bytes = 2 if spec.value_dim else 1, spec.key_dim * dtype.itemsize
        self.scale_bytes = 4 if dtype in LARGEST else 0
        heads = self.arena.view(self.layout.height, self.kinds, num_blocks, spec.cache_heads, -1)
        self._chunks = heads.view(self.layout.height * self.kinds, num_blocks, -1)
        """[C, N, W]: the bytes of a block's keys, or values, of one layer lie in one piece."""
        self.group_of = [0] * depth
        self._places = [0] * depth
        self.awaited: Callable[[int], None] | None = None
        """Set while layers of some blocks still come: called before a layer is read or written."""
        self._layers: list[Views] = [(heads[0, 0], None)] * depth
        for number, group in enumerate(self.layout.groups):
            for place, layer in enumerate(layer for layer in group.layers if layer in here):
                self.group_of[layer], self._places[layer] = number, place
                parts = heads[place]
                self._layers[layer] = (
                    _view(parts[0], block_size, spec.key_dim, dtype),
                    _view(parts[1], block_size, spec.value_dim, dtype) if spec.value_dim else None,
                )

    @staticmethod
    def block_bytes(spec: Spec, block_size: int, dtype: torch.dtype, height: int | None = None) -> int:
        """Bytes of one block: P slots of keys and values in `height` layers, by default in all."""
        layers = len(spec.layers) if height is None else height
        return (
            layers * spec.cache_heads * sum(_head_bytes(block_size, d, dtype) for d in (spec.key_dim, spec.value_dim))
        )

    def layer(self, index: int) -> Views:
        """(keys, values), each [N, P, K, D]; in memory a head's slots are neighbours: [N, K, P, D]."""
        if self.awaited is not None:
            self.awaited(index)
        return self._layers[index]

    @property
    def bytes_per_block(self) -> int:
        return self.arena.numel() // self.num_blocks

    @torch.inference_mode()
    def read(self, blocks: Sequence[int], layers: tuple[int, int] | None = None) -> Tensor:
        """[n, bytes] uint8: what these blocks hold, each in one piece, on the cache's device: in all layers, or at those places
        (first and behind the last)."""
        index = send(np.array(blocks, np.int64), self.arena.device)
        return gather_blocks(self._of(layers), index).flatten(1)

    @torch.inference_mode()
    def read_into(self, blocks: Sequence[int], rows: Tensor, layers: tuple[int, int] | None = None) -> None:
        """What `read` gives, straight into rows[n, bytes] in host memory; on a CPU."""
        chunks, index = self._of(layers).transpose(0, 1), torch.tensor(blocks, dtype=torch.long)
        torch.index_select(chunks, 0, index, out=rows.view(len(blocks), *chunks.shape[1:]))

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], held: Tensor) -> None:
        """Put into these blocks what `read` gave, on the cache's device."""
        index, chunks = send(np.array(blocks, np.int64), self.arena.device), self._chunks
        scatter_blocks(chunks, index, held.view(len(blocks), chunks.shape[0], chunks.shape[2]))

    def put(self, blocks: Sequence[int], staged: Tensor, numbers: Sequence[int]) -> None:
        """Put into these blocks what lies in the rows `numbers` of staged[n, bytes_per_block], in host memory. The host
        doesn't wait where `room_for` made that."""
        breaks = [0, *(n for n in range(1, len(numbers)) if numbers[n] != numbers[n - 1] + 1), len(numbers)]
        runs = [staged[numbers[a] : numbers[b - 1] + 1] for a, b in pairwise(breaks)]
        if len(runs) == 1:
            rows = runs[0].to(self.arena.device, non_blocking=True)
        else:
            rows = torch.empty(len(numbers), staged.shape[1], dtype=torch.uint8, device=self.arena.device)
            for run, first in zip(runs, breaks, strict=False):
                rows[first : first + len(run)].copy_(run, non_blocking=True)
        self.write(blocks, rows)

    @torch.inference_mode()
    def put_layer(self, layer: int, blocks: Sequence[int], staged: Tensor, numbers: Sequence[int]) -> None:
        """The same of one layer that these blocks have."""
        place = self._places[layer]
        chunks, index = self._of((place, place + 1)), send(np.array(blocks, np.int64), self.arena.device)
        width = self.kinds * chunks.shape[2]
        rows = staged[:, place * width : (place + 1) * width].index_select(0, torch.tensor(numbers))
        if self.arena.is_cuda:
            rows = rows.pin_memory().to(self.arena.device, non_blocking=True)
        scatter_blocks(chunks, index, rows.view(len(blocks), self.kinds, -1))

    def _of(self, layers: tuple[int, int] | None) -> Tensor:
        """The chunks of the layers at those places."""
        first, stop = layers or (0, self.layout.height)
        return self._chunks[first * self.kinds : stop * self.kinds]

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Each (source, target) block is copied as a whole; all sources are read before any target is written."""
        if pairs:
            sources, targets = send(np.array(pairs, np.int64), self.arena.device).unbind(1)
            copy_blocks(self._chunks, sources, targets)


def _head_bytes(block_size: int, dim: int, dtype: torch.dtype) -> int:
    """Of a block's keys or values in one layer under one head, with their scales; a multiple of four where there are some."""
    size = block_size * dim * dtype.itemsize
    return size if dtype not in LARGEST or not dim else -(-size // 4) * 4 + 4 * block_size


def _view(parts: Tensor, block_size: int, dim: int, dtype: torch.dtype) -> Cache:
    """Bytes parts[N, K, _head_bytes] as [N, P, K, D]."""
    shape = (*parts.shape[:2], block_size, dim)
    if dtype not in LARGEST:
        return parts.view(dtype).view(shape).transpose(1, 2)
    # a view of the first bytes: rows don't follow each other, scales lie between
    values = parts.as_strided(shape, (*parts.stride()[:2], dim, 1)).view(dtype)
    scales = parts.view(torch.float32)[..., -block_size:]
    return Quantised(values.transpose(1, 2), scales.transpose(1, 2))
