"""Groups of ranks in processes of their own: the same answers as one rank, and a death that is a message."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kvasir.engine import control, worker
from kvasir.engine import load as loading
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import Hub, RankError
from kvasir.engine.errors import ConfigError, UnavailableError, UnsupportedError
from kvasir.engine.event import Event
from kvasir.engine.executor import GroupExecutor, executor_of, hangs, places
from kvasir.engine.frames import HEAD, KINDS, Kind, encode_tickets, send
from kvasir.engine.llm import LLM
from kvasir.engine.mesh import Mesh
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.spoke import Spoke
from kvasir.kernels.native import library

LAYOUTS = [(2, 1), (1, 2), (2, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)


@pytest.fixture(scope="module")
def stories(data: Callable[[str], Path]) -> dict[str, Any]:
    options = {"dtype": "float32", "num_threads": 1, "block_size": 8, "kv_cache_memory_bytes": 1 << 21}
    return {"model": str(data("model-stories260k/hf")), **options}


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}pp{layout[1]}")
def group(request: pytest.FixtureRequest, stories: dict[str, Any]) -> Iterator[LLM]:
    tp, pp = request.param
    options = stories | {"kv_cache_memory_bytes": 1 << 20, "max_num_batched_tokens": 48}
    llm = LLM(**options, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def alone(stories: dict[str, Any]) -> LLM:
    return LLM(**stories, max_num_batched_tokens=48)


def pids(llm: LLM) -> dict[int, int]:
    executor = llm.engine._executor
    assert isinstance(executor, GroupExecutor)
    return {rank: peer.pid for rank, peer in executor._hub._peers.items()}


def gone(pid: int) -> bool:
    return until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_no_exchange_begins_before_all_are_there(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, compilers and weights may take one rank minutes longer than another: while they load, ranks meet on the control
    channel before they meet in an exchange, which has a limit."""
    order: list[str] = []

    def noted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (order.append(name), call(*args, **kwargs))[1]

    for name in ("ModelFiles", "library", "_weights"):
        monkeypatch.setattr(loading, name, noted(name, getattr(loading, name)))
    mesh = Mesh()
    monkeypatch.setattr(mesh, "least", noted("exchange", mesh.least))
    mesh.assemble = noted("meet", mesh.assemble)
    loaded = loading.load(EngineConfig(**stories, kv_disk_path="auto", kv_disk_size=1 << 20), mesh)
    assert loaded.tiers is not None
    loaded.tiers.close()
    parts = ["ModelFiles", "library", "meet", *["exchange"] * 2, "_weights", "meet", *["exchange"] * 2]
    assert order == parts


def test_ranks_meet_while_they_load(group: LLM) -> None:
    executor = group.engine._executor
    assert isinstance(executor, GroupExecutor)
    assert [peer.gathered for peer in executor._hub._peers.values()] == [2] * (executor._hub.size - 1)


def test_documented_tokens(group: LLM, data: Callable[[str], Path]) -> None:
    known = json.loads(data("model-stories260k/greedy_256.json").read_text())
    (output,) = group.generate([known["prompt_ids"]], replace(GREEDY, max_tokens=256), use_tqdm=False)
    assert [*known["prompt_ids"], *output.outputs[0].token_ids][: len(known["greedy_ids"])] == known["greedy_ids"]


def test_a_mixed_batch(group: LLM, alone: LLM) -> None:
    """Chunked prompts, hits in the prefix cache, branches, every kind of sampling, scores; twice, the second time cached."""
    long = "Once upon a time there was a little girl. " * 4
    prompts = [long + "She", long + "Her dog", "The", "One day, Tom", "x", "Lily and Tom"]
    params = [
        SamplingParams(temperature=0, max_tokens=30),
        SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=2, top_k=5, top_p=0.9, max_tokens=25, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=1.5, seed=3, min_p=0.05, max_tokens=40, min_tokens=10, logit_bias={300: 5.0}),
        SamplingParams(temperature=0, max_tokens=9, presence_penalty=1.0, stop=["the"]),
    ]
    for _ in range(2):
        ours, wanted = (llm.generate(prompts, params, use_tqdm=False) for llm in (group, alone))
        for got, want in zip(ours, wanted, strict=True):
            assert [each.token_ids for each in got.outputs] == [each.token_ids for each in want.outputs]
            assert [each.finish_reason for each in got.outputs] == [each.finish_reason for each in want.outputs]
        assert close(ours[3].outputs[0].logprobs, wanted[3].outputs[0].logprobs)
        assert close(ours[3].prompt_logprobs, wanted[3].prompt_logprobs)
    assert (ours[0].num_cached_tokens or 0) >= 40


