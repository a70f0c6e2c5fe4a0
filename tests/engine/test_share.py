"""What a rank holds: every row of every matrix is on exactly the ranks it should be, whatever the sizes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvasir.engine.attention import Attention
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import layout
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.share import Share, dealt, share_of, stages
from kvasir.engine.spec import Experts, Layer, Spec

SPEC = Spec(vocab=100, hidden=32, heads=8, kv_heads=4, head_dim=4, ffn=50, eps=1e-5, max_len=64, layers=(Layer(),) * 6)


def shares(spec: Spec, tp: int, pp: int = 1, **options: Any) -> list[Share]:
    return [share_of(spec, Mesh(Place(tp, pp, rank)), **options) for rank in range(tp * pp)]


@given(st.integers(1, 300), st.integers(1, 9), st.sampled_from([1, 2, 64]))
def test_things_are_dealt_out_evenly(count: int, size: int, unit: int) -> None:
    parts = [dealt(count, rank, size, unit) for rank in range(size)]
    assert [thing for part in parts for thing in part] == list(range(count))
    if count % unit == 0:
        assert max(map(len, parts)) - min(map(len, parts)) <= unit


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_every_query_head_is_on_one_rank_beside_its_kv_head(kv: int, queries: int, data: st.DataObject) -> None:
    spec = dataclasses.replace(SPEC, heads=kv * queries, kv_heads=kv)
    found = shares(spec, data.draw(st.integers(1, kv * queries)))
    assert [head for share in found for head in share.heads] == list(range(kv * queries))
    for share in found:
        assert share.spec.heads == len(share.heads) > 0
        assert {head // queries for head in share.heads} == set(share.kv_heads)
        assert share.spec.heads % share.spec.kv_heads == 0
        assert share.kv_copies == sum(other.kv_heads == share.kv_heads for other in found)


def test_a_bias_behind_a_sum_is_added_once() -> None:
    spec = dataclasses.replace(SPEC, o_bias=True, mlp_bias=True)
    found = [share.spec for share in shares(spec, 2)]
    assert [(each.o_bias, each.mlp_bias, each.down_bias) for each in found] == [
        (True, True, True),
        (False, True, False),
    ]


def test_experts_are_dealt_out_whole_or_in_slices() -> None:
    spec = dataclasses.replace(
        SPEC, layers=(Layer(experts=True),) * 2, experts=Experts(count=6, per_token=2, ffn=40, shared_ffn=10)
    )
    assert [list(share.experts) for share in shares(spec, 4, expert_parallel=True)] == [[0], [1, 2], [3], [4, 5]]
    sliced = [share.spec.experts for share in shares(spec, 4)]
    assert [(each.ffn, each.shared_ffn) for each in sliced if each] == [(10, 2), (10, 3), (10, 2), (10, 3)]


def test_stages_cost_alike() -> None:
    assert stages(SPEC, 2) == [range(3), range(3, 6)]
    headed = dataclasses.replace(SPEC, vocab=SPEC.ffn * 6)  # a head as dear as two layers
    assert stages(headed, 2) == [range(4), range(4, 6)]
    assert stages(SPEC, 3, (1, 2, 3)) == [range(1), range(1, 3), range(3, 6)]
    assert stages(dataclasses.replace(SPEC, vocab=10**6), 6) == [range(i, i + 1) for i in range(6)]


@pytest.mark.parametrize(
    ("tp", "pp", "options", "says"),
    [
        (9, 1, {}, "--tensor-parallel-size 9: this model has 8 heads, so 1 to 8 work"),
        (1, 7, {}, "--pipeline-parallel-size 7: this model has 6 layers, so 1 to 6 work"),
        (1, 2, {"partition": (3, 4)}, "3,4 must be 2 positive numbers"),
        (1, 2, {"partition": (6, 0)}, "6,0 must be 2 positive numbers"),
        (2, 1, {"expert_parallel": True}, "this model has no experts"),
    ],
)
def test_sizes_that_dont_work_are_refused(tp: int, pp: int, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        shares(SPEC, tp, pp, **options)


def test_more_ranks_than_experts() -> None:
    spec = dataclasses.replace(SPEC, layers=(Layer(experts=True),), experts=Experts(count=3, per_token=2, ffn=8))
    with pytest.raises(ConfigError, match="there are 3 experts, so 1 to 3 work"):
        shares(spec, 4, expert_parallel=True)
    for pp in (1, 2):  # -dp 8 --enable-expert-parallel, as vLLM has it: our copies share no experts
        with pytest.raises(ConfigError, match=r"add --tensor-parallel-size N \(-tp N\)"):
            shares(dataclasses.replace(spec, layers=spec.layers * 2), 1, pp, expert_parallel=True)


def test_every_group_of_layers_has_as_many_in_each_stage() -> None:
    """Else a stage would keep blocks for layers of another."""
    near, far = Layer(window=8), Layer()
    spec = dataclasses.replace(SPEC, layers=(near, near, near, near, near, far) * 4)
    whole = layout(spec, 64)
    parts = stages(spec, 2)
    halved = layout(spec, 64, parts)
    assert (whole.height, halved.height) == (4, 2)
    assert sorted(layer for group in halved.groups for layer in group.layers) == list(range(24))
    assert max(len([n for n in group.layers if n in part]) for group in halved.groups for part in parts) == 2


def test_norms_over_the_heads_of_all_ranks_wait_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that happens to hold all heads: as the norms of whole rows, with no tensor made on the host."""
    spec, cpu = dataclasses.replace(SPEC, qk_norm="row"), torch.device("cpu")
    attention = Attention(share_of(spec, Mesh(Place())), Layer(), torch.float32, cpu)
    q, k = torch.randn(3, 32), torch.randn(3, 16)
    norms = attention.q_norm, attention.k_norm
    for norm in norms:
        norm.weight.data.normal_()
    want = [norm(x) for norm, x in zip(norms, (q, k), strict=True)]
    mesh = SimpleNamespace(tensor="joined", reduce=lambda sums: sums)
    attention.share = SimpleNamespace(mesh=mesh, full=spec, kv_copies=1)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor was made on the host"))
    for got, expected in zip(attention._whole_rows(*norms, q, k), want, strict=True):
        torch.testing.assert_close(got, expected)
