"""How fast prompts are computed is measured when an engine of any kind of model starts."""

import pytest

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("Llama", {}, id="dense"),
        pytest.param("Gemma3Text", {"sliding_window": 16}, id="windows"),
        pytest.param("Bert", {"auto": "AutoModel"}, id="encoder"),
    ],
)
def test_prompts_are_measured(checkpoint, family, options):
    folder, _ = checkpoint(family, vocab_size=97, **options)
    engine = Engine(EngineConfig(model=str(folder), num_threads=1, skip_tokenizer_init=True), lambda _: None)
    try:
        engine.start(measure=True)
        assert engine.stats().prefill_rate > 0
        assert not engine.pool.check()
        assert engine.pool.num_used == 0
    finally:
        engine.shutdown()
