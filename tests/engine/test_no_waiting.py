"""Nothing that a step does asks the device for a number: whatever does so waits for all that is still to be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from kvasir.engine.cache import KVCache
from kvasir.engine.rank import Rank
from kvasir.engine.request import SamplingParams
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.step import NewSequence, Slice, Step
from kvasir.engine.weights import random_decoder
from kvasir.kernels import sample

CPU = torch.device("cpu")
SPEC = Spec(
    vocab=50, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=48, eps=1e-5, max_len=64,
    layers=(Layer(Rope(10000.0, 8)),) * 2,
)  # fmt: skip
READ = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "equal", "allclose"}
COUNTED = {"nonzero", "bincount", "masked_select", "unique", "unique_consecutive", "argwhere"}
"""What they give has as many numbers as there are hits, which the host has to know."""
COPIED = {"tensor", "as_tensor", "new_tensor"}
"""From memory that isn't pinned."""


class Waits(TorchFunctionMode):
    """Notes what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in READ | COUNTED | COPIED:
            self.found.append(resolve_name(func) or name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(
                isinstance(i, (list, np.ndarray)) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index
            ):
                self.found.append(f"{name} by {[type(i).__name__ for i in index]}")
        return func(*args, **(kwargs or {}))


@contextmanager
def never_waits() -> Iterator[None]:
    with Waits() as waits:
        yield
    assert not waits.found


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 0.7},
    "top_k": {"top_k": 5, "min_p": 0.01},
    "top_p": {"top_p": 0.8},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.1, "frequency_penalty": 0.2},
    "bias": {"logit_bias": {3: 5.0}, "min_tokens": 3},
    "allowed": {"allowed_token_ids": [3, 4, 5], "temperature": 0},
    "mirostat": {"mirostat": 2},
    "typical": {"typical_p": 0.5, "tfs_z": 0.9},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "beams": {"use_beam_search": True, "n": 2, "temperature": 0, "logprobs": 1},
}


@pytest.mark.parametrize("rules", RULES)
def test_a_step_never_waits(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, decoding, a sequence that comes back with what it has said, and copies of blocks."""
    for each in (sample.draw, sample.greedy):  # a CPU's own read what lies in its memory anyway
        monkeypatch.setitem(each._loaded, "cpu", each.reference)
    cache = KVCache(SPEC, 40, 4, torch.float32, CPU)
    cache.arena.zero_()
    decoder = random_decoder(SPEC, torch.float32, CPU)
    decoder.attend_by("plain")
    rank = Rank(decoder, cache, max_num_seqs=4, max_model_len=64)
    rank.lags = True  # as on a device
    sampling = SamplingParams(**{"max_tokens": None, **RULES[rules]})
    wants = sampling.prompt_logprobs is not None
    prompts, outcomes = ([1, 2, 3, 4, 5], [7, 8]), []
    new = [NewSequence(s, ids, len(ids), sampling, s, (6,)) for s, ids in enumerate(prompts)]
    back = NewSequence(2, [1, 2, 3, 9, 9], 3, sampling, 2, (6,))
    blocks = [(seat, 0, [seat * 5, seat * 5 + 1, seat * 5 + 2]) for seat in range(3)]
    steps = [
        Step(0, new=new, blocks=blocks[:2], slices=[Slice(s, 0, len(p), True, wants) for s, p in enumerate(prompts)]),
        Step(1, slices=[Slice(0, 5, 1, True), Slice(1, 2, 1, True)], copies=((0, 30), (1, 31))),
        Step(
            2,
            new=[back],
            blocks=blocks[2:],
            slices=[Slice(1, 3, 1, True), Slice(2, 0, 5, True, replay=rules == "mirostat")],
        ),
        Step(3, slices=[Slice(1, 4, 1, True), Slice(2, 5, 1, True)]),
    ]
    for step in steps:
        for known in outcomes[:-1]:
            assert known.result().step < step.id - 1  # the host has read all but the newest
        with never_waits():
            outcomes.append(rank.launch(step))
    assert all(len(outcome.result().token_ids) == 2 for outcome in outcomes)


def test_blocks_come_and_go_without_waiting() -> None:
    cache = KVCache(SPEC, 6, 4, torch.float32, CPU)
    cache.arena.random_(0, 100)
    with never_waits():
        held = cache.read([5, 0, 3])
        cache.write([1, 2, 4], held)
        staged = torch.stack([held[2], held[2], held[0], held[1]])
        cache.put([0, 3], staged, [3, 1])
    assert torch.equal(cache.read([1, 2, 4]), held)
    assert torch.equal(cache.read([0, 3]), held[1:])


def test_the_list_of_what_waits_is_kept() -> None:
    """The test's own eyes."""
    x = torch.arange(3)
    for wait in (
        lambda: x.tolist(), lambda: int(x[0]), lambda: bool(x[0]), lambda: x[x > 1], lambda: x[[0, 1]],
        lambda: torch.bincount(x), lambda: torch.tensor([1, 2]), lambda: x.nonzero(),
    ):  # fmt: skip
        with Waits() as waits:
            wait()
        assert waits.found