def test_grammars_where_tokens_are_sampled(group: LLM, alone: LLM) -> None:
    """The rank that samples may be another process than the one that compiled."""
    kinds = [{"regex": "[a-z]{3,9}[.]"}, {"choice": ["once", "upon"]}, {"json_object": True}]
    params = [
        SamplingParams(temperature=1.0, seed=4, max_tokens=40, n=2, structured_outputs=StructuredOutput(**kind))
        for kind in kinds
    ]
    ours, wanted = (llm.generate(["Once", "The", "A"], params, use_tqdm=False) for llm in (group, alone))
    for got, want in zip(ours, wanted, strict=True):
        assert [each.token_ids for each in got.outputs] == [each.token_ids for each in want.outputs]
    assert all(re.fullmatch("[a-z]{3,9}[.]", each.text) for each in ours[0].outputs)
    assert {each.text for each in ours[1].outputs} <= {"once", "upon"}
    for llm in (group, alone):  # which rank compiles says why it can't
        with pytest.raises(UnsupportedError, match="oneOf constraints are not supported") as caught:
            llm.generate(["The"], SamplingParams(structured_outputs=StructuredOutput(json='{"oneOf": [{}, {}]}')))
        assert caught.value.param is None or caught.value.param == "structured_outputs"


def close(ours: Any, wanted: Any) -> bool:
    assert len(ours) == len(wanted)
    pairs = [(a[token].logprob, b[token].logprob) for a, b in zip(ours, wanted, strict=True) if b for token in b]
    return all(abs(a - b) < 1e-4 for a, b in pairs) and len(pairs) > 0


def test_preempted_and_cancelled(group: LLM, alone: LLM) -> None:
    """More than the cache holds: some wait, give up their blocks and come back; some are cancelled in between."""
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=100, ignore_eos=True)
    prompts = [f"Number {i}: once there" for i in range(24)]
    before = group.engine.stats().preemptions
    ours = group.generate(prompts, sampling, use_tqdm=False)
    wanted = alone.generate(prompts, sampling, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in wanted]
    assert group.engine.stats().preemptions > before
    _cancelled(group)
    assert list(group.engine.pool.check()) == []
    assert group.engine.pool.num_used == 0


def _cancelled(llm: LLM) -> None:
    ended: list[Event] = []
    done = threading.Event()
    deliver = llm.engine._deliver

    def take(events: Any) -> None:
        ended.extend(event for event in events if type(event).__name__ == "Finished")
        if len(ended) == 6:
            done.set()

    llm.engine._deliver = take
    try:
        for i in range(6):
            sampling = SamplingParams(temperature=0, max_tokens=100 if i % 2 else 20, ignore_eos=True)
            llm.engine.submit(Request(request_id=f"c{i}", prompt_token_ids=[1, 2, 3 + i], sampling=sampling))
        for i in (1, 3, 5):
            llm.engine.abort(f"c{i}")
        assert done.wait(60)
    finally:
        llm.engine._deliver = deliver
    assert sorted(event.reason for event in ended) == ["abort"] * 3 + ["length"] * 3  # type: ignore[union-attr]


LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "facts", "pp"),
    [("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, 1), ("DeepseekV2", LATENT, 2)],
)
def test_experts_dealt_out_whole(checkpoint: Any, family: str, facts: dict[str, Any], pp: int) -> None:
    """--enable-expert-parallel: each of the two ranks of a stage has two or three of five experts, and the tokens are those of
    one rank: of chunked prompts with a common beginning, branches, mixed sampling, preempted and cancelled ones."""
    folder, _ = checkpoint(family, vocab_size=97, **facts)
    options: dict[str, Any] = {
        "dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1, "max_model_len": 112, "block_size": 8,
        "max_num_batched_tokens": 24,
    }  # fmt: skip
    prompts = [[5, 6, 7], list(range(3, 60)), [9], *([3 + i] * 30 for i in range(5))]
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=20, ignore_eos=True),
        SamplingParams(
            temperature=0.8, seed=2, top_k=5, top_p=0.9, repetition_penalty=1.3, max_tokens=24, ignore_eos=True
        ),
    ]
    mixed = [params[i % 3] for i in range(len(prompts))]
    with LLM(str(folder), **options, kv_cache_memory_bytes=1 << 22) as alone:
        wanted = alone.generate(prompts, mixed, use_tqdm=False)
    ranks = {"tensor_parallel_size": 2, "pipeline_parallel_size": pp, "enable_expert_parallel": True}
    with LLM(str(folder), **options, **ranks, kv_cache_memory_bytes=60_000) as llm:
        found = llm.generate(prompts, mixed, use_tqdm=False)
        assert llm.engine.stats().preemptions > 0
        again = [llm.generate(prompts[1:2], params[1], use_tqdm=False)[0] for _ in range(2)][1]
        assert (again.num_cached_tokens or 0) >= 40
        found[1] = again
        _cancelled(llm)
        assert list(llm.engine.pool.check()) == []
    for got, want in zip(found, wanted, strict=True):
        assert [each.token_ids for each in got.outputs] == [each.token_ids for each in want.outputs]


