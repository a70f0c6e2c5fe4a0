"""KVCache: keys and values of all layers in one arena of bytes, of which every layer's blocks are views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.spec import Spec

Views = tuple[Tensor, Union[Tensor, None]]
"""Keys and values of a layer; no values where the keys serve as such (latent attention)."""


class KVCache:
    """N blocks of P slots. Nothing is written until it is used: on a CPU, untouched blocks cost no memory.

    A block holds slots of as many layers as a group of the layout has; without a layout all layers are one group. A rank
    of several keeps its own heads in the `layers` of its stage: the spec is its share's.
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
        self.arena = torch.empty(bytes_, dtype=torch.uint8, device=device)
        kinds = 2 if spec.value_dim else 1
        shape = (self.layout.height, kinds, num_blocks, spec.cache_heads, block_size, spec.key_dim)
        self._blocks = self.arena.view(dtype).view(shape)
        views = self._blocks.transpose(3, 4)
        self.group_of = [0] * depth
        self._layers: list[Views] = [(views[0, 0], None)] * depth
        for number, group in enumerate(self.layout.groups):
            for place, layer in enumerate(layer for layer in group.layers if layer in here):
                self.group_of[layer] = number
                self._layers[layer] = (views[place, 0], views[place, 1] if spec.value_dim else None)

    @staticmethod
    def block_bytes(spec: Spec, block_size: int, dtype: torch.dtype, height: int | None = None) -> int:
        """Bytes of one block: P slots of keys and values in `height` layers, by default in all."""
        layers = len(spec.layers) if height is None else height
        return layers * block_size * spec.cache_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize

    def layer(self, index: int) -> Views:
        """(keys, values), each [N, P, K, D]; in memory a head's slots are neighbours: [N, K, P, D]."""
        return self._layers[index]

    @property
    def bytes_per_block(self) -> int:
        return self.arena.numel() // self.num_blocks

    @torch.inference_mode()
    def read(self, blocks: Sequence[int]) -> Tensor:
        """[n, bytes_per_block] uint8: what these blocks hold in all layers, each in one piece, on the cache's device."""
        index = torch.tensor(blocks, device=self.arena.device)
        return self._blocks.movedim(2, 0).index_select(0, index).view(len(blocks), -1).view(torch.uint8)

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], held: Tensor) -> None:
        """Put into these blocks what `read` gave, on the cache's device."""
        index, target = torch.tensor(blocks, device=self.arena.device), self._blocks.movedim(2, 0)
        target.index_copy_(0, index, held.view(self._blocks.dtype).view(len(blocks), *target.shape[1:]))

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Each (source, target) block is copied as a whole; all sources are read before any target is written."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.arena.device).unbind(1)
            self._blocks.index_copy_(2, targets, self._blocks.index_select(2, sources))
