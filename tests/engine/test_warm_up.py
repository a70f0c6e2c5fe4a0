"""What a GPU's kernels are compiled by, before the first request."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvasir.engine import executor, sampler, warm_up
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.layout import layout
from kvasir.engine.mesh import Mesh
from kvasir.engine.pooler import Pooler
from kvasir.engine.pooling import Pooling
from kvasir.engine.share import share_of
from kvasir.engine.spec import Latent, Layer, Rope, Spec
from kvasir.engine.step import first_blocks
from kvasir.engine.weights import random_decoder

CPU = torch.device("cpu")
FACTS: dict[str, Any] = {"vocab": 50, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "eps": 1e-5}
ROPE = Rope(10000.0, 8)
SPECS = {
    "dense": Spec(**FACTS, max_len=2000, layers=(Layer(ROPE),) * 2),
    "windows": Spec(**FACTS, max_len=2000, layers=(Layer(ROPE), Layer(ROPE, window=40))),
    "latent": Spec(**FACTS | {"kv_heads": 1}, max_len=2000, latent=Latent(16, 8, 8, 8), layers=(Layer(ROPE),)),
}


def calls(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[set[str]]:
    """What each call of this function gives by name, but for None."""
    found: list[set[str]] = []
    real: Callable[..., Any] = getattr(module, name)

    def noted(*args: Any, **given: Any) -> Any:
        found.append({key for key, value in given.items() if value is not None})
        return real(*args, **given)

    patch.setattr(module, name, noted)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_draw_and_of_attention_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    decoder = random_decoder(spec, torch.float32, CPU)
    cache = KVCache(spec, 200, 16, torch.float32, CPU, layout(spec, 2000))
    seen = {each: calls(monkeypatch, sampler, each) for each in ("draw", "greedy", "penalise", "score")}
    lengths: list[list[int]] = []
    through = decoder.through

    def noted(tokens: Any, ragged: Any, *args: Any) -> Any:
        lengths.append(ragged.host_lengths.tolist())
        return through(tokens, ragged, *args)

    monkeypatch.setattr(decoder, "through", noted)
    warm_up.warm_up(decoder, cache, 2000)
    filters = {frozenset(given - {"most"}) for given in seen["draw"]}
    assert filters == {frozenset(each) for each in ((), ("top_p",), ("top_k", "top_p"), ("min_p",))}
    assert all(seen.values())
    assert [max(step) for step in lengths] == [600, 601, 602]
    assert all(min(step) < 10 for step in lengths)


def test_sequences_share_no_block() -> None:
    """Nor do the groups of layers of one."""
    found = first_blocks([17, 16, 1], 2, 16)
    assert found == [(0, 0, [0, 1]), (0, 1, [2, 3]), (1, 0, [4]), (1, 1, [5]), (2, 0, [6]), (2, 1, [7])]


@pytest.mark.parametrize(("blocks", "length"), [(6, 2000), (200, 20), (1, 2000)])
def test_a_small_cache_is_enough_or_nothing_is_done(blocks: int, length: int) -> None:
    spec = SPECS["dense"]
    cache = KVCache(spec, blocks, 16, torch.float32, CPU)
    warm_up.warm_up(random_decoder(spec, torch.float32, CPU), cache, length)


@pytest.mark.parametrize(
    ("device", "tasks", "wanted"),
    [("cuda", ("generate",), ["tokens"]), ("cpu", ("generate",), []), ("cuda", ("embed",), ["vectors"])],
)
def test_where_it_is_done(
    device: str, tasks: tuple[str, ...], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, told = SPECS["dense"], []
    decoder = random_decoder(spec, torch.float32, CPU)
    decoder.device = torch.device(device)
    monkeypatch.setattr(executor, "Rank", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(executor, "graphs_of", lambda *_: decoder)
    monkeypatch.setattr(executor, "warm_up", lambda *given: told.append(("tokens", given[2])))
    monkeypatch.setattr(executor, "warm_up_vectors", lambda *given: told.append(("vectors", given[2])))
    info = SimpleNamespace(max_model_len=77, tasks=tasks)
    loaded: Any = SimpleNamespace(decoder=decoder, cache=None, info=info, pooler=object(), tiers=None)
    executor.rank_of(EngineConfig(), loaded, None)  # type: ignore[arg-type]
    assert told == [(kind, 77) for kind in wanted]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_models_that_make_vectors(tp: int, pp: int, causal: bool, on_ranks: Any) -> None:
    """One after the other again; where there is no room for it nothing is done."""
    facts: dict[str, Any] = {"causal": causal, "lm_head": False}
    spec, turn = dataclasses.replace(SPECS["dense"], **facts), threading.Lock()

    def work(mesh: Mesh) -> Any:
        share = share_of(spec, mesh)
        decoder, lengths = random_decoder(spec, torch.float32, CPU, share=share), []
        cache = KVCache(share.spec, 100, 16, torch.float32, CPU, layers=share.layers)
        for block in decoder.blocks.values():
            block.register_forward_pre_hook(lambda _, given: lengths.append(given[3].host_lengths.tolist()))
        pooler = Pooler(Pooling(ways=("mean",), width=32), [], CPU)
        with turn:
            warm_up.warm_up_vectors(decoder, cache, 2000, pooler)
        few = KVCache(share.spec, 1, 16, torch.float32, CPU, layers=share.layers)
        warm_up.warm_up_vectors(decoder, few, 2000, pooler)
        return lengths

    assert on_ranks(tp, pp, work) == [[[600, 2]] * (2 // pp)] * (tp * pp)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_a_rank_waits_for_no_other(tp: int, pp: int, on_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other runs what is its own; what they exchange afterwards is as ever."""
    spec, turn = SPECS["dense"], threading.Lock()
    monkeypatch.setattr("kvasir.engine.decoder.stack_of", lambda *_: None)  # kernels of GPUs are launched one by one
    drawn = calls(monkeypatch, sampler, "draw")

    def work(mesh: Mesh) -> Any:
        share = share_of(spec, mesh)
        decoder, layers = random_decoder(spec, torch.float32, CPU, share=share), 0
        cache = KVCache(share.spec, 200, 16, torch.float32, CPU, layers=share.layers)

        def ran(*_: Any) -> None:
            nonlocal layers
            layers += 1

        for block in decoder.blocks.values():
            block.register_forward_hook(ran)
        with turn:
            warm_up.warm_up(decoder, cache, 2000)
        return layers, mesh.least(mesh.place.rank), mesh.reduce(torch.ones(2, 2)).sum().item()

    assert on_ranks(tp, pp, work) == [(3 * 2 // pp, [0], 4.0 * tp)] * (tp * pp)
    assert drawn
