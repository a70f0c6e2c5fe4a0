"""How fast prompts are computed is measured when an engine of any kind of model starts."""

import queue

import pytest

from kvasir.engine import mesh
from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Token
from kvasir.engine.request import PoolingParams, Request, SamplingParams


@pytest.fixture
def answered(checkpoint):
    """`answered(family, measure, ...)`: what an engine that started so says, token for token."""

    def ask(family, measure, lagging=False, **options):
        folder, _ = checkpoint(family, vocab_size=97, **options)
        events = queue.SimpleQueue()
        config = EngineConfig(model=str(folder), num_threads=1, skip_tokenizer_init=True)
        engine = Engine(config, lambda some: [*map(events.put, some)])
        if lagging:
            engine._executor.ahead = engine._executor._lane._apart = True
        try:
            engine.start(measure=measure)
            assert (engine.stats().prefill_rate > 0) == measure
            sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
            pooling = None if "generate" in engine.info.tasks else PoolingParams()
            engine.submit(Request(request_id="a", prompt_token_ids=[5, 6, 7, 8], sampling=sampling, pooling=pooling))
            said = [events.get(timeout=60)]
            while isinstance(said[-1], Token):
                said.append(events.get(timeout=60))
            assert engine.failure is None
            assert not engine.pool.check()
            vector = getattr(said[-1], "values", None)
            return vector or [token for event in said[:-1] for token in event.token_ids]
        finally:
            engine.shutdown()

    return ask


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("Llama", {}, id="dense"),
        pytest.param("Gemma3Text", {"sliding_window": 16}, id="windows"),
        pytest.param("Mixtral", {"num_local_experts": 4}, id="experts"),
        pytest.param("Bert", {"auto": "AutoModel"}, id="encoder"),
    ],
)
def test_prompts_are_measured_and_nothing_follows_from_it(answered, family, options):
    assert answered(family, True, **options) == answered(family, False, **options)


def test_ranks_that_read_tokens_a_step_later_are_measured_too(answered, monkeypatch):
    plain = answered("Llama", False)
    monkeypatch.setattr(mesh, "LAGGING", ("cpu",))
    assert answered("Llama", True, lagging=True) == plain
    assert len(plain) == 6
