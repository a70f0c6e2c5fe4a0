"""A sampler over many steps against a naive one that remembers everything."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvasir.engine.request import SamplingParams
from kvasir.engine.sampler import Sampler
from kvasir.engine.step import NewSequence
from kvasir.kernels.sample import uniform

CPU = torch.device("cpu")
VOCAB = 60
PROMPT = [3, 4, 4, 5]


def logits_at(position: int, vocab: int = VOCAB) -> torch.Tensor:
    """The model: logits[V] depend on the position alone."""
    return torch.randn(vocab, generator=torch.Generator().manual_seed(position)) * 2


def enter(sampler: Sampler, seat: int, tokens: list[int], sampling: SamplingParams, seed: int = 0) -> None:
    sampler.enter(NewSequence(seat, tokens, len(PROMPT), sampling, seed, (7, 8)))


def step(sampler: Sampler, seats: list[int], sequences: list[list[int]], vocab: int = VOCAB) -> None:
    """One token for each sequence."""
    positions = np.array([len(tokens) for tokens in sequences])
    logits = torch.stack([logits_at(int(p), vocab) for p in positions])
    tokens = sampler.sample(logits, np.array(seats), positions)
    sampler.remember(np.array(seats), tokens, tokens.tolist)
    for sequence, token in zip(sequences, tokens.tolist(), strict=True):
        sequence.append(token)


def naive(sampling: SamplingParams, count: int, seed: int = 0, stops: tuple[int, ...] = (7, 8)) -> list[int]:
    """Float64, everything counted afresh for each token, in the order that vLLM applies it."""
    tokens = list(PROMPT)
    for _ in range(count):
        x = logits_at(len(tokens)).double().numpy()
        for token, bias in sampling.logit_bias.items():
            x[token] += bias
        outputs = tokens[len(PROMPT) :]
        if len(outputs) < sampling.min_tokens:
            x[list(stops)] = -math.inf
        for token in set(tokens):
            x[token] = (
                x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
            )
        for token in set(outputs):
            x[token] -= sampling.frequency_penalty * outputs.count(token) + sampling.presence_penalty
        tokens.append(int(x.argmax()) if sampling.temperature == 0 else pick(x, sampling, seed, len(tokens)))
    return tokens


def pick(x: np.ndarray, sampling: SamplingParams, seed: int, position: int) -> int:
    p = np.exp((x - x.max()) / sampling.temperature)
    p[p < sampling.min_p * p.max()] = 0
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        p[order[int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1 :]] = 0
    u = uniform(np.array([seed], np.uint64), np.array([position]))[0]
    return int(np.searchsorted(np.cumsum(p), u * p.sum(), side="right"))


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "cool": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "both": {"top_k": 10, "top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "repetition": {"temperature": 0, "repetition_penalty": 1.7},
    "rewarded": {"temperature": 0, "repetition_penalty": 0.6},
    "presence": {"temperature": 0, "presence_penalty": 1.5},
    "frequency": {"temperature": 0.8, "frequency_penalty": 0.9},
    "all penalties": {"top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.3},
    "bias": {"temperature": 0, "logit_bias": {5: 100, 6: -100, 9: 99.5}},
    "locked": {"temperature": 0, "min_tokens": 20, "logit_bias": {7: 50, 8: 40}},
    "locked and penalised": {"min_tokens": 5, "logit_bias": {7: 9}, "presence_penalty": 2},
}


def sampling_of(case: str) -> SamplingParams:
    return SamplingParams(**{"max_tokens": None, **CASES[case]})


@pytest.mark.parametrize("case", CASES)
def test_equals_a_naive_sampler(case: str) -> None:
    sampler, tokens = Sampler(4, VOCAB, CPU), list(PROMPT)
    enter(sampler, 2, tokens, sampling_of(case), seed=11)
    for _ in range(40):
        step(sampler, [2], [tokens])
    assert tokens == naive(sampling_of(case), 40, seed=11)


def test_sequences_that_share_steps_do_not_meet() -> None:
    """All cases at once, in seats that others had before, entering and being preempted at different times."""
    cases = list(CASES)
    sampler = Sampler(len(cases), VOCAB, CPU)
    for seat in range(len(cases)):  # seats had other owners, with penalties
        tokens = list(range(20, 40))
        enter(sampler, seat, tokens, sampling_of("all penalties"), seed=seat)
        step(sampler, [seat], [tokens])
    sequences = [list(PROMPT) for _ in cases]
    rng = np.random.default_rng(0)
    seats = list(range(len(cases)))
    for case, seat, tokens in zip(cases, seats, sequences, strict=True):
        enter(sampler, seat, tokens, sampling_of(case), seed=seat)
    for turn in range(120):
        if turn == 40:  # all are preempted and come back to other seats, with what they have
            seats = rng.permutation(len(cases)).tolist()
            for i, case in enumerate(cases):
                enter(sampler, seats[i], sequences[i], sampling_of(case), seed=i)
        who = [i for i in range(len(cases)) if rng.random() < 0.5 and len(sequences[i]) < 44]
        if who:
            step(sampler, [seats[i] for i in who], [sequences[i] for i in who])
    for i, case in enumerate(cases):
        assert sequences[i] == naive(sampling_of(case), len(sequences[i]) - 4, seed=i), case
        assert len(sequences[i]) > 30


def test_nothing_is_counted_until_someone_has_a_penalty() -> None:
    sampler, tokens = Sampler(256, 200_000, CPU), list(PROMPT)
    enter(sampler, 0, tokens, SamplingParams())
    step(sampler, [0], [tokens], 200_000)
    assert sampler.counts is None


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_temperatures_that_float32_cannot_hold(temperature: float) -> None:
    sampler, tokens = Sampler(1, VOCAB, CPU), list(PROMPT)
    enter(sampler, 0, tokens, SamplingParams(temperature=temperature, repetition_penalty=1e300))
    step(sampler, [0], [tokens])
    if temperature < 1:
        best = logits_at(4)
        best[PROMPT] = -torch.inf
        assert tokens[-1] == int(best.argmax())


def test_stop_ids_outside_the_vocabulary_are_no_harm() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    sampler.enter(NewSequence(0, PROMPT, 4, SamplingParams(min_tokens=3), 0, (VOCAB, VOCAB + 7)))
    step(sampler, [0], [list(PROMPT)])


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_any_seed(seed: int) -> None:
    sampler = Sampler(1, VOCAB, CPU)
    enter(sampler, 0, list(PROMPT), SamplingParams(), seed)
    step(sampler, [0], [list(PROMPT)])


def test_scores_are_those_of_the_raw_logits() -> None:
    sampling = SamplingParams(temperature=0.3, logprobs=4, logit_bias={1: 100}, max_tokens=None)
    sampler = Sampler(3, VOCAB, CPU)
    enter(sampler, 0, PROMPT, SamplingParams())
    enter(sampler, 1, PROMPT, sampling)
    enter(sampler, 2, PROMPT, replace(sampling, logprobs=0))
    logits = torch.stack([logits_at(4)] * 3)
    seats = np.arange(3)
    tokens = sampler.sample(logits, seats, np.array([4, 4, 4]))
    nothing, four, none = sampler.score_sampled(logits, seats, tokens)()
    exact = logits_at(4).double().log_softmax(-1)
    order = exact.argsort(descending=True).tolist()
    assert nothing is None
    assert four is not None
    assert none is not None
    assert int(tokens[1]) == 1
    assert four.logprob == none.logprob == pytest.approx(float(exact[1]), abs=1e-5)
    assert four.rank == order.index(1) + 1
    assert [token for token, _ in four.top] == order[:4]
    assert none.top == ()


def test_one_rows_top_p_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    from kvasir.engine import sampler as module

    real = module.draw
    monkeypatch.setattr(module, "draw", lambda x, *a, **k: (asked.append((len(x), k["most"])), real(x, *a, **k))[1])
    sampler = Sampler(4, VOCAB, CPU)
    for seat, options in enumerate(({"top_p": 0.5}, {"top_k": 3}, {}, {"temperature": 0, "top_p": 0.5})):
        enter(sampler, seat, PROMPT, SamplingParams(**options))
    step(sampler, [0, 1, 2, 3], [list(PROMPT) for _ in range(4)])
    assert sorted(asked) == [(1, 0), (1, 0), (1, 3)]
