from __future__ import annotations

import pytest
import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.spec import Layer, Spec

CPU = torch.device("cpu")
SPEC = Spec(
    vocab=9, hidden=8, heads=4, kv_heads=2, head_dim=6, ffn=8, eps=1e-5, max_len=64, layers=(Layer(), Layer(), Layer())
)


def test_layers_are_views_of_one_arena() -> None:
    cache = KVCache(SPEC, 5, 4, torch.bfloat16, CPU)
    assert cache.arena.dtype == torch.uint8
    assert cache.arena.numel() == 5 * KVCache.block_bytes(SPEC, 4, torch.bfloat16) == 5 * 2 * 3 * 4 * 2 * 6 * 2
    for i in range(3):
        for j, tensor in enumerate(cache.layer(i)):
            assert tensor.shape == (5, 4, 2, 6)
            tensor.fill_(2 * i + j)
    assert [float(t.float().mean()) for i in range(3) for t in cache.layer(i)] == [0, 1, 2, 3, 4, 5]


def test_copy_copies_whole_blocks_of_all_layers() -> None:
    cache = KVCache(SPEC, 6, 4, torch.float32, CPU)
    for i in range(3):
        for tensor in cache.layer(i):
            tensor.normal_()
    before = [tensor.clone() for i in range(3) for tensor in cache.layer(i)]
    cache.copy([(1, 4), (1, 0), (3, 5)])
    for old, new in zip(before, [tensor for i in range(3) for tensor in cache.layer(i)], strict=True):
        assert torch.equal(new, old[[1, 1, 2, 3, 1, 3]])


@pytest.mark.parametrize("numbers", [[2], [1, 2, 3], [5, 0, 3], [0, 1, 4, 3, 5], [3, 3]])
def test_rows_are_put_into_blocks(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others are sent to the cache's device."""
    cache, sent = KVCache(SPEC, 8, 4, torch.float32, CPU), []
    staged = torch.randint(0, 255, (6, cache.bytes_per_block), dtype=torch.uint8)
    blocks = [7, 2, 4, 0, 5][: len(numbers)]
    copy, to = torch.Tensor.copy_, torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, rows, **how: sent.append(len(rows)) or copy(x, rows, **how))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **how: sent.append(len(x)) or to(x, *a, **how))
    cache.put(blocks, staged, numbers)
    monkeypatch.undo()
    assert torch.equal(cache.read(blocks), staged[numbers])
    assert sum(sent) == len(numbers)


def test_copying_nothing_is_fine() -> None:
    KVCache(SPEC, 1, 4, torch.float32, CPU).copy([])
