"""Predictions of layouts: memory as it really is, every layout once, and what doesn't fit said so."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.engine.arch import load_spec
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.cpu_device import BEFORE, CHUNK, ROWS, cpu_device, device_of, few, sample_of, stepped
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import layout
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.parallel_plan import GB, WIRE, WIRE_LATENCY, Device, find_device, plan, plans
from kvasir.engine.share import share_of, stages
from kvasir.engine.spec import Experts, Layer, Rope, Spec
from kvasir.engine.weights import load_decoder, random_decoder, weight_bytes
from kvasir.kernels.linear import Packed, PackedHeads

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


def test_layouts_of_one_rank_beside_whole_experts() -> None:
    """--enable-expert-parallel is refused where there is one tensor-parallel rank; `kvasir plan` shows such layouts as they run
    without it."""
    spec = dataclasses.replace(SPEC, layers=(Layer(experts=True),) * 6, experts=Experts(count=4, per_token=2, ffn=8))
    dealt = dataclasses.replace(CONFIG, enable_expert_parallel=True)
    one, other = (
        plan(config, spec, torch.bfloat16, SMALL, Place(), 1, streams=4, length=512) for config in (CONFIG, dealt)
    )
    assert one == other


def storage(module: torch.nn.Module) -> int:
    """Bytes of all tensors of a module, parameters or not, each memory once. What is packed counts as its matrix's size."""
    found = {}
    for part in module.modules():
        for order in vars(part).values():
            if isinstance(order, (Packed, PackedHeads)):
                count = len(order.blocks) if isinstance(order, PackedHeads) else 1
                found[order.blocks.data_ptr()] = count * order.outputs * order.inputs * order.blocks.itemsize
        tensors = [
            *part.parameters(recurse=False),
            *(value for value in vars(part).values() if isinstance(value, Tensor)),
        ]
        for tensor in tensors:
            opaque = tensor.layout is not torch.strided
            memory = None if opaque else tensor.untyped_storage()
            found[id(tensor) if memory is None else memory.data_ptr()] = (
                tensor.nbytes if memory is None else memory.nbytes()
            )
    return sum(found.values())


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"hidden_size": 256, "intermediate_size": 700, "head_dim": 64, "tie_word_embeddings": True},
    "Mixtral": {"hidden_size": 256, "intermediate_size": 300, "num_local_experts": 4},
    "DeepseekV2": {
        "hidden_size": 256, "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 64, "n_shared_experts": 2, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_of_loaded_shares(family: str, tp: int, pp: int, checkpoint: Any) -> None:
    """Within 2 % on every rank, as `kvasir plan` says it and as a rank divides its memory by it."""
    folder, _ = checkpoint(family, vocab_size=1003, **FAMILIES[family])
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    dtype, held = torch.bfloat16, []
    for rank in range(tp * pp):
        share = share_of(spec, Mesh(Place(tp, pp, rank)))
        held.append(storage(load_decoder(folder, spec, dtype=dtype, device=CPU, share=share)))
        assert held[-1] == pytest.approx(weight_bytes(spec, dtype, CPU, share), rel=0.02)
    if not spec.tied:  # a CPU keeps the head twice, once for the embedding
        found = plan(CONFIG, spec, dtype, SMALL, Place(tp, pp), 1, streams=4, length=64)
        assert max(held) == pytest.approx(found.weights, rel=0.02)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)])
def test_traffic_is_what_ranks_really_send(tp: int, pp: int, on_ranks: Any, ragged: Any) -> None:
    """A token of each of eight sequences, over gloo."""

    def work(mesh: Mesh) -> float:
        mesh.one_shot = None
        share = share_of(SPEC, mesh)
        decoder = random_decoder(SPEC, torch.bfloat16, CPU, share=share)
        cache = KVCache(share.spec, 8, 16, torch.bfloat16, CPU, layers=share.layers)
        decoder(torch.arange(8), ragged([([block], 0, 1) for block in range(8)], 16), cache, torch.arange(8))
        return mesh.traffic.bytes / 8

    found = plan(CONFIG, SPEC, torch.bfloat16, SMALL, Place(tp, pp), 1, streams=8, length=512)
    assert max(on_ranks(tp, pp, work)) == pytest.approx(found.traffic, rel=0.02)


