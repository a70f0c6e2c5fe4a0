"""Layers in one compiled call: the same bits as layer by layer, and as in any other batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvasir.engine import decoder as decoder_module
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.spec import Experts, Layer, Rope, Spec
from kvasir.engine.stacking import stack_of
from kvasir.engine.weights import random_decoder
from kvasir.kernels import native
from kvasir.kernels.linear import multiplied_by

CPU = torch.device("cpu")
ROPE = Rope(10000.0, dim=32)
SPEC = Spec(
    hidden=128,
    ffn=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=128,
    eps=1e-5,
    max_len=512,
    layers=(Layer(ROPE), Layer(ROPE, window=20), Layer(replace(ROPE, interleaved=True))),
    tied=True,
)
KINDS = {
    "plain": SPEC,
    "heads are normalised": replace(SPEC, qk_norm="head"),
    "biased, capped, sinks": replace(SPEC, qkv_bias=True, attn_softcap=20.0, sinks=True, residual_scale=0.5),
}
MIXTURES = {
    "mixture": Experts(8, 3, 64),
    "mixture, shared": Experts(8, 2, 64, scoring="sigmoid", choice_bias=True, groups=4, groups_used=2, shared_ffn=96),
    "mixture, shared by a gate": Experts(6, 2, 64, shared_ffn=64, shared_gate=True, renormalise=False),
}
# behind a dense layer, as DeepSeek's are
BEHIND = (Layer(ROPE), Layer(ROPE, experts=True), Layer(ROPE, experts=True))
KINDS |= {name: replace(SPEC, layers=BEHIND, experts=experts) for name, experts in MIXTURES.items()}
needs_own = pytest.mark.skipif(
    multiplied_by(torch.bfloat16, CPU)[0] != "native",
    reason="bfloat16 products are oneDNN's here, or the compiled kernels are missing",
)


def made(spec: Spec, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return random_decoder(spec, dtype, CPU)


@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_any_batch(kind: str, dtype: torch.dtype, in_chunks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of random chunks, with the layers in one call and without."""
    if multiplied_by(dtype, CPU)[0] != "native":
        pytest.skip(f"products of {dtype} are not our own here")
    rng = random.Random(0)
    decoder = made(KINDS[kind], dtype)
    cache = KVCache(decoder.spec, 4, 16, dtype, CPU)
    assert stack_of(decoder, cache) is not None
    decoder.attend_by("plain")
    assert stack_of(decoder, cache) is None
    decoder.attend_by("auto")
    prompts = [[rng.randrange(128) for _ in range(n)] for n in (150, 40, 1, 70)]
    want = in_chunks(decoder, prompts, 16, seed=0)
    assert decoder._stack is not None, "steps of this type don't ask for it"
    for seed, most in ((1, 64), (2, 0), (3, 16)):
        monkeypatch.setattr(decoder_module, "MOST_ROWS", most)
        for found, expected in zip(in_chunks(decoder, prompts, 16, seed=seed), want, strict=True):
            assert torch.equal(found, expected)


@needs_own
def test_mixtures_need_no_fast_product_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's is ours even where oneDNN's would be the faster one."""
    monkeypatch.setattr(native, "vector_bytes", lambda: 16)
    assert multiplied_by(torch.float32, CPU)[0] != "native"
    decoder = made(KINDS["mixture"])
    assert stack_of(decoder, KVCache(decoder.spec, 4, 16, torch.bfloat16, CPU)) is not None


@needs_own
@pytest.mark.parametrize("layers", [1, 3])
def test_only_wanted_rows_leave_the_last_layer(layers: int, ragged: Any) -> None:
    """Which may be the only one, of a model or of a stage."""
    decoder = made(replace(SPEC, layers=SPEC.layers[:layers]))
    cache = KVCache(decoder.spec, 8, 16, torch.bfloat16, CPU)
    step, tokens = ragged([([1, 3], 0, 20), ([5], 0, 9)], 16), torch.arange(29)
    every = decoder(tokens, step, cache, torch.arange(29))
    assert torch.equal(decoder(tokens, step, cache, torch.tensor([3, 28])), every[[3, 28]])
    assert decoder(tokens, step, cache, torch.tensor([], dtype=torch.int64)).shape == (0, 128)


@needs_own
@pytest.mark.parametrize(
    "change",
    [{"placement": "parallel"}, {"gated": False}, {"norm": "layer"}, {"clip_qkv": 3.0}, {"activation": "relu"}],
)
def test_other_kinds_go_layer_by_layer(change: dict[str, Any]) -> None:
    decoder = made(replace(SPEC, **change))
    assert stack_of(decoder, KVCache(decoder.spec, 4, 16, torch.bfloat16, CPU)) is None
