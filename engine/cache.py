"""KVCache: keys and values of all layers in one arena of bytes, of which every layer's blocks are views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvasir.engine.spec import Spec


class KVCache:
    """N blocks of P slots. Nothing is written until it is used: on a CPU, untouched blocks cost no memory."""

    def __init__(self, spec: Spec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        bytes_ = num_blocks * self.block_bytes(spec, block_size, dtype)
        self.arena = torch.empty(bytes_, dtype=torch.uint8, device=device)
        depth = len(spec.layers)
        self.group_of = [0] * depth
        kinds = 2 if spec.value_dim else 1
        shape = (depth, kinds, num_blocks, spec.cache_heads, block_size, spec.key_dim)
        self._blocks = self.arena.view(dtype).view(shape)
        views = self._blocks.transpose(3, 4)
        self._layers = [(views[i, 0], views[i, 1] if spec.value_dim else None) for i in range(depth)]

    @staticmethod
    def block_bytes(spec: Spec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block: P slots of keys and values in every layer."""
        return len(spec.layers) * block_size * spec.cache_heads * (spec.key_dim + spec.value_dim) * dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """(keys, values), each [N, P, K, D]; in memory a head's slots are neighbours: [N, K, P, D]."""
        return self._layers[index]

    @torch.inference_mode()
    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Each (source, target) block is copied in all layers; no target may be a source of the same call."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.arena.device).unbind(1)
            self._blocks.index_copy_(2, targets, self._blocks.index_select(2, sources))
