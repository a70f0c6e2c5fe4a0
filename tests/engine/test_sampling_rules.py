"""Windows, barred texts, allowed tokens and truncations: a batched sampler against a naive one, over interruptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvasir.engine.errors import ClientError
from kvasir.engine.request import SamplingParams, StructuredOutput
from kvasir.engine.sampler import Sampler
from kvasir.engine.step import NewSequence, replays
from kvasir.engine.trail import Trail
from kvasir.kernels.sample import uniform

CPU = torch.device("cpu")
VOCAB = 40
PROMPT = [3, 4, 4, 5, 9]
BARRED = ((6,), (4, 5), (5, 9, 11), (2, 2))
NEWLINES = frozenset({3, 9})


def logits_at(position: int) -> torch.Tensor:
    """The model: logits[V] depend on the position alone."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(position)) * 2.5


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


class Naive:
    """One sequence in float64, everything counted afresh for each token."""

    def __init__(self, sampling: SamplingParams, seed: int, barred: bool) -> None:
        self.sampling, self.seed, self.tokens = sampling, seed, list(PROMPT)
        self.barred = BARRED if barred else ()
        self.most = 2 * sampling.mirostat_tau
        self.close = False
        """Some choice hung on a rounding error."""

    def step(self) -> int:
        s, x = self.sampling, self._ruled(logits_at(len(self.tokens)).double().numpy())
        token = int(x.argmax()) if s.temperature == 0 else self._drawn(x / s.temperature)
        self.tokens.append(token)
        return token

    def _ruled(self, x: np.ndarray) -> np.ndarray:
        s, n = self.sampling, self.sampling.repeat_last_n
        start = 0 if n < 0 else max(0, len(self.tokens) - n)
        window, output = self.tokens[start:], self.tokens[max(start, len(PROMPT)) :]
        for token in set(window) - (set() if s.penalize_newline else NEWLINES):
            x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
            x[token] -= s.frequency_penalty * output.count(token) + s.presence_penalty * (token in output)
        for word in self.barred:
            if len(word) == 1 or tuple(self.tokens[-len(word) + 1 :]) == word[:-1]:
                x[word[-1]] = -math.inf
        if s.allowed_token_ids:
            x[[t for t in range(VOCAB) if t not in s.allowed_token_ids]] = -math.inf
        return x

    def _drawn(self, x: np.ndarray) -> int:
        s = self.sampling
        p = softmax(x)
        p[p < s.min_p * p.max()] = 0
        order = np.argsort(-p, kind="stable")
        if s.top_k:
            p[order[s.top_k :]] = 0
        for cut in (self._tail_free, self._typical, self._nucleus):
            p = cut(p / p.sum())
        original = p = p / p.sum()
        if s.mirostat == 2:
            p = np.where((-np.log2(np.maximum(p, 1e-300)) > self.most) & (p < p.max()), 0, p)
            self._watch(-np.log2(original[original > 0]), self.most)
        elif s.mirostat == 1:
            p[order[p[order] > 0][self._zipf(p) :]] = 0
        p = p / p.sum()
        sums = np.cumsum(p)
        u = uniform(np.array([self.seed], np.uint64), np.array([len(self.tokens)]))[0]
        self._watch(sums, u)
        token = int(np.searchsorted(sums, u, side="right"))
        if s.mirostat:
            self.most -= s.mirostat_eta * (-math.log2(original[token]) - s.mirostat_tau)
        return token

    def _tail_free(self, p: np.ndarray) -> np.ndarray:
        z, order = self.sampling.tfs_z, np.argsort(-p, kind="stable")
        order = order[p[order] > 0]
        if z >= 1 or len(order) <= 2:
            return p
        bends = np.abs(np.diff(p[order], 2))
        sums = np.cumsum(bends / bends.sum())
        self._watch(sums, z)
        over = [i for i in range(1, len(sums)) if sums[i] > z]
        p[order[over[0] :] if over else []] = 0
        return p

    def _typical(self, p: np.ndarray) -> np.ndarray:
        mass, there = self.sampling.typical_p, np.nonzero(p > 0)[0]
        if mass >= 1:
            return p
        surprise = -np.log(p[there])
        order = there[np.argsort(np.abs(surprise - (p[there] * surprise).sum()), kind="stable")]
        sums = np.cumsum(p[order])
        self._watch(sums, mass)
        p[order[int(np.searchsorted(sums, mass)) + 1 :]] = 0
        return p

    def _nucleus(self, p: np.ndarray) -> np.ndarray:
        mass, order = self.sampling.top_p, np.argsort(-p, kind="stable")
        if mass < 1:
            sums = np.cumsum(p[order])
            self._watch(sums, mass)
            p[order[int(np.searchsorted(sums, mass)) + 1 :]] = 0
        return p

    def _zipf(self, p: np.ndarray) -> int:
        x = np.sort(p[p > 0])[::-1]
        t = np.log((np.arange(len(x) - 1) + 2) / (np.arange(len(x) - 1) + 1))
        b = np.log(x[:-1] / x[1:])
        s = max((t * b).sum() / (t * t).sum() if len(t) else 0.0, 1e-3)
        power = (math.log((s - 1) / (1 - VOCAB ** (1 - s))) + self.most * math.log(2)) / s
        self._watch(np.arange(VOCAB) + 0.5, math.exp(min(power, 40)))
        return round(math.exp(min(max(power, 0), 40)))

    def _watch(self, values: np.ndarray, border: float) -> None:
        self.close |= bool((np.abs(values - border) < 1e-4).any())


