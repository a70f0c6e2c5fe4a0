"""The loop: what clients get when all is well, when they go away, when there is too much, and when a step fails."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from small_models import SPEC
from waiting import until

from kvasir.engine.blocks import chain_start, content_ids, token_bytes
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine, Loaded
from kvasir.engine.errors import ClientError, ContextLengthError, OverloadedError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.grammar import Grammar
from kvasir.engine.grammar_queue import Compiling
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.weights import random_decoder

CPU = torch.device("cpu")
BLOCKS, BLOCK = 40, 4


class Client:
    """Keeps all events, by request."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self.deliveries: list[tuple[str, int]] = []
        self._news = threading.Condition()

    def deliver(self, events: Sequence[Event]) -> None:
        with self._news:
            self.deliveries.append((threading.current_thread().name, len(events)))
            for event in events:
                self.events.setdefault(event.request_id, []).append(event)
            self._news.notify_all()

    def wait(self, done: Callable[[], bool], timeout_s: float = 60) -> None:
        with self._news:
            assert self._news.wait_for(done, timeout_s), self.events

    def ended(self, request_id: str) -> bool:
        return any(isinstance(event, (Finished, Failed)) for event in self.events.get(request_id, ()))

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        own = [e for e in self.events[request_id] if isinstance(e, Token) and e.index == index]
        return [token for event in own for token in event.token_ids]

    def end(self, request_id: str) -> Any:
        (end,) = [e for e in self.events[request_id] if isinstance(e, (Finished, Failed))]
        assert self.events[request_id][-1] is end
        return end


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    info = ModelInfo(name="tiny", max_model_len=128, vocab_size=50, num_blocks=BLOCKS, block_size=BLOCK)
    return Loaded(random_decoder(SPEC, torch.float32, CPU), KVCache(SPEC, BLOCKS, BLOCK, torch.float32, CPU), info)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def make(loaded: Loaded, client: Client) -> Iterator[Callable[..., Engine]]:
    """`make(max_queue=...)`: an engine that runs until the test ends."""
    made: list[Engine] = []

    def build(*, start: bool = True, **options: Any) -> Engine:
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": BLOCK, **options}
        engine = Engine(EngineConfig(model="tiny", **options), client.deliver, loaded)
        made.append(engine)
        if start:
            engine.start()
        return engine

    yield build
    for engine in made:
        engine.shutdown()
        assert not engine._thread.is_alive()


def request(
    name: str, prompt: Sequence[int] = (1, 2, 3), *, deadline_s: float | None = None, **sampling: Any
) -> Request:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 5, **sampling})
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params, deadline_s=deadline_s)


def slow(engine: Engine, seconds: float = 0.02) -> Callable[[], None]:
    """Every step takes at least this long, until what this returns is called."""
    rank = engine._executor.rank
    run = rank.launch
    rank.launch = lambda step: (time.sleep(seconds), run(step))[1]  # type: ignore[method-assign]
    return lambda: setattr(rank, "launch", run)


def test_a_request(make: Callable[..., Engine], client: Client) -> None:
    engine = make()
    engine.submit(request("a"))
    client.wait(lambda: client.ended("a"))
    end = client.end("a")
    assert (end.reason, end.prompt_tokens, end.output_tokens) == ("length", 3, 5)
    assert 0 < end.timing.queued <= end.timing.scheduled <= end.timing.first_token <= end.timing.finished <= time.time()
    assert len(client.tokens("a")) == 5
    assert {thread for thread, _ in client.deliveries} == {"kvasir-engine"}


def test_how_fast_prompts_are_is_known_from_the_start_and_follows_steps(make: Callable[..., Engine]) -> None:
    engine = make(start=False)
    assert engine.stats().prefill_rate == 0
    engine.start(measure=True)
    assert engine.stats().prefill_rate > 0
    slow(engine, 0.1)
    for number in range(4):
        engine.submit(request(f"slow {number}", [number, *range(15)], max_tokens=3))
    until(lambda: 0 < engine.stats().prefill_rate < 2 * 16 / 0.1)