def test_every_layout_once_and_the_best_first() -> None:
    found = plans(CONFIG, SPEC, torch.bfloat16, SMALL, 4, streams=8, length=512)
    assert {(p.tp, p.pp, p.dp) for p in found} == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}
    assert found[0].tokens_s >= found[-1].tokens_s
    assert (found[0].tp, found[0].traffic) == (1, 0.0), "what fits on one device needs no exchange"


def test_nodes_are_far_from_each_other() -> None:
    """What a sum or a hand-over takes goes by the link that it needs."""
    gpu = dataclasses.replace(SMALL, node=4)
    assert gpu.placed(Place(4, 1)) == gpu
    sums = gpu.placed(Place(8, 1))
    assert (sums.link, sums.latency) == (WIRE, WIRE_LATENCY)
    assert gpu.placed(Place(3, 1)).link == WIRE  # the second copy's ranks are on two nodes
    stages_apart = gpu.placed(Place(4, 2))
    assert (stages_apart.link, stages_apart.message_link, stages_apart.message) == (gpu.link, WIRE, WIRE_LATENCY)
    near, far = (
        plan(CONFIG, SPEC, torch.bfloat16, dataclasses.replace(SMALL, node=n), Place(8, 1), 1, streams=64, length=512)
        for n in (8, 4)
    )
    assert far.step_s > near.step_s
    assert dataclasses.replace(gpu, kind="cpu").placed(Place(8, 1)).link == gpu.link


def test_layouts_that_a_model_can_t_have_are_left_out() -> None:
    config = EngineConfig(enable_expert_parallel=True)
    spec = dataclasses.replace(SPEC, experts=Experts(4, 2, 64), layers=(Layer(Rope(1e4, 8), experts=True),) * 6)
    found = plans(config, spec, torch.bfloat16, SMALL, 8, streams=8, length=512)
    assert {one.tp for one in found} == {1, 2, 4}
    with pytest.raises(ConfigError, match="this model has no experts"):
        plans(config, SPEC, torch.bfloat16, SMALL, 4, streams=8, length=512)
    parted = EngineConfig(pipeline_layer_partition=(2, 4))
    found = plans(parted, SPEC, torch.bfloat16, SMALL, 4, streams=8, length=512)
    assert {one.pp for one in found} == {2}


def test_experts_whole_and_in_slices() -> None:
    """Both are listed, whole ones alone where they are asked for. By chance one rank has more of the experts that a step reads
    than another, which tells with few streams and hardly with many."""
    spec = dataclasses.replace(SPEC, experts=Experts(64, 4, 64), layers=(Layer(Rope(1e4, 8), experts=True),) * 6)
    slow = Device(GB, 1e9, 1e15, 1e11)
    slower = []
    for streams in (1, 256):
        found = plans(CONFIG, spec, torch.bfloat16, slow, 4, streams=streams, length=16)
        assert {(p.tp, p.pp, p.whole_experts) for p in found} == {
            (1, 1, False), (1, 2, False), (1, 4, False),
            (2, 1, False), (2, 2, False), (4, 1, False), (2, 1, True), (2, 2, True), (4, 1, True),
        }  # fmt: skip
        sliced, whole = sorted((p for p in found if p.tp == 4), key=lambda p: p.whole_experts)
        assert sliced.weights == whole.weights
        slower.append(whole.step_s / sliced.step_s)
    assert slower[0] > 1.5
    assert 1 <= slower[1] < 1.1


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


MEASURED = Device(
    GB, bandwidth=1e10, rate=1e12, link=1e8, latency=1e-4, message=3e-4, layer=1e-5, kind="cpu",
    products=((1, 1e10), (4, 8e9), (8, 5e9)),
)  # fmt: skip