def enter(sampler: Sampler, seat: int, tokens: list[int], sampling: SamplingParams, seed: int, barred: bool) -> None:
    """As the rank does it, with the replay of what was sampled before."""
    known = tokens[: len(PROMPT)] if replays(sampling) else tokens
    new = NewSequence(seat, known, len(PROMPT), sampling, seed, (7, 8))
    spared = frozenset() if sampling.penalize_newline else NEWLINES
    sampler.enter(new, barred=BARRED if barred else (), spared=spared)
    outputs = tokens[len(PROMPT) :]
    if replays(sampling) and outputs:
        logits = torch.stack([logits_at(len(PROMPT) + i) for i in range(len(outputs))])
        sampler.replay(seat, logits, np.array(outputs), len(PROMPT))


SAMPLINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.integers(1, 30),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.01, 0.2]),
        "typical_p": st.sampled_from([0.2, 0.9]),
        "tfs_z": st.sampled_from([0.5, 0.95]),
        "mirostat": st.sampled_from([1, 2]),
        "mirostat_tau": st.sampled_from([0.5, 3.0]),
        "mirostat_eta": st.sampled_from([0.1, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.4]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.8]),
        "repeat_last_n": st.sampled_from([0, 1, 4, 10]),
        "penalize_newline": st.booleans(),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=8, max_size=20),
    },
)


TYPICAL_MIROSTAT = {
    "allowed_token_ids": [0, 1, 12, 16, 38], "top_k": 5, "min_p": 0.2, "typical_p": 0.2, "repetition_penalty": 0.7,
    "mirostat": 1, "mirostat_tau": 0.5, "mirostat_eta": 1.0,
}  # fmt: skip
"""Of which the likeliest token was dropped when Mirostat looked for the slope."""