def test_vectors(checkpoint: Any) -> None:
    """An encoder over two stages of two ranks."""
    folder, _ = checkpoint("Bert", auto="AutoModel", vocab_size=97, num_key_value_heads=None)
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1}
    prompts = [[5, 6, 7], [8] * 30, [9]]
    alone = LLM(str(folder), **options).embed(prompts, use_tqdm=False)
    llm = LLM(str(folder), **options, tensor_parallel_size=2, pipeline_parallel_size=2)
    try:
        found = llm.embed(prompts, use_tqdm=False)
    finally:
        llm.shutdown()
    for got, want in zip(found, alone, strict=True):
        pairs = zip(got.outputs.embedding, want.outputs.embedding, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5


def on_and_on(llm: LLM, sampling: SamplingParams) -> None:
    for _ in range(1000):
        llm.generate(["Once"] * 4, sampling, use_tqdm=False)


DEATHS = {
    "killed": (lambda llm, pid: os.kill(pid, signal.SIGKILL), "died: killed by SIGKILL"),
    "stopped": (lambda llm, pid: os.kill(pid, signal.SIGSTOP), "was stopped"),
    "raised": (lambda llm, pid: llm.engine._executor._hub.step(b"\xff\xff\xff\xff"), "failed: ValueError"),
}


@pytest.mark.parametrize(("layout", "how"), [((2, 1), "killed"), ((1, 2), "stopped"), ((2, 2), "raised")])
def test_a_death_ends_every_request(stories: dict[str, Any], layout: tuple[int, int], how: str) -> None:
    strike, says = DEATHS[how]
    llm = LLM(**stories, tensor_parallel_size=layout[0], pipeline_parallel_size=layout[1])
    others = pids(llm)
    sampling = SamplingParams(temperature=1, seed=1, max_tokens=450, ignore_eos=True)
    timer = threading.Timer(0.3, lambda: strike(llm, others[max(others)]))
    timer.start()
    with pytest.raises(UnavailableError, match=says):
        on_and_on(llm, sampling)
    timer.join()
    assert all(gone(pid) for pid in others.values())
    with pytest.raises(UnavailableError):
        llm.generate(["Once"], sampling, use_tqdm=False)
    llm.shutdown()


@pytest.mark.skipif(library() is None, reason="no compiled kernels")
def test_an_exchange_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(**stories, tensor_parallel_size=2, collective_timeout=60.0)  # starting takes seconds on a busy machine
    meeting = llm.engine._executor.loaded.decoder.mesh.meeting
    assert meeting is not None
    meeting._state.timeout_ns = 10**9  # so that nobody waits for a minute
    others = pids(llm)
    monkeypatch.setattr(llm.engine._executor._hub, "step", lambda frame: None)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"longer than 60 s .--collective-timeout.: a rank or a link hangs"):
        llm.generate(["Once"], GREEDY, use_tqdm=False)
    assert all(gone(pid) for pid in others.values())