def test_one_delivery_per_step(make: Callable[..., Engine], client: Client) -> None:
    engine = make(start=False)
    for name in "abcd":
        engine.submit(request(name))
    engine.start()
    client.wait(lambda: all(map(client.ended, "abcd")))
    assert [count for _, count in client.deliveries] == [4, 4, 4, 4, 8]


def test_branches(make: Callable[..., Engine], client: Client) -> None:
    engine = make()
    engine.submit(request("a", tuple(range(10)), n=4, temperature=2, seed=5))
    client.wait(lambda: sum(isinstance(e, Finished) for e in client.events.get("a", ())) == 4)
    outputs = [client.tokens("a", i) for i in range(4)]
    assert len({tuple(tokens) for tokens in outputs}) == 4
    for index in range(4):  # continuation i draws with seed + i
        engine.submit(request(f"alone {index}", tuple(range(10)), temperature=2, seed=5 + index))
        client.wait(lambda: client.ended(f"alone {index}"))  # noqa: B023
        assert client.tokens(f"alone {index}") == outputs[index]


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"prompt": (1, 50)}, ClientError, "token 50 at position 1 is not in the vocabulary .0 to 49"),
        ({"prompt": (-1,)}, ClientError, "token -1 at position 0"),
        ({"prompt": ()}, ClientError, "empty"),
        ({"prompt": (1,) * 128}, ContextLengthError, "128"),
        ({"max_tokens": 126}, ContextLengthError, "126"),
        ({"logit_bias": {50: 1}}, ClientError, "logit_bias"),
        ({"stop_token_ids": [51]}, ClientError, "stop_token_ids"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    make: Callable[..., Engine], client: Client, wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    engine = make()
    with pytest.raises(kind, match=words):
        engine.submit(request("a", **wrong))
    engine.submit(request("a"))  # the id is free
    client.wait(lambda: client.ended("a"))
    with pytest.raises(ClientError, match="adapter"):
        engine.submit(Request(request_id="b", prompt_token_ids=[1], sampling=SamplingParams(), adapter="x"))


def test_an_id_is_taken_until_its_request_ended(make: Callable[..., Engine], client: Client) -> None:
    engine = make()
    slow(engine)
    engine.submit(request("a"))
    with pytest.raises(ClientError, match="'a' is in use"):
        engine.submit(request("a"))
    client.wait(lambda: client.ended("a"))
    engine.submit(request("a"))


def test_a_full_queue_refuses_and_says_when_to_come_back(make: Callable[..., Engine], client: Client) -> None:
    engine = make(start=False, max_queue=3)
    for name in "abc":
        engine.submit(request(name))
    with pytest.raises(OverloadedError, match="--max-queue") as caught:
        engine.submit(request("d"))
    assert caught.value.retry_after_s == 1.0
    engine.start()
    client.wait(lambda: all(map(client.ended, "abc")))
    engine.submit(request("d"))
    client.wait(lambda: client.ended("d"))


def test_retry_time_follows_the_rate_of_endings(make: Callable[..., Engine]) -> None:
    engine = make()
    engine._ends.extend([100.0, 102.0, 104.0])
    assert engine._retry_after(10) == 20
    assert engine._retry_after(1000) == 60


@pytest.mark.parametrize("tokens_before", [0, 1, 3])
def test_abort(make: Callable[..., Engine], client: Client, tokens_before: int) -> None:
    """Queued or in its prefill (0), decoding."""
    engine = make()
    slow(engine)
    engine.submit(request("a", tuple(range(40)), max_tokens=60))
    if tokens_before:
        client.wait(lambda: "a" in client.events and len(client.tokens("a")) >= tokens_before)
    engine.abort("a")
    client.wait(lambda: client.ended("a"))
    assert client.end("a").reason == "abort"
    engine.abort("a")
    engine.abort("unknown")
    wait_until_free(engine)


def test_abort_of_one_branch(make: Callable[..., Engine], client: Client) -> None:
    engine = make()
    hurry = slow(engine, 0.1)
    engine.submit(request("a", n=3, max_tokens=20))
    client.wait(lambda: "a" in client.events and len(client.tokens("a", 1)) >= 2)
    engine.abort("a", 1, "stop")
    hurry()
    client.wait(lambda: sum(isinstance(e, Finished) for e in client.events["a"]) == 3)
    ends = {e.index: e for e in client.events["a"] if isinstance(e, Finished)}
    assert [ends[i].reason for i in range(3)] == ["length", "stop", "length"]
    assert ends[1].output_tokens < 20


def wait_until_free(engine: Engine) -> None:
    until(lambda: not engine.pool.num_used)
    assert engine.pool.check() == []


def test_what_comes_while_a_grammar_is_compiled(make: Callable[..., Engine]) -> None:
    """An abort that meets the grammar's end isn't lost, one from before the request is; the deadline goes on."""

    class Slow:
        def __init__(self) -> None:
            self.grammar = Grammar()

        def hold(self, wanted: StructuredOutput) -> Grammar:
            return self.grammar

    slow, engine = Slow(), make(start=False)
    engine._compiling = Compiling(slow)  # type: ignore[arg-type]
    wanted = StructuredOutput(regex="a")
    engine.abort("late")  # one that had the same id
    engine.submit(request("aborted", structured_outputs=wanted))
    engine.submit(request("late", structured_outputs=wanted, deadline_s=5.0))
    submitted = time.time()
    time.sleep(0.02)
    slow.grammar.future.set_result(None)
    engine.abort("aborted")
    (end,) = engine._take_in()
    assert isinstance(end, Finished)
    assert (end.request_id, end.reason) == ("aborted", "abort")
    (failed,) = engine._scheduler.expire(submitted + 5.0)
    assert isinstance(failed, Failed)
    assert (failed.request_id, failed.code) == ("late", "deadline_exceeded")
    assert not engine._scheduler.has_work


def test_a_deadline_counts_from_the_submission(make: Callable[..., Engine]) -> None:
    """Not from the engine's next turn, which a long step may hold off."""
    engine = make(start=False)
    engine.submit(request("a", deadline_s=5.0))
    submitted = time.time()
    time.sleep(0.02)
    assert engine._take_in() == []
    (failed,) = engine._scheduler.expire(submitted + 5.0)
    assert isinstance(failed, Failed)
    assert (failed.request_id, failed.code) == ("a", "deadline_exceeded")


def test_deadlines_hold_for_running_and_waiting_requests(make: Callable[..., Engine], client: Client) -> None:
    engine = make(start=False, max_num_seqs=1)
    slow(engine)
    engine.submit(request("running", max_tokens=100, deadline_s=0.3))
    engine.submit(request("waiting", deadline_s=0.1))
    engine.start()
    client.wait(lambda: client.ended("running") and client.ended("waiting"))
    for name in ("running", "waiting"):
        assert isinstance(client.end(name), Failed)
        assert client.end(name).code == "deadline_exceeded"
    assert "running" in client.events
    assert not [e for e in client.events["waiting"] if isinstance(e, Token)]


def test_the_heart_beats_when_there_is_nothing_to_do(make: Callable[..., Engine]) -> None:
    engine = make()
    for _ in range(3):
        last = engine.heartbeat
        until(lambda last=last: engine.heartbeat > last)  # type: ignore[misc]


def test_who_listens_hears_of_blocks(make: Callable[..., Engine], client: Client) -> None:
    engine, heard = make(), dict[bytes, bool]()
    size, prompt = engine.config.block_size, [3] * 40
    engine.listen(lambda tier, changes: heard.update(changes))
    engine.submit(Request(request_id="a", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1)))
    client.wait(lambda: client.ended("a"))
    start = chain_start(engine.info.salt, "", None, False)
    ids = content_ids(start, token_bytes(prompt), size)
    client.wait(lambda: len(heard) == len(ids) > 1)
    assert heard == dict.fromkeys(ids, True)


