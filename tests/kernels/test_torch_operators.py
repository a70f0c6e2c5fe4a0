"""torch's own operators as backends: equal to the definitions. Experts run anywhere; attention where FlashAttention reads blocks,
and elsewhere through a stand-in that computes plainly from what the operator is told."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.kernels import attention_torch, moe_torch
from kvasir.kernels.attention import attention
from kvasir.kernels.moe import Routing, route, stacked_experts
from kvasir.kernels.quantise import Quantised


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """What torch's documentation says of varlen_attn: the last row of a sequence stands at its last key."""
    assert enable_gqa
    assert (num_splits is None) == (cu_seq_k is None) == attention_torch.has_flash3()
    assert num_splits in (None, 1)
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert cu_seq_q.is_contiguous()
    assert block_table.is_contiguous()
    starts, used, out = cu_seq_q.tolist(), seqused_k.tolist(), torch.empty_like(query)
    assert max_q == max(b - a for a, b in pairwise(starts))
    assert max_k == max(used)
    left, right = (max_k if side == -1 else side for side in window_size)
    for s, length in enumerate(used):
        rows = slice(starts[s], starts[s + 1])
        blocks = block_table[s, : -(-length // key.shape[1])].long()
        k, v = (
            cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(query.shape[1] // key.shape[2], 1)
            for cache in (key, value)
        )
        at = torch.arange(length - (rows.stop - rows.start), length)[:, None]
        there = torch.arange(length)
        seen = (there >= at - left) & (there <= at + right)
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)
    return out


@pytest.fixture(params=[2, 3], ids="FlashAttention {}".format)
def where(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, if torch's operator reads blocks there."""
    flash3 = request.param == 3
    if not attention_torch.absent():
        if flash3 != attention_torch.has_flash3():
            pytest.skip("torch calls another here")
        return device
    monkeypatch.setattr(attention_torch, "_varlen_attn", lambda: varlen)
    for name in ("has_flash3", "_flash3"):
        monkeypatch.setattr(attention_torch, name, lambda: flash3)
    return torch.device("cpu")


@pytest.mark.parametrize("seed", range(8))
def test_attention(seed: int, paged: Callable[..., Any], where: torch.device) -> None:
    """Any mix of chunks, single rows and sequences without rows; causal or not, windows."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parts = [(40, 1)]
    for _ in range(rng.choice([0, 2, 3])):
        length = rng.choice([1, 15, 16, 17, rng.randint(1, 90)])
        parts.append((length, rng.choice([0, 1, min(length, 5), rng.randint(1, length)])))
    dtype = rng.choice(list(attention_torch.TOLERANCE))
    size = rng.choice([1, 16, 32]) if attention_torch.has_flash3() else attention_torch.PAGE
    kv_heads, group = rng.choice([(1, 4), (2, 1), (2, 3)])
    batch = paged(parts, size, kv_heads * group, kv_heads, rng.choice([64, 128]), dtype, seed)
    batch = replace(batch, ragged=replace(batch.ragged, table=spread(batch.ragged.table)))
    facts = {"scale": 0.2, "causal": rng.random() < 0.7, "window": rng.choice([None, 1, 7, 64])}
    given = batch.to(where)
    call = given.q, given.k_cache, given.v_cache, given.ragged
    assert attention.obstacle("torch", "cuda", *call, **facts) == ""
    got = attention_torch.attention(*call, **facts)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=attention_torch.TOLERANCE[dtype], rtol=0)
    assert attention_torch.attention(given.q[:0], *call[1:], **facts).shape == (0, *got.shape[1:])


def spread(x: Tensor) -> Tensor:
    """The same numbers, every second column of a wider tensor."""
    return x.repeat_interleave(2, 1)[:, ::2]


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"sinks": torch.ones(4)}, "it knows no attention sinks"),
    ({"slopes": torch.ones(4), "softcap": 30.0}, "it knows no ALiBi and no soft cap"),
    ({"chunk": 8}, "it knows no chunks"),
    ({"sparse": (16, 1, 2, 0, 0)}, "it knows no block-sparse layers"),
    ({"dtype": torch.float32}, "it takes float16 and bfloat16, not float32"),
    ({"dim": 72 + 4}, "it takes heads of multiples of 8 up to 256, not 76"),
    ({"dim": 512}, "it takes heads of multiples of 8 up to 256, not 512"),
    ({"value_dim": 64}, "it takes no latent in which the values are part of the keys"),
    ({"size": 16}, r"takes blocks of multiples of 256 tokens, not 16 \(--block-size\)"),
    ({"quantised": True}, r"keys and values of the queries' type alone \(--kv-cache-dtype\)"),
]


@pytest.mark.parametrize(("facts", "reason"), UNFIT, ids=lambda given: str(given)[:20])
def test_attention_that_it_cant_do(facts: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact that another backend heeds has a reason, with which a forced call fails."""
    monkeypatch.setattr(attention_torch, "absent", lambda: "")
    monkeypatch.setattr(attention_torch, "has_flash3", lambda: False)
    facts = dict(facts)
    dtype, dim = facts.pop("dtype", torch.bfloat16), facts.pop("dim", 64)
    cache = torch.empty(2, facts.pop("size", 256), 2, dim, dtype=dtype, device="meta")
    kept = Quantised(cache, cache[..., 0]) if facts.pop("quantised", False) else cache
    call = torch.empty(3, 4, dim, dtype=dtype, device="meta"), kept, kept, None
    with pytest.raises(ValueError, match=f"attention by the torch backend: .*{reason}"):
        attention.backend("torch", "cuda")(*call, scale=1.0, **facts)


@pytest.mark.parametrize(
    ("gpu", "version", "reason"),
    [
        ("", "2.13.0", "NVIDIA's alone"),
        ("gfx942", "2.13.0", "NVIDIA's alone"),
        ("sm_75", "2.13.0", "needs sm_80, this GPU is sm_75"),
        ("sm_90", "2.11.0+cu128", r"varlen_attn of torch 2.11.0\+cu128 has no block tables; 2.12 has"),
        ("sm_90", "2.12.0", r"by FlashAttention 3 alone \(flash_attn_interface, Hopper\), which isn't there"),
        ("sm_120", "2.13.0", "^$"),
    ],
)
def test_where_attention_can_t_be_had(gpu: str, version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_torch, "kind_of_gpu", lambda: gpu)
    monkeypatch.setattr(attention_torch, "has_flash3", lambda: False)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(attention_torch.absent())


EXPERTS: list[dict[str, Any]] = [{}, {"on_input": True}, {"gate": False}, {"first": 2}, {"first": -3, "limit": 0.5}]


@pytest.mark.parametrize("dtype", list(moe_torch.TOLERANCE), ids=str)
@pytest.mark.parametrize("facts", EXPERTS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_experts(rows: int, facts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """All of them, those from the third on, or as one rank has them whose last ones nobody chose."""
    torch.manual_seed(0)
    x = torch.randn(rows, 40, device=device).to(dtype)
    index, weight = route(torch.randn(rows, 6, device=device), Routing(2))
    gate = facts.get("gate", True)
    up = (torch.randn(6, 96 if gate else 48, 40, device=device) / 6).to(dtype)
    down = (torch.randn(6, 40, 48, device=device) / 6).to(dtype)
    facts = {"activation": "silu"} | facts
    before = x.clone()
    got = moe_torch.stacked_experts(x, index, weight, up, down, **facts)
    want = stacked_experts.reference(x, index, weight, up, down, **facts)
    size = moe_torch.TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=size, rtol=size)
    assert torch.equal(x, before)


def test_experts_that_it_cant_do() -> None:
    x, index = torch.empty(3, 40, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    up, down = torch.empty(6, 96, 40, dtype=torch.bfloat16), torch.empty(6, 40, 48, dtype=torch.bfloat16)
    call = {"x": x, "index": index, "weight": index, "up": up, "down": down}
    assert moe_torch.unfit(**call) == ""
    assert moe_torch.unfit(**call, deterministic=True)
    assert moe_torch.unfit(**call, down_bias=x[0]) == "it knows no biases"
    assert moe_torch.unfit(**call | {"x": x.float()}) == "it takes bfloat16 alone"
    assert (
        moe_torch.unfit(**call | {"down": down[..., :-4]}) == "it takes matrices whose rows are multiples of 16 bytes"
    )
