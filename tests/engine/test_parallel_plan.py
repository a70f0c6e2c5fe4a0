"""Predictions of layouts: memory as it really is, every layout once, and what doesn't fit said so."""

from __future__ import annotations

import pytest
import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import layout
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.parallel_plan import GB, Device, find_device, plan, plans
from kvasir.engine.share import share_of, stages
from kvasir.engine.spec import Experts, Layer, Rope, Spec
from kvasir.engine.weights import random_decoder

SPEC = Spec(
    vocab=1000, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=256, eps=1e-5, max_len=2048,
    layers=(Layer(Rope(1e4, 8)),) * 6,
)  # fmt: skip
SMALL = Device(GB, 1e12, 1e14, 1e11)
CONFIG, CPU = EngineConfig(), torch.device("cpu")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 3), (8, 1)])
def test_memory_is_what_ranks_really_hold(tp: int, pp: int) -> None:
    found = plan(CONFIG, SPEC, torch.bfloat16, SMALL, Place(tp, pp), 1, streams=4, length=512)
    shares = [share_of(SPEC, Mesh(Place(tp, pp, rank))) for rank in range(tp * pp)]
    decoders = [random_decoder(SPEC, torch.bfloat16, CPU, pack=False, share=share) for share in shares]
    assert found.weights == max(sum(p.nbytes for p in decoder.parameters()) for decoder in decoders)
    shape = layout(SPEC, 512, stages(SPEC, pp))
    caches = [KVCache(s.spec, 512 // 16, 16, torch.bfloat16, CPU, shape, s.layers) for s in shares]
    assert found.kv_per_token == max(cache.arena.nbytes for cache in caches) / 512


def test_every_layout_once_and_the_best_first() -> None:
    found = plans(CONFIG, SPEC, torch.bfloat16, SMALL, 4, streams=8, length=512)
    assert {(p.tp, p.pp, p.dp) for p in found} == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}
    assert found[0].tokens_s >= found[-1].tokens_s
    assert (found[0].tp, found[0].traffic) == (1, 0.0), "what fits on one device needs no exchange"


def test_what_doesnt_fit_comes_last_and_has_no_speed() -> None:
    tiny = Device(60_000_000, 1e12, 1e14, 1e11)  # activations of 8192 rows and logits take most of it
    found = plans(CONFIG, SPEC, torch.bfloat16, tiny, 2, streams=8, length=2048)
    assert [p.fits for p in found] == sorted((p.fits for p in found), reverse=True)
    assert all(p.tokens_s == 0 for p in found if not p.fits)
    none = plans(CONFIG, SPEC, torch.bfloat16, Device(1000, 1, 1, 1), 1, streams=1, length=16)
    assert [(p.fits, p.context) for p in none] == [(False, 0)]


def test_idle_experts_aren_t_read() -> None:
    """One stream reads two of sixteen experts, a thousand read all."""
    facts = Experts(count=16, per_token=2, ffn=512)
    spec = Spec(
        vocab=1000, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=256, eps=1e-5, max_len=2048,
        layers=(Layer(Rope(1e4, 8), experts=True),) * 6, experts=facts,
    )  # fmt: skip
    slow = Device(GB, 1e9, 1e15, 1e11)
    one, many = (
        plan(CONFIG, spec, torch.bfloat16, slow, Place(), 1, streams=streams, length=16).step_s for streams in (1, 250)
    )
    assert 5 < many / one < 9


def test_an_unknown_device_is_named() -> None:
    assert find_device("h100-80gb").memory == 80 * GB
    with pytest.raises(ConfigError, match=r"--gpu H900: not known; known are A100-40GB"):
        find_device("H900")
