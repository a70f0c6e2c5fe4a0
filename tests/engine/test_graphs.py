"""Decoding steps by recordings of a few sizes, with a fake one on the CPU: padding changes no token."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waiting import until

from kvasir.engine import graphs, rows
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.graphs import CudaCapture, Graphs, fill, graphs_of, sizes_of, unrecordable
from kvasir.engine.llm import LLM
from kvasir.engine.load import check_attention, check_layers
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.rank import Rank
from kvasir.engine.request import SamplingParams
from kvasir.engine.share import share_of
from kvasir.engine.spec import BlockSparse, Experts, Latent, Layer, Rope, Spec
from kvasir.engine.step import NewSequence, Slice, Step
from kvasir.engine.weights import random_decoder
from kvasir.kernels import attention_torch
from kvasir.kernels.attention import attention
from kvasir.kernels.moe import stacked_experts
from kvasir.kernels.ragged import Ragged

CPU = torch.device("cpu")
SPEC = Spec(
    vocab=50, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, eps=1e-5, max_len=64,
    layers=(Layer(Rope(10000.0, 8)),) * 2,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=None)


@pytest.mark.parametrize(
    ("served", "most", "expected"),
    [
        (1, None, [1]),
        (3, None, [1, 2, 3]),
        (20, None, [1, 2, 4, 8, 16, 20]),
        (256, 4, [1, 2, 4]),
        (256, 1000, [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16)]),
    ],
)
def test_sizes(served: int, most: int | None, expected: list[int]) -> None:
    assert sizes_of(served, most) == expected


def test_large_sizes_end_at_what_is_served() -> None:
    found = sizes_of(1000)
    assert found[-1] == 512
    assert found == sorted(set(found))


def test_filling_repeats_a_row() -> None:
    buffer = torch.zeros(5, 4)
    fill(buffer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
    assert buffer.tolist() == [[1, 2, 0, 0], *([[3, 4, 0, 0]] * 4)]
    line = torch.zeros(3)
    fill(line, torch.tensor([7.0, 8.0, 9.0]), 0)
    assert line.tolist() == [7, 8, 9]


class Recorder:
    """Runs what it was given again, instead of a device; counts."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        run()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        out = run()

        def replay() -> None:
            self.replayed += 1
            out.copy_(run())

        return replay, out


class Eager:
    """A decoder's CPU kernels go by the lengths on the host, which are the longest possible in a recording: kernels of GPUs
    don't."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.share = decoder, decoder.share
        self.received, self.handed_on = decoder.received, decoder.handed_on

    def part(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor, x: Tensor | None) -> Tensor:
        real = replace(ragged, host_lengths=ragged.lengths.numpy(), plans={})
        return self.decoder.part(tokens, real, cache, rows, x)


def made(mesh: Mesh | None = None) -> Decoder:
    """A rank's part of a model whose tokens differ."""
    share = share_of(SPEC, mesh) if mesh is not None else None
    decoder = random_decoder(SPEC, torch.float32, CPU, seed=1, pack=False, share=share)
    for parameter in decoder.parameters():
        parameter.data.mul_(8)
    decoder.pack()
    return decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return made()