def test_stats(make: Callable[..., Engine], client: Client, fresh: Callable[..., Any]) -> None:
    engine = make()
    hurry = slow(engine, 0.1)
    for number in range(6):
        engine.submit(request(str(number), max_tokens=30))
    client.wait(lambda: len(client.events) >= 4)
    stats = fresh(engine)
    assert (stats.running, stats.waiting) == (4, 2)
    assert 0 < stats.kv_usage < 1
    hurry()
    client.wait(lambda: all(client.ended(str(number)) for number in range(6)))
    stats = fresh(engine)
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (18, 180)


@pytest.mark.filterwarnings("default")
def test_a_failing_step_fails_every_request(
    make: Callable[..., Engine], client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(max_num_seqs=1)
    run, steps = engine._executor.rank.launch, []

    def broken(step: Any) -> Any:
        steps.append(step)
        if len(steps) == 3:
            raise RuntimeError("the device fell out")
        return run(step)

    engine._executor.rank.launch = broken  # type: ignore[method-assign]
    engine.submit(request("running", max_tokens=50))
    engine.submit(request("waiting"))
    client.wait(lambda: client.ended("running") and client.ended("waiting"), 5)
    for name in ("running", "waiting"):
        assert isinstance(client.end(name), Failed)
        assert "RuntimeError: the device fell out" in client.end(name).message
    engine._thread.join(60)
    assert isinstance(engine.failure, RuntimeError)
    with pytest.raises(UnavailableError):
        engine.submit(request("late"))
    assert len([r for r in caplog.records if r.exc_info]) == 1


@pytest.mark.parametrize("start", [True, False])
def test_shutdown_fails_what_is_left(make: Callable[..., Engine], client: Client, start: bool) -> None:
    engine = make(max_num_seqs=1, start=start)
    slow(engine)
    engine.submit(request("a", max_tokens=100))
    engine.submit(request("b", max_tokens=100))
    engine.shutdown()
    for name in "ab":
        assert client.end(name).code == "unavailable"
    with pytest.raises(UnavailableError):
        engine.submit(request("late"))
    engine.shutdown()


def test_shutdown_from_the_engines_own_thread(loaded: Loaded) -> None:
    """The garbage collector may end an owner there."""
    ended: list[str] = []

    def deliver(events: Sequence[Event]) -> None:
        engine.shutdown()
        ended.append("delivered")

    engine = Engine(EngineConfig(model="tiny", max_num_seqs=4, block_size=BLOCK), deliver, loaded)
    engine.start()
    engine.submit(Request(request_id="a", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=2)))
    engine._thread.join(60)
    assert not engine._thread.is_alive()
    assert engine.failure is None
    assert ended


def test_submissions_and_aborts_from_many_threads(make: Callable[..., Engine], client: Client) -> None:
    """Every accepted request ends exactly once, and all blocks come back."""
    engine = make()
    alone = {}
    for length in range(1, 9):
        engine.submit(request(f"alone {length}", tuple(range(length)), max_tokens=12))
        client.wait(lambda: client.ended(f"alone {length}"))  # noqa: B023
        alone[length] = client.tokens(f"alone {length}")

    def work(worker: int) -> None:
        rng = random.Random(worker)
        for number in range(30):
            name = f"{worker}/{number}"
            engine.submit(request(name, tuple(range(rng.randint(1, 8))), max_tokens=12))
            if rng.random() < 0.4:
                time.sleep(rng.random() * 0.01)
                engine.abort(name)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{worker}/{number}" for worker in range(4) for number in range(30)]
    client.wait(lambda: all(map(client.ended, names)))
    for name in names:
        end = client.end(name)
        if end.reason == "length":
            assert client.tokens(name) == alone[end.prompt_tokens]
    assert sum(client.end(name).reason == "length" for name in names) > 40
    wait_until_free(engine)