def test_a_later_stage_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one waits for no exchange with it, only for its results."""
    llm = LLM(**stories, pipeline_parallel_size=2, collective_timeout=60.0)
    others, executor = pids(llm), llm.engine._executor
    limited = replace(executor._config, collective_timeout=1.0)  # type: ignore[attr-defined]
    monkeypatch.setattr(executor, "_config", limited)
    monkeypatch.setattr(executor._hub, "step", lambda frame: None)  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"longer than 1 s .--collective-timeout.: a rank or a link hangs"):
        llm.generate(["Once"], GREEDY, use_tqdm=False)
    assert all(gone(pid) for pid in others.values())


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_first_stage_that_hangs(stories: dict[str, Any], monkeypatch: pytest.MonkeyPatch, behind: bool) -> None:
    """Before it hands on, so that the next stage waits, or behind that, when nobody waits for it but who launches steps."""
    llm = LLM(**stories, pipeline_parallel_size=2, collective_timeout=60.0)
    others, executor, ever = pids(llm), llm.engine._executor, threading.Event()
    assert isinstance(executor, GroupExecutor)
    monkeypatch.setattr(executor, "_config", replace(executor._config, collective_timeout=1.0))
    forward = executor.rank.forward

    def stands_still(*args: Any) -> None:
        if behind:
            forward(*args)
        ever.wait(60)

    monkeypatch.setattr(executor.rank, "forward", stands_still)
    try:
        with pytest.raises(UnavailableError, match=r"longer than 1 s .--collective-timeout.: a rank or a link hangs"):
            llm.generate(["Once"], GREEDY, use_tqdm=False)
    finally:
        ever.set()
    assert all(gone(pid) for pid in others.values())


def test_an_exchange_that_was_waited_for_in_vain_names_its_limit() -> None:
    """Whoever waits is not to blame, and no line of its code is."""
    said = worker._explained(
        RuntimeError("[buffer.cc:78] Timed out waiting 5000ms for recv"), EngineConfig(collective_timeout=5)
    )
    assert said == {"why": hangs(EngineConfig(collective_timeout=5)), "final": False}
    assert "5 s (--collective-timeout): a rank or a link hangs" in said["why"]


SCRIPT = """
import json, os, sys, time
from kvasir.engine import LLM
llm = LLM(**json.loads(sys.argv[1]), tensor_parallel_size=3)
print(*(peer.pid for peer in llm.engine._executor._hub._peers.values()), flush=True)
time.sleep(60)
"""


def test_ranks_end_with_their_rank_0(stories: dict[str, Any]) -> None:
    """Where somebody would continue it, also one that stands still."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(stories)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        others = [int(pid) for pid in process.stdout.readline().split()]
        if sys.platform == "linux":
            os.kill(others[0], signal.SIGSTOP)
        process.kill()  # before it sees that
    try:
        assert len(others) == 2
        assert all(gone(pid) for pid in others)
    finally:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_fault_of_the_configuration_is_told_as_one(stories: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9: this model has 8 heads, so 1 to 8 work"):
        LLM(**stories, tensor_parallel_size=9)
    with pytest.raises(ConfigError, match=r"holds neither|no config"):
        LLM(**{**stories, "model": str(tmp_path)}, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_parallel_size": 2}, "copies of a model are groups of `kvasir serve`"),
        ({"distributed_executor_backend": "ray", "tensor_parallel_size": 2}, "runs its ranks with mp"),
    ],
)
def test_what_needs_a_cluster_is_refused_in_process(stories: dict[str, Any], options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM(**stories, **options)


def test_a_rank_that_doesnt_come_is_named() -> None:
    hub = Hub("127.0.0.1", 3)
    try:
        spoke = Spoke(hub.address, hub.token, 2, os.getpid(), gone=lambda: None)
        with pytest.raises(RankError, match=r"rank 1 of 3 didn't connect to 127.0.0.1:.* within 0.3 s"):
            hub.meet(0.3)
    finally:
        hub.close()
    spoke.close()


@pytest.mark.parametrize(
    ("wait", "say", "doing"),
    [
        (Hub.all_awake, "awake", "loading its libraries"),
        (Hub.assemble, "here", "loading its share"),
        (Hub.all_ready, "ready", "loading its share"),
    ],
)
def test_a_rank_that_loads_for_long_is_named_and_waited_for(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[Hub], None],
    say: Kind,
    doing: str,
) -> None:
    """No exchange begins before, whose limit would count meanwhile."""
    monkeypatch.setattr(control, "NOTE_S", 0.05)
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    try:
        hub.meet(20)
        spokes[0].send(say)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait, hub)
            named = re.compile(rf"rank 2 \(pid \d+ on 127.0.0.1\) has been {doing} for \d+ s: its disk, its network or")
            assert until(lambda: any(named.match(record.getMessage()) for record in caplog.records))
            assert not waiting.done()
            spokes[1].send(say)
            waiting.result(20)
    finally:
        hub.close()
        for spoke in spokes:
            spoke.close()


def test_libraries_arent_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WAKING_S", 0.0)
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        with pytest.raises(
            RankError, match=r"^rank 1 \(pid \d+ on 127.0.0.1\) has been loading its libraries for 0 s, and"
        ):
            hub.all_awake()
    finally:
        hub.close()
        spoke.close()