def decode(
    decoder: Decoder, record: Recorder | None, free: int = 1 << 40, longest: int = 64, idle: int = 0
) -> list[tuple[int, ...]]:
    """Tokens of 20 steps of five sequences, the last of which ends early, so that sizes change; behind the second step so many
    in which nobody waits."""
    mesh, share = decoder.mesh, decoder.share
    cache = KVCache(share.spec, 40, 4, torch.float32, CPU, layers=share.layers)
    cache.arena.zero_()
    rank = Rank(decoder, cache, max_num_seqs=8, max_model_len=64)
    rank.lags = mesh.place.size > 1 and mesh.place.pp == 1

    def run(step: Step) -> tuple[int, ...]:
        found = list(rank.run(step).token_ids)
        if mesh.place.pp > 1:  # all are told what one has sampled
            tokens = torch.tensor(found or [0] * sum(part.sample for part in step.slices))
            mesh.world.broadcast(tokens, (mesh.place.pp - 1) * mesh.place.tp).wait()
            rank.learn(step.id, found := tokens.tolist())
        return tuple(found)

    if record is not None:
        own = mesh.stage_agrees, mesh.apart
        rank.forward = Graphs(Eager(decoder), cache, [1, 2, 4, 8], longest, record, lambda: free, *own)
    prompts = [[4, 8, 15], [16, 23, 42, 1, 2, 3, 5], [7], [9, 9, 9], [1, 2, 3, 4, 5, 6]]
    blocks, given = iter(range(40)), []
    new, slices = [], []
    for seat, prompt in enumerate(prompts):
        new.append(NewSequence(seat, prompt, len(prompt), GREEDY, seed=seat, stop_token_ids=frozenset()))
        given.append((seat, 0, [next(blocks) for _ in range(8)]))
        slices.append(Slice(seat, 0, len(prompt), sample=True))
    found = [run(Step(0, new=new, blocks=given, slices=slices))]
    for step in range(1, 20):
        seats = range(5 if step < 8 else 3 if step < 14 else 1)
        slices = [Slice(seat, len(prompts[seat]) + step - 1, 1, sample=True) for seat in seats]
        found.append(run(Step(step, slices=slices)))
        for _ in range(idle if step == 1 else 0):
            rank.run(Step(step, record=True))
    return found


def test_a_padded_batch_gives_the_same_tokens(decoder: Decoder) -> None:
    """Steps of 5, 3 and 1 rows go by recordings of 8, 4 and 1, each made once, by the first step of its size."""
    record = Recorder()
    assert decode(decoder, record) == decode(decoder, None)
    assert record.captured == 3
    assert record.replayed == 19 - 3


def reuse(decoder: Decoder, record: Recorder | None) -> tuple[list[list[int]], Tensor]:
    """(tokens, what the cache holds then) of three sequences, the shortest of which ends, and whose block another one gets."""
    cache = KVCache(SPEC, 8, 8, torch.float32, CPU)
    cache.arena.zero_()
    rank = Rank(decoder, cache, max_num_seqs=4, max_model_len=16)
    if record is not None:
        rank.forward = Graphs(Eager(decoder), cache, [4], 16, record, lambda: 1 << 40)
    prompts, found = [[4, 8], [16, 23, 42, 1, 2], [7, 9, 9, 9]], []

    def enter(seat: int, ids: list[int], block: int) -> dict[str, Any]:
        new = NewSequence(seat, ids, len(ids), GREEDY, seed=seat, stop_token_ids=frozenset())
        return {"new": [new], "blocks": [(seat, 0, [block])], "slices": [Slice(seat, 0, len(ids), sample=True)]}

    for seat, ids in enumerate(prompts):
        found.append(rank.run(Step(seat, **enter(seat, ids, seat))).token_ids)
    lengths = [len(ids) for ids in prompts]
    for step in range(3, 8):
        if step == 5:  # seat 0 is another sequence's, in the same block
            found.append(rank.run(Step(step, freed=(0,), **enter(0, [30, 31, 32, 33, 34, 35], 0))).token_ids)
            lengths[0] = 6
            continue
        slices = [Slice(seat, lengths[seat], 1, sample=True) for seat in range(3)]
        found.append(rank.run(Step(step, slices=slices)).token_ids)
        lengths = [length + 1 for length in lengths]
    return [list(ids) for ids in found], cache.arena.view(torch.float32)


def test_padding_writes_where_something_is_written_anyway(decoder: Decoder) -> None:
    """What filled a recording up in an earlier step may be where another sequence's keys are now."""
    record = Recorder()
    tokens, held = reuse(decoder, record)
    expected, kept = reuse(decoder, None)
    assert record.replayed == 3
    assert tokens == expected
    torch.testing.assert_close(held, kept, atol=1e-5, rtol=1e-5)