@settings(max_examples=examples(50))
@given(st.lists(st.tuples(SAMPLINGS, st.booleans()), min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=6))
@example([(TYPICAL_MIROSTAT, False)], [])
def test_equals_a_naive_sampler_over_interruptions(cases: list[tuple[dict[str, Any], bool]], breaks: list[int]) -> None:
    """Steps are shared; after some of them a sequence loses its seat and comes back to another one."""
    sampler = Sampler(8, VOCAB, CPU)
    models = [Naive(SamplingParams(max_tokens=None, **given), i + 5, barred) for i, (given, barred) in enumerate(cases)]
    sequences = [list(PROMPT) for _ in cases]
    seats = list(range(len(cases)))
    for i, (_, barred) in enumerate(cases):
        enter(sampler, seats[i], sequences[i], models[i].sampling, i + 5, barred)
    for turn in range(18):
        if turn % 3 == 2 and turn // 3 < len(breaks) and breaks[turn // 3] < len(cases):
            i = breaks[turn // 3]
            seats[i] = (seats[i] + 4) % 8
            enter(sampler, seats[i], sequences[i], models[i].sampling, i + 5, cases[i][1])
        positions = np.array([len(tokens) for tokens in sequences])
        logits = torch.stack([logits_at(int(p)) for p in positions])
        tokens = sampler.sample(logits, np.array(seats), positions)
        sampler.remember(np.array(seats), tokens, tokens.tolist)
        for i, token in enumerate(tokens.tolist()):
            expected = models[i].step()
            assert token == expected or models[i].close, (cases[i], turn)
            models[i].tokens[-1] = token
            sequences[i].append(token)
        if any(model.close for model in models):
            return  # a rounding error may have led another way


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("target", [1.5, 2.2])
def test_mirostat_reaches_its_target(version: int, target: float) -> None:
    sampling = SamplingParams(mirostat=version, mirostat_tau=target, mirostat_eta=0.2, max_tokens=None)
    sampler, tokens = Sampler(1, VOCAB, CPU), list(PROMPT)
    enter(sampler, 0, tokens, sampling, 3, barred=False)
    found = []
    for _ in range(600):
        logits = logits_at(len(tokens)) * 0.8
        token = sampler.sample(logits[None], np.array([0]), np.array([len(tokens)]))
        sampler.remember(np.array([0]), token, token.tolist)
        tokens.append(int(token))
        found.append(-float(logits.log_softmax(-1)[int(token)]) / math.log(2))
    assert np.mean(found[100:]) == pytest.approx(target, abs=0.3)


def test_rules_that_leave_nothing_are_noticed() -> None:
    sampler = Sampler(3, VOCAB, CPU)
    only = SamplingParams(allowed_token_ids=[7, 8], min_tokens=2)
    for seat, sampling in enumerate((SamplingParams(), only, SamplingParams(allowed_token_ids=[7, 9], min_tokens=2))):
        enter(sampler, seat, PROMPT, sampling, 0, barred=False)
    logits = torch.stack([logits_at(5)] * 3)
    tokens = sampler.sample(logits, np.arange(3), np.array([5, 5, 5]))
    assert list(sampler.stuck()) == [1]
    assert int(tokens[2]) == 9
    sampler.sample(logits[:1], np.arange(1), np.array([5]))
    assert not sampler.stuck()


def test_trails_are_kept_for_nobody_else() -> None:
    sampler = Sampler(2, VOCAB, CPU)
    enter(sampler, 0, PROMPT, SamplingParams(repetition_penalty=1.2), 0, barred=False)
    assert not sampler.trails._seats
    enter(sampler, 0, PROMPT, SamplingParams(repetition_penalty=1.2, repeat_last_n=3), 0, barred=False)
    assert sampler.counts is not None
    assert not sampler.counted
    assert list(sampler.trails._seats) == [0]


def test_barred_sequences_reach_into_the_prompt() -> None:
    trail = Trail([1, 5, 9], 3, barred=BARRED)
    assert sorted(trail.barred()) == [6, 11]
    trail.tokens.append(11)
    assert trail.barred() == [6]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repeat_last_n", -2), ("typical_p", 0), ("typical_p", 1.1), ("tfs_z", 0), ("mirostat", 3), ("mirostat", True),
        ("mirostat_tau", -1), ("mirostat_tau", math.inf), ("mirostat_eta", 1.5), ("bad_words", [""]), ("bad_words", [3]),
        ("bad_words", ["x"] * 1025), ("allowed_token_ids", [-1]), ("allowed_token_ids", ["a"]),
    ],
)  # fmt: skip
def test_ranges(field: str, value: Any) -> None:
    with pytest.raises(ClientError, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SamplingParams(structured_outputs={"regex": "a"}), "structured_outputs must be a StructuredOutput"),
        (lambda: SamplingParams(ignore_eos="no"), "ignore_eos must be true or false, got 'no'"),
        (lambda: SamplingParams(stop_token_ids=0), "stop_token_ids must be a list, got 0"),
        (lambda: SamplingParams(stop=5), "stop must be a list, got 5"),
        (lambda: StructuredOutput(regex=5), "regex must be text, got 5"),
        (lambda: StructuredOutput(choice=["a", 2]), "choice must be text, got 2"),
        (lambda: StructuredOutput(json={"enum": {1}}), "json must be JSON: .*set"),
        (lambda: StructuredOutput(json_object="yes"), "json_object must be true or false"),
    ],
)
def test_values_of_another_type_are_named(make: Callable[[], object], words: str) -> None:
    """What Python callers may write, where the wire's types don't hold."""
    with pytest.raises(ClientError, match=words):
        make()


def test_a_text_alone_is_no_list_of_letters() -> None:
    assert SamplingParams(bad_words="the", stop="end").bad_words == ("the",)
    assert StructuredOutput(choice="yes").choice == ("yes",)
    assert StructuredOutput(json={"type": "object"}).json == '{"type": "object"}'