def test_ranks_go_on_together() -> None:
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    order: list[str] = []

    def come(assemble: Callable[[], None]) -> None:
        for turn in range(3):
            time.sleep(random.random() / 50)
            order.append(f"here {turn}")
            assemble()
            order.append(f"on {turn}")

    try:
        hub.meet(20)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(come, (hub.assemble, *(spoke.assemble for spoke in spokes))))
        for turn in range(3):
            last_here = max(at for at, what in enumerate(order) if what == f"here {turn}")
            assert last_here < order.index(f"on {turn}")
    finally:
        hub.close()
        for spoke in spokes:
            spoke.close()


def test_a_rank_that_falls_silent_while_it_loads_is_given_up() -> None:
    """It froze on a node whose system goes on: its connection stands."""
    hub = Hub("127.0.0.1", 3)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        spoke.send("awake")
        with connected(hub) as connection:
            connection.sendall(hello(json.dumps({"token": hub.token, "rank": 2, "pid": os.getpid()}).encode()))
            hub.meet(20)
            hub._peers[2].heard -= 2 * control.LOADING_SILENCE_S
            time.sleep(4 * control.LOOK_S)
            assert hub.failure is None  # its libraries may hold up whatever it would say
            send(connection, "awake", b"")
            hub.all_awake()
            hub._peers[2].heard -= 2 * control.SILENCE_S
            time.sleep(4 * control.LOOK_S)
            assert hub.failure is None
            hub._peers[2].heard -= control.LOADING_SILENCE_S
            with pytest.raises(RankError, match=r"^rank 2 .* has said nothing for 60 s: it hangs, or its node is gone"):
                hub.all_ready()
    finally:
        hub.close()
        spoke.close()


def hello(said: bytes) -> bytes:
    return HEAD.pack(len(said), KINDS.index("hello")) + said


def connected(hub: Hub) -> socket.socket:
    host, _, port = hub.address.rpartition(":")
    return socket.create_connection((host, int(port)), 30)


STRANGE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 64,
    HEAD.pack(2, KINDS.index("step")) + b"{}",
    *map(
        hello,
        (b"", b"[]", b'"x"', b"7", b"{}", b"[" * 500, b"\xff", b'{"token": "no", "r": 1}', b'{"token": "\\ud800"}'),
    ),
    hello(b"[" * 4000),
]


@pytest.mark.parametrize("said", STRANGE)
def test_strangers_are_turned_away(said: bytes) -> None:
    hub = Hub("127.0.0.1", 2)
    try:
        with connected(hub) as connection, contextlib.suppress(OSError):  # it may already be closed
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
        assert hub.meet(30) == {0: "127.0.0.1", 1: "127.0.0.1"}
    finally:
        hub.close()
    spoke.close()


@pytest.mark.parametrize("change", [{"rank": 0}, {"rank": 2}, {"rank": "1"}, {"pid": None}, {}])
def test_who_knows_the_token_and_is_no_rank_is_turned_away(change: dict[str, Any]) -> None:
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(30)
        with connected(hub) as connection:
            connection.sendall(hello(json.dumps({"token": hub.token, "rank": 1, "pid": 1, **change}).encode()))
            assert connection.recv(1) == b""
        assert hub.failure is None
    finally:
        hub.close()
        spoke.close()


def test_strangers_that_dawdle_delay_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is silent, one says its hello byte by byte: results are heard beside them, and their time is limited as a whole."""
    monkeypatch.setattr(control, "HELLO_S", float("inf"))
    hub = Hub("127.0.0.1", 2)
    heard = threading.Event()
    hub.on_result = lambda frame: heard.set()
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        with connected(hub) as silent, connected(hub) as slow:
            for byte in hello(b"{" + b" " * 8)[:-1]:
                slow.sendall(bytes([byte]))
                heard.clear()
                spoke.send("result", b"x")
                assert heard.wait(60)
            assert until(lambda: len(hub._strangers) == 2)
            monkeypatch.setattr(control, "HELLO_S", 0.1)
            assert (silent.recv(1), slow.recv(1)) == (b"", b"")
        assert hub.failure is None
    finally:
        hub.close()
        spoke.close()


def test_a_crowd_of_strangers_keeps_no_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are turned away."""
    monkeypatch.setattr(control, "HELLO_S", float("inf"))
    monkeypatch.setattr(control, "MORE_STRANGERS", 1)
    hub = Hub("127.0.0.1", 2)
    with contextlib.ExitStack() as stack:
        stack.callback(hub.close)
        crowd = [stack.enter_context(connected(hub)) for _ in range(6)]
        assert [connection.recv(1) for connection in crowd[:3]] == [b""] * 3
        spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
        stack.callback(spoke.close)
        hub.meet(30)
        assert len(hub._strangers) <= 3