def test_what_is_too_long_or_has_no_room_runs_eagerly(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    expected = decode(decoder, None)
    short, none = Recorder(), Recorder()
    assert decode(decoder, short, longest=12) == expected
    assert 0 < short.replayed < 16
    assert decode(decoder, none, free=0) == expected
    assert none.captured == 0
    assert "no further CUDA graphs" in caplog.text


def test_what_waits_for_the_device_is_given_up(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Recorder):
        def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            self.captured += 1
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    record = Fails()
    assert decode(decoder, record) == decode(decoder, None)
    assert record.captured == 1
    assert "not permitted" in caplog.text


OnRanks = Callable[[int, int, Callable[[Mesh], Any]], list[Any]]


@pytest.mark.parametrize("idle", [0, 4])
def test_tensor_parallel_ranks_record_in_the_same_steps(on_ranks: OnRanks, idle: int) -> None:
    """Exchanges are part of what is replayed; sizes are those that steps have, or one by one while nobody waits."""

    def work(mesh: Mesh) -> Any:
        decoder, record = made(mesh), Recorder()
        return decode(decoder, None), decode(decoder, record, idle=idle), record.captured, record.replayed

    for plain, found, captured, replayed in on_ranks(2, 1, work):
        assert found == plain
        assert len(set(found)) > 5
        assert (captured, replayed) == ((4, 18) if idle else (3, 16))


@pytest.mark.parametrize("idle", [0, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_stages_record_what_lies_between_their_exchanges(on_ranks: OnRanks, tp: int, idle: int) -> None:
    """Each for itself; what is handed on has as many rows as the step, and is no memory of the recording."""

    def work(mesh: Mesh) -> Any:
        stage, record, sent = made(mesh), Recorder(), list[tuple[Tensor, Tensor]]()
        plain, send = decode(stage, None), mesh.send

        def kept(x: Tensor) -> None:
            sent.append((x, x.clone()))
            send(x)

        mesh.send = kept  # type: ignore[method-assign]
        return plain, decode(stage, record, idle=idle), record.captured, record.replayed, sent

    for number, (plain, found, captured, replayed, sent) in enumerate(on_ranks(tp, 2, work)):
        assert found == plain
        assert len(set(found)) > 5
        assert (captured, replayed) == ((4, 18) if idle else (3, 16))
        assert all(torch.equal(x, then) for x, then in sent)
        counts = [20, *[5] * 7, *[3] * 6, *[1] * 6]
        assert [len(x) for x, _ in sent] == (counts if number < tp else [])


def test_a_stage_that_cannot_record_stops_no_other(on_ranks: OnRanks) -> None:
    def work(mesh: Mesh) -> Any:
        stage, record = made(mesh), Recorder() if mesh.place.first else Fails()
        return decode(stage, None), decode(stage, record), record.captured, record.replayed

    (plain, first, *counts), (_, last, *fewer) = on_ranks(1, 2, work)
    assert first == last == plain
    assert (counts, fewer) == ([3, 16], [2, 6])


class Fails(Recorder):
    """From its second recording on."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        done = super().__call__(run)
        if self.captured > 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return done


@pytest.mark.parametrize(("lacks", "captured", "replayed"), [("memory", 0, 0), ("recorder", 2, 6)])
def test_a_rank_that_cannot_record_stops_all(
    on_ranks: OnRanks, lacks: str, captured: int, replayed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What one of them has recorded meanwhile isn't used."""

    def work(mesh: Mesh) -> Any:
        decoder, last = made(mesh), mesh.place.rank == 1
        record = Fails() if last and lacks == "recorder" else Recorder()
        free = 0 if last and lacks == "memory" else 1 << 40
        return decode(decoder, None), decode(decoder, record, free), record.captured, record.replayed

    for plain, found, *counts in on_ranks(2, 1, work):
        assert found == plain
        assert counts == [captured, replayed]
    ends = [record.getMessage() for record in caplog.records if "no further CUDA graphs" in record.getMessage()]
    assert len(ends) == 2
    assert lacks == "memory" or any("another rank can't record this size" in end for end in ends)


class Full(Recorder):
    """Whose memory is full, before anything has run or behind it, from its second size on."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self._before = before

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        if not (self.captured and self._before):
            run()
        if self.captured:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")


@pytest.mark.parametrize("before", [True, False])
def test_a_rank_without_memory_for_a_size_lets_nobody_wait(
    on_ranks: OnRanks, before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The others aren't in the middle of a sum with it, and what all have written meanwhile is written again."""

    def work(mesh: Mesh) -> Any:
        mesh.links = mesh.one_shot = None  # what compiled layers exchange on a CPU can't be left out
        decoder, record = made(mesh), Full(before) if mesh.place.rank == 1 else Recorder()
        return decode(decoder, None), decode(decoder, record), record.captured, record.replayed

    for plain, found, *counts in on_ranks(2, 1, work):
        assert found == plain
        assert counts == [1, 6]
    ends = [record.getMessage() for record in caplog.records if "no further CUDA graphs" in record.getMessage()]
    assert sorted(end.partition("after 1: ")[2] for end in ends) == [
        "CUDA out of memory. Tried to allocate 2.00 GiB", "another rank has no room for this size",
    ]  # fmt: skip


def test_sizes_are_recorded_while_nobody_waits(decoder: Decoder) -> None:
    """The smallest first, over the row of the last step, whose keys and values stay as they are; not once blocks have changed."""
    cache = KVCache(SPEC, 8, 4, torch.float32, CPU)
    cache.arena.zero_()
    rank = Rank(decoder, cache, max_num_seqs=4, max_model_len=16)
    graphs = Graphs(Eager(decoder), cache, [1, 2, 4], 16, Recorder(), lambda: 1 << 40)
    rank.forward = graphs
    new = NewSequence(0, [4, 8], 2, GREEDY, seed=0, stop_token_ids=frozenset())
    rank.run(Step(0, new=[new], blocks=[(0, 0, [1])], slices=[Slice(0, 0, 2, sample=True)], record=True))
    assert not rank.lacks_graphs  # that was no step of single rows
    rank.run(Step(1, slices=[Slice(0, 2, 1, sample=True)]))
    held = cache.arena.clone()
    rank.run(Step(1, record=True))
    assert list(graphs.captured) == [1, 2]
    assert rank.lacks_graphs
    torch.testing.assert_close(cache.arena.view(torch.float32), held.view(torch.float32), atol=1e-6, rtol=1e-6)
    rank.run(Step(2, copies=((1, 2),), record=True))
    assert not rank.lacks_graphs
    rank.run(Step(3, slices=[Slice(0, 3, 1, sample=True)]))
    assert rank.lacks_graphs
    rank.run(Step(3, record=True))
    assert list(graphs.captured) == [1, 2, 4]
    assert len({static.found.data_ptr() for static in graphs.captured.values()}) == 1
    assert not rank.lacks_graphs


def test_an_engine_records_what_is_lacking_while_it_is_idle(data: Callable[[str], Path]) -> None:
    with LLM(str(data("model-stories260k/hf")), num_threads=1, dtype="float32") as llm:
        rank = llm.engine._executor.rank
        decoder = rank.decoder
        assert isinstance(decoder, Decoder)
        ask = partial(llm.generate, ["Once upon"], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        wanted = ask()[0].outputs[0].token_ids
        record = Recorder()
        rank.forward = Graphs(Eager(decoder), rank.cache, [1, 2, 4, 8], 64, record, lambda: 1 << 40)
        assert ask()[0].outputs[0].token_ids == wanted
        assert until(lambda: record.captured == 4)
        assert ask()[0].outputs[0].token_ids == wanted
        assert record.captured == 4
        assert record.replayed > 11


def tensors_of(ragged: Ragged) -> Iterator[Tensor]:
    """All of one step."""
    for part in (ragged, *ragged.others):
        yield from (found for f in fields(Ragged) if isinstance(found := getattr(part, f.name), Tensor))


class Forgetful(Recorder):
    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, run()


def test_what_a_recording_reads_is_kept(decoder: Decoder) -> None:
    """As a CUDA graph, this recorder keeps nothing of what it ran: addresses alone."""
    read: list[weakref.ref[Tensor]] = []

    class Listening(Eager):
        def part(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor, x: Tensor | None) -> Tensor:
            read[:] = [weakref.ref(tensor) for tensor in (tokens, rows, *tensors_of(ragged))]
            return super().part(tokens, ragged, cache, rows, x)

    cache = KVCache(SPEC, 4, 4, torch.float32, CPU)
    cache.arena.zero_()
    rank = Rank(decoder, cache, max_num_seqs=1, max_model_len=16)
    graphs = Graphs(Listening(decoder), cache, [1], 16, Forgetful(), lambda: 1 << 40)
    rank.forward = graphs
    new = NewSequence(0, [4], 1, GREEDY, seed=0, stop_token_ids=frozenset())
    rank.run(Step(0, new=[new], blocks=[(0, 0, [1])], slices=[Slice(0, 0, 1, sample=True)]))
    gc.collect()
    assert list(graphs.captured) == [1]
    assert len(read) == 7
    assert all(ref() is not None for ref in read)


class Streams:
    """As much of torch.cuda as recording asks of it: which stream is current, and recordings that fail at their end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.fails, self.asked = "main", False, dict[str, Any]()
        streams = self

        class Recording:
            def __init__(
                self, graph: Any, pool: Any, stream: Any, mode: str = "global", check_input_liveness: bool = False
            ) -> None:
                streams.asked = {"mode": mode, "check": check_input_liveness}

            def __enter__(self) -> None:
                streams.current = "side"

            def __exit__(self, *args: object) -> None:
                if streams.fails:
                    raise RuntimeError("the capture was invalidated")
                streams.current = "main"

        @contextlib.contextmanager
        def stream(wanted: str) -> Iterator[None]:
            before, self.current = self.current, str(wanted)
            try:
                yield
            finally:
                self.current = before

        class Named(str):
            def wait_stream(self, other: object) -> None: ...

        for name, fake in {
            "Stream": lambda device: Named("side"),
            "current_stream": lambda: Named(self.current),
            "graph_pool_handle": object,
            "CUDAGraph": lambda: type("Graph", (), {"replay": None}),
            "graph": Recording,
            "stream": stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_recording_leaves_its_stream_also_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVASIR_CHECK_GRAPHS", raising=False)
    streams = Streams(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))
    capture(lambda: torch.zeros(1))
    assert streams.asked == {"mode": "thread_local", "check": False}
    assert streams.current == "main"
    streams.fails = True
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: torch.zeros(1))
    assert streams.current == "main"


@pytest.mark.parametrize(("value", "checks"), [("1", True), ("0", False)])
def test_what_recordings_read_is_watched_only_on_request(
    value: str, checks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch then looks at every input before each replay, in Python."""
    monkeypatch.setenv("KVASIR_CHECK_GRAPHS", value)
    streams = Streams(monkeypatch)
    CudaCapture(torch.device("cuda"))(lambda: torch.zeros(1))
    assert streams.asked["check"] is checks


def test_on_a_cpu_there_are_none(decoder: Decoder) -> None:
    cache = KVCache(SPEC, 4, 4, torch.float32, CPU)
    assert graphs_of(EngineConfig(), decoder, cache, 64) is decoder


def test_why_steps_are_not_recorded(
    decoder: Decoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, at the start; --enforce-eager says so itself."""
    cache = KVCache(SPEC, 4, 4, torch.float32, CPU)
    monkeypatch.setattr(attention, "choices", lambda device: ["triton", "plain"])
    monkeypatch.setattr(stacked_experts, "choices", lambda device: ["triton", "plain"])
    assert not unrecordable(decoder)
    mixture = copy(decoder)
    mixture.spec = replace(SPEC, experts=Experts(count=2, per_token=1, ffn=8))
    assert not unrecordable(mixture)
    monkeypatch.setattr(stacked_experts, "choices", lambda device: ["plain"])
    assert "experts that run one by one" in unrecordable(mixture)
    plain = copy(decoder)
    plain.attention_backend = "plain"
    assert "attention by its definition" in unrecordable(plain)
    dealt = copy(decoder)
    dealt.mesh = Mesh(Place(2, 1, 0))
    assert "experts" not in unrecordable(dealt)
    dealt.device = torch.device("cuda")
    together: list[str] = []  # one may come later than an exchange would wait
    dealt.mesh.assemble = lambda: together.append("here")
    monkeypatch.setattr(dealt.mesh, "stage_agrees", lambda yes: False)
    with caplog.at_level("INFO"):
        assert graphs_of(EngineConfig(), dealt, cache, 64) is dealt
        assert graphs_of(EngineConfig(enforce_eager=True), dealt, cache, 64) is dealt
    assert together
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs: another rank has none; every kernel of a step is launched by Python"
    ]


def test_stages_record_no_step_whose_rows_are_dealt_out(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without the recording would hand on other rows."""
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Recorder())
    monkeypatch.setattr(rows, "GPU_ELEMENTS", 100 * SPEC.hidden)
    cache = KVCache(SPEC, 4, 4, torch.float32, CPU)
    for pp, most in ((1, 256), (2, 192)):
        staged = copy(decoder)
        staged.device, staged.mesh = torch.device("cuda"), Mesh(Place(2, pp, 0), device=torch.device("cuda"))
        monkeypatch.setattr(staged.mesh, "stage_agrees", bool)
        monkeypatch.setattr(attention, "choices", lambda device: ["triton", "plain"])
        found = graphs_of(EngineConfig(max_num_seqs=256), staged, cache, 64)
        assert isinstance(found, Graphs)
        assert found.sizes[-1] == most


def test_each_engine_has_its_own_backend_of_attention(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one process don't share it; one that isn't there is refused with the flag's name."""
    other = random_decoder(SPEC, torch.float32, CPU, seed=1)
    plain, calls = attention.reference, []

    @wraps(plain)
    def counted(*args: Any, **facts: Any) -> Tensor:
        calls.append(args)
        return plain(*args, **facts)

    monkeypatch.setattr(attention, "reference", counted)
    other.attend_by("plain")
    decode(decoder, None)
    assert not calls
    decode(other, None)
    assert calls
    other.attend_by("auto")
    calls.clear()
    decode(other, None)
    assert not calls
    with pytest.raises(ConfigError, match="--attention-backend: there is no triton backend on cpu here"):
        check_attention(EngineConfig(attention_backend="triton"), CPU)


BY_TORCH = EngineConfig(attention_backend="torch", block_size=256)


@pytest.mark.parametrize(
    ("config", "facts", "kept", "why"),
    [
        (
            BY_TORCH,
            {"sinks": True},
            torch.bfloat16,
            "torch can't run this model: it knows no attention sinks; leave it out",
        ),
        (BY_TORCH, {"alibi": 1.0}, torch.bfloat16, "it knows no ALiBi"),
        (BY_TORCH, {"latent": Latent(16, 8, 8, 8)}, torch.bfloat16, "it takes no latent"),
        (BY_TORCH, {"layers": (Layer(), Layer(chunk=8))}, torch.bfloat16, "it knows no chunks"),
        (BY_TORCH, {}, torch.int8, "--kv-cache-dtype"),
        (replace(BY_TORCH, block_size=16), {}, torch.bfloat16, "--block-size"),
        (BY_TORCH, {"layers": (Layer(), Layer(window=8))}, torch.bfloat16, None),
        (replace(BY_TORCH, attention_backend="triton", block_size=16), {"sinks": True}, torch.int8, None),
    ],
    ids=str,
)
def test_what_a_forced_backend_lacks_is_said_at_the_start(
    config: EngineConfig, facts: dict[str, Any], kept: torch.dtype, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the layers of the model, without weights or a GPU."""
    monkeypatch.setattr(attention_torch, "absent", lambda: "")
    monkeypatch.setattr(attention_torch, "has_flash3", lambda: False)
    refused = (
        contextlib.nullcontext() if why is None else pytest.raises(ConfigError, match=f"--attention-backend.*{why}")
    )
    with refused:
        check_layers(config, share_of(replace(SPEC, **facts)), torch.bfloat16, torch.device("cuda"), kept)


def test_the_compiled_kernels_are_forced_or_refused() -> None:
    """Block-sparse layers would run in torch."""
    config, sparse = EngineConfig(attention_backend="native"), Layer(sparse=BlockSparse(8, 1, 2))
    check_layers(config, share_of(SPEC), torch.float32, CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"--attention-backend native can't run this model: .*block-sparse"):
        check_layers(config, share_of(replace(SPEC, layers=(sparse,))), torch.float32, CPU, torch.float32)