@pytest.mark.parametrize(("rows", "speed"), [(1, 1e10), (4, 8e9), (6, 2 / (1 / 8e9 + 1 / 5e9)), (8, 5e9), (16, 2.5e9)])
def test_products_go_by_what_was_measured(rows: int, speed: float) -> None:
    """Between two counts of rows, and beyond the last one in proportion."""
    assert MEASURED.product(1e9, 1e9, rows) == pytest.approx(1e9 / speed)
    assert MEASURED.product(1e9, 1e9 / 4, 4 * rows) == pytest.approx(1e9 / speed), (
        "a row meets a quarter of the weights"
    )


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Products, layers, keys and values, sums over ranks, hand-overs: each as often as it happens."""
    tied = dataclasses.replace(SPEC, tied=True)

    def step(tp: int, pp: int) -> float:
        return plan(CONFIG, tied, torch.bfloat16, MEASURED, Place(tp, pp), 1, streams=8, length=64).step_s

    layers, table = 6 * (64 * (8 + 2 * 4 + 8) * 8 + 3 * 64 * 256) * 2, 1000 * 64 * 2
    kept, norms = 8 * 64 * 6 * 2 * 4 * 8 * 2 / 1e10, 2 * 64 * 13
    assert step(1, 1) == pytest.approx((layers + table + norms) / 5e9 + kept + 6 * 1e-5, rel=1e-3)
    half = layers / 2 + table / 2 + norms
    sums = (2 * 6 + 1 + 1) * 1e-4 + ((2 * 6 + 1) * 8 * 64 * 2 + 8 * 500 * 2) / 1e8
    assert step(2, 1) == pytest.approx(half / 5e9 + kept / 2 + 6 * 1e-5 + sums, rel=1e-3)
    stages_ = [layers * count / 6 + table * last for count, last in ((4, 0), (2, 1))]
    part = max(size / 8e9 for size in stages_)  # four rows each; the first stage looks the embedding up
    found = step(1, 2)
    assert found == pytest.approx(2 * part + kept / 2 * 4 / 3 + 2 * 4e-5 + 3e-4, rel=0.1)


def test_a_prompt_is_the_sum_of_its_pieces() -> None:
    """Products of as many rows as a step takes, one row of logits each, attention over what came before; stages overlap."""
    tied, length = dataclasses.replace(SPEC, tied=True), 1024

    def prompt(tp: int, pp: int, budget: int = 256) -> float:
        config = dataclasses.replace(CONFIG, max_num_batched_tokens=budget)
        return plan(config, tied, torch.bfloat16, MEASURED, Place(tp, pp), 1, streams=8, length=length).prompt_s

    layers, head = 6 * (64 * (8 + 2 * 4 + 8) * 8 + 3 * 64 * 256) * 2, 1000 * 64 * 2
    attention = 4 * 256 * length / 2 * 8 * 8 * 6 / 1e12
    kept = length / 2 * 6 * 2 * 4 * 8 * 2 / 1e10
    whole = layers / 5e9 * 256 / 8 + 6 * 1e-5 + attention + kept
    assert prompt(1, 1) == pytest.approx(4 * whole + head / 1e10, rel=1e-2)
    assert prompt(1, 1, 1024) < prompt(1, 1) * 1.01
    half = layers / 2 / 5e9 * 128 / 8 + 3e-4 + 128 * 64 * 2 / 1e8  # pieces of 1024 / (4 x 2) rows
    assert prompt(1, 2) == pytest.approx((8 + 1) * (4 / 3 * half), rel=0.3)
    sums = 13 * (1e-4 + 256 * 64 * 2 / 1e8)
    split = layers / 2 / 5e9 * 256 / 8 + 6 * 1e-5 + attention / 2 + kept / 2 + sums
    logits = head / 2 / 1e10 + 1e-4 + 500 * 2 / 1e8
    assert prompt(2, 1) == pytest.approx(4 * split + logits, rel=1e-2)


def test_stages_that_wait_for_each_other_have_the_memory_for_themselves() -> None:
    """One stream passes through two stages one after the other, as fast as a rank alone is, and so do a prompt's first piece and
    its last; eight streams are in both at once. Two in four stages: a third of the way between."""
    fast = dataclasses.replace(MEASURED, products=tuple((rows, 2 * speed) for rows, speed in MEASURED.products))
    free = {"layer": 0.0, "message": 0.0, "link": 1e30, "bandwidth": 1e30}

    def ratio(pp: int, streams: int, what: str) -> float:
        """To what ranks would take that are never alone."""
        crowded = dataclasses.replace(MEASURED, ranks=pp, **free)
        shared = dataclasses.replace(crowded, alone=dataclasses.replace(fast, **free))
        one, other = (
            plan(CONFIG, SPEC, torch.bfloat16, device, Place(1, pp), 1, streams=streams, length=512)
            for device in (shared, crowded)
        )
        return float(getattr(one, what) / getattr(other, what))

    assert ratio(2, 1, "step_s") == pytest.approx(0.5)
    assert ratio(2, 8, "step_s") == pytest.approx(1.0)
    assert ratio(4, 2, "step_s") == pytest.approx(0.5 + 0.5 / 3)
    assert ratio(2, 1, "prompt_s") == pytest.approx(1 - 0.5 * 2 / (2 + 7 * 4 / 3), rel=0.02)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of two ranks is a real one."""
    monkeypatch.setattr("kvasir.engine.cpu_device.MOST_LAYERS", 4)  # 32 of them take half a minute
    found = cpu_device(2, SPEC, 2, torch.float32, 1)
    assert found.kind == "cpu"
    assert [rows for rows, _ in found.products] == list(ROWS)
    figures = [found.memory, found.bandwidth, found.rate, found.link, found.latency, found.message, found.attention]
    assert all(figure and 0 < figure < float("inf") for figure in figures)
    assert 0 <= min(found.layer, found.row) <= max(found.layer, found.row) < 1
    assert 1e8 < found.bandwidth < 1e12
    assert 1e-7 < found.latency < 1
    assert 1e-6 < found.step < 1
    assert found.ranks == 2
    assert found.alone is not None
    assert len(found.alone.products) == len(ROWS)
    assert found.alone.products != found.products