def test_whatever_stops_the_control_thread_is_the_end_of_the_group() -> None:
    """Nobody would see a rank die any more, or hear a result."""
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(30)
        spoke.send("fetched", b"?")
        assert until(lambda: hub.failure is not None)
        assert "can't hear the other ranks any more: error: unpack requires" in str(hub.failure)
    finally:
        hub.close()
        spoke.close()


def test_places_go_by_node() -> None:
    config = EngineConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    found = places(config, {0: "a", 1: "a", 2: "b", 3: "a"}, own_gpus=False)
    assert [(p.tp_rank, p.stage, p.local_ranks, p.device_index) for p in found] == [
        (0, 0, 3, 0), (1, 0, 3, 1), (0, 1, 1, 0), (1, 1, 3, 2),
    ]  # fmt: skip
    assert [p.samples for p in found] == [False, False, True, False]


WAYS = [*sorted(DEATHS), "raise", "out of memory"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos(
    stories: dict[str, Any], orders: Any, segments: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 groups die (and six more as actors, tests/cluster/test_group_ranks.py): any rank but this process, at any moment, in
    any way. Every request ends, and nothing is left behind."""
    monkeypatch.syspath_prepend(orders.path)
    rng = random.Random(0)
    before = segments()
    for how in WAYS * 5:
        tp, pp = rng.choices(LAYOUTS, (2, 2, 1))[0]  # of four ranks three start beside this process
        llm = LLM(**stories, tensor_parallel_size=tp, pipeline_parallel_size=pp)
        others = pids(llm)
        strike = DEATHS[how][0] if how in DEATHS else lambda _, pid, how=how: orders.give(pid, how)
        timer = threading.Timer(rng.random() * 0.5, strike, (llm, rng.choice(sorted(others.values()))))
        timer.start()
        with pytest.raises(UnavailableError):
            on_and_on(llm, SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
        timer.join()
        assert all(gone(pid) for pid in others.values()), how
        llm.shutdown()
    assert until(lambda: segments() <= before), segments()


def test_executor_of_one_rank_is_this_process(stories: dict[str, Any]) -> None:
    executor = executor_of(EngineConfig(**stories))
    assert (executor.depth, executor.loaded.decoder.mesh.place.size) == (1, 1)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_ranks_that_fail_together_say_why(order: tuple[int, int]) -> None:
    """Both explain themselves and end; whichever connection closes first, the cause is what one of them said."""
    hub = Hub("127.0.0.1", 3)
    try:
        spokes = {rank: Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)}
        hub.meet(20)
        for rank in (1, 2):
            spokes[rank].send("failed", json.dumps({"why": f"ValueError: {rank}", "final": False}).encode())
            limit = time.monotonic() + 60
            while not hub._peers[rank].failed and time.monotonic() < limit:
                time.sleep(0.001)
        for rank in order:
            spokes[rank].close()
        assert "rank 1 " in str(hub.verdict(""))
        assert "failed: ValueError: 1" in str(hub.failure)
    finally:
        hub.close()


def test_a_fetch_that_two_ranks_lacked_is_told_once() -> None:
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        hub.spoil([7, 8])
        spoke.send("spoiled", encode_tickets([8, 9]))
        assert sorted(hub.spoiled()) == [7, 8, 9]
    finally:
        hub.close()
        spoke.close()


class Unacknowledged:
    """A connection of which the system says that nobody has acknowledged anything for long."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self._connection, self._number = connection, number

    def recv(self, *_: int) -> bytes:
        raise OSError(self._number, os.strerror(self._number))

    sendall = recv

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH])
@pytest.mark.parametrize("sending", [False, True])
def test_a_node_that_is_gone_is_told_in_the_same_words_by_whoever_sees_it_first(number: int, sending: bool) -> None:
    """The system's limit of time and the look at the clock are both at 10 s."""
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        peer = hub._peers[1]
        peer.connection = Unacknowledged(peer.connection, number)  # type: ignore[assignment]
        if sending:
            with pytest.raises(RankError, match="has said nothing for 10 s: it hangs, or its node is gone"):
                hub.step(b"")
        else:
            spoke.send("beat")
        assert until(lambda: hub.failure is not None)
        assert "its node is gone" in str(hub.failure)
    finally:
        hub.close()
        spoke.close()