def test_what_layers_take_besides_products() -> None:
    """Told apart from steps of streams, and of two pieces of a prompt of which one has more before it."""
    sample, size = sample_of(SPEC, torch.float32), 4 * 32 * (64 * (8 + 2 * 4 + 8) * 8 + 3 * 64 * 256)
    assert len(sample.layers) == 32
    passes = [max(1e-3, rows * 1e-4) for rows in ROWS]
    scores = 4 * 64 * 32 * CHUNK * 1e-10
    layer, row = 2e-6, 3e-7
    steps = [
        1e-3 + 32 * (layer + 8 * row),
        256e-4 + 32 * (layer + CHUNK * row) + scores * CHUNK / 2,
        256e-4 + 32 * (layer + CHUNK * row) + scores * (BEFORE + CHUNK / 2),
    ]
    found = device_of([*passes, *steps, 1e-5, 2e-5, 1e-4, 8e-4], sample, 8, GB, torch.float32)
    assert found.bandwidth == pytest.approx(size / 1e-3)
    assert found.attention == pytest.approx(1e10)
    assert (found.layer, found.row, found.step) == (pytest.approx(layer), pytest.approx(row), 8e-4)
    assert [few(streams) for streams in (1, 64, 500)] == [1, 64, 64]


@pytest.mark.parametrize("family", FAMILIES)
def test_some_layers_of_any_model_run(family: str, checkpoint: Any) -> None:
    folder, _ = checkpoint(family, vocab_size=1003, **FAMILIES[family])
    spec = sample_of(load_spec(json.loads((folder / "config.json").read_text())), torch.bfloat16)
    spec = dataclasses.replace(spec, layers=spec.layers[:2])
    cache = KVCache(spec, 64, 16, torch.bfloat16, CPU)
    decoder = random_decoder(spec, torch.bfloat16, CPU)
    for step in ((4, 1, 15), (1, CHUNK, BEFORE)):
        stepped(decoder, cache, *step)


def test_an_unknown_device_is_named() -> None:
    assert find_device("h100-80gb").memory == 80 * GB
    with pytest.raises(ConfigError, match=r"--gpu H900: not known; known are A100-40GB"):
        find_device("H900")
