"""Sampler: each seat's sampling parameters and token counts, and one batched call per step (see kernels/sample.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.engine.batch import Ints, send
from kvasir.engine.constraint import Constraint
from kvasir.engine.event import TokenLogprob
from kvasir.engine.masks import Constraints
from kvasir.engine.outcome import Copy, Patience
from kvasir.engine.processors import Process, Processing
from kvasir.engine.shaping import Shaping
from kvasir.engine.step import Candidate, NewSequence
from kvasir.engine.trails import PENALTIES, Trails, looks_back, penalized
from kvasir.engine.words import Spellings
from kvasir.kernels.bitmask import allow, bar, best_allowed
from kvasir.kernels.sample import draw, greedy, penalise, score, uniform

Bools = npt.NDArray[np.bool_]
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""A parameter at this value has no effect (temperature apart)."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
STUCK = "allowed_token_ids, bad_words, min_tokens and structured output together leave no token to choose"
HUGE = 1e8
"""Temperatures and repetition penalties beyond this (or its reciprocal) would leave float32, and mean the same."""


class Sampler:
    """Parameters lie in one array per kind, indexed by seat, so that a step gathers them without a loop. patience: with the
    device, of a rank of several."""

    def __init__(self, max_num_seqs: int, vocab: int, device: torch.device, patience: Patience | None = None) -> None:
        self.max_num_seqs, self.vocab, self.device, self._patience = max_num_seqs, vocab, device, patience
        self.values = {name: np.full(max_num_seqs, value, np.float64) for name, value in NEUTRAL.items()}
        self.seeds = np.zeros(max_num_seqs, np.uint64)
        self.logprobs = np.full(max_num_seqs, -1, np.int64)
        self.biased: dict[int, tuple[list[int], list[float]]] = {}
        """seat -> (token ids, what is added to their logits)"""
        self.muted: dict[int, tuple[list[int], int]] = {}
        """seat -> (stop tokens, the position from which they may appear)"""
        self.counted: set[int] = set()
        """Seats with a penalty."""
        self.constraints = Constraints(max_num_seqs, vocab, apart=device.type != "cpu")
        self.trails = Trails(vocab, device)
        self.processing = Processing()
        self.shaping = Shaping(max_num_seqs, device)
        self.beams: dict[int, int] = {}
        """seat of a beam -> how many next tokens it offers"""
        self.offers: dict[int, Callable[[], list[Candidate]]] = {}
        """Row of the last `sample` -> what its beam offers, the likeliest first: asked for when the device has it."""
        self.stuck: Callable[[], dict[int, str]] = dict
        """Row of the last `sample` whose rules left no token, or whose processor failed -> why; asked for likewise."""
        self.in_prompt: Tensor | None = None
        self.counts: Tensor | None = None

    def enter(
        self,
        new: NewSequence,
        constraint: Constraint | None = None,
        *,
        barred: Spellings = (),
        spared: Collection[int] = (),
        processes: list[Process] | None = None,
    ) -> None:
        """A sequence takes a seat. `barred` token sequences aren't completed, `spared` tokens aren't penalised."""
        self.constraints.enter(new.seat, constraint)
        self.trails.enter(new, barred, spared)
        self.processing.enter(new, processes or [])
        self.shaping.enter(new.seat, new.sampling)
        seat, sampling = new.seat, new.sampling
        for name, array in self.values.items():
            array[seat] = getattr(sampling, name)
        temperature, penalty = sampling.temperature, sampling.repetition_penalty
        alone = sampling.top_p == 0 and not sampling.mirostat  # the likeliest token
        self.values["temperature"][seat] = 0.0 if alone or temperature < GREEDY_BELOW else min(temperature, HUGE)
        self.values["repetition_penalty"][seat] = min(max(penalty, 1 / HUGE), HUGE)
        self.seeds[seat] = new.seed % 2**64
        self.logprobs[seat] = -1 if sampling.logprobs is None else sampling.logprobs
        if sampling.streams > sampling.n:  # the best are chosen by them
            self.logprobs[seat] = max(0, self.logprobs[seat])
        for kept in (self.biased, self.muted, self.beams):
            kept.pop(seat, None)
        if sampling.use_beam_search:
            self.beams[seat] = min(sampling.continuations + len(new.stop_token_ids), self.vocab)
            self.values["temperature"][seat] = 0.0
        self.counted.discard(seat)
        if sampling.logit_bias:
            self.biased[seat] = list(sampling.logit_bias), list(sampling.logit_bias.values())
        stops = [token for token in new.stop_token_ids if token < self.vocab]
        if sampling.min_tokens and stops and sampling.structured_outputs is None:
            self.muted[seat] = stops, new.prompt_len + sampling.min_tokens
        if penalized(sampling) and not looks_back(sampling):
            self._count(new)

    def sample(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """logits[R, V] of the sequences in seats[R] -> token ids[R] for positions[R]. `logits` stay as they are where a row's
        scores are wanted, which are taken of them."""
        cold = self.values["temperature"][seats] == 0
        spare = not self.beams and bool((self.logprobs[seats] < 0).all())
        raw, (logits, best) = logits, self._ruled(logits, seats, positions, cold, spare=spare)
        self.offers = self._offer(raw, logits, seats) if self.beams else {}
        if cold.all():
            return greedy(logits) if best is None else best
        shaped = ~cold & self.shaping.seats[seats]
        rest = ~(cold | shaped)
        by_k = rest & (self.values["top_k"][seats] > 0)
        by_p = rest & ~by_k & (self.values["top_p"][seats] < 1)
        tokens = torch.empty(len(seats), dtype=torch.int64, device=self.device)
        # rows that need the same work go together: one row's top_p must not make all rows' vocabularies be sorted
        for kind in (cold, by_k, by_p, shaped, rest & ~(by_k | by_p)):
            if kind.any():
                rows = np.nonzero(kind)[0]
                index = self._tensor(rows)
                part = logits if len(rows) == len(seats) else logits[index]
                draw_part = self._draw_shaped if kind is shaped else self._draw
                if kind is cold:
                    tokens[index] = greedy(part) if best is None else best[index]
                else:
                    tokens[index] = draw_part(part, seats[rows], positions[rows])
        return tokens

    def replay(self, seat: int, logits: Tensor, token_ids: Ints, start: int) -> None:
        """The tokens at positions from `start` on were sampled from logits[N, V] before the sequence came here (again)."""
        seats = np.array([seat])
        for row, token in enumerate(token_ids.tolist()):
            position = np.array([start + row])
            adjusted, _ = self._ruled(logits[row : row + 1], seats, position)
            chosen = self._tensor(np.array([token]))
            self.shaping.replay(adjusted, seats, chosen, *self._plain_filters(seats))
            self.remember(seats, chosen, lambda token=token: [token])  # type: ignore[misc]
            self.constraints.advance(seats, lambda token=token: [token])  # type: ignore[misc]

    def remember(self, seats: Ints, token_ids: Tensor, on_host: Callable[[], Sequence[int]]) -> None:
        """Count new tokens of the seats whose rules look back. on_host: the same tokens, which may have to be waited for."""
        self.trails.remember(seats, on_host)
        self.processing.remember(seats, on_host)
        rows = self._rows(seats, self.counted)
        if rows and self.counts is not None:
            self.counts[self._tensor(seats[rows]), token_ids[self._tensor(np.array(rows))]] += 1

    def score_sampled(self, logits: Tensor, seats: Ints, token_ids: Tensor) -> Callable[[], list[TokenLogprob | None]]:
        """Scores of sampled tokens under the raw logits[R, V], for the seats that ask; empty when none does."""
        top = self.logprobs[seats]
        rows = np.nonzero(top >= 0)[0]
        if not len(rows):
            return list
        if len(rows) == len(seats):
            found = scoring(logits, token_ids, top.tolist(), self._patience)
        else:
            index = self._tensor(rows)
            found = scoring(logits[index], token_ids[index], top[rows].tolist(), self._patience)

        def scores() -> list[TokenLogprob | None]:
            asked = dict(zip(rows.tolist(), found(), strict=True))
            return [asked.get(row) for row in range(len(seats))]

        return scores

    def _ruled(
        self, logits: Tensor, seats: Ints, positions: Ints, cold: Bools | None = None, *, spare: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Everything but the draw: what moves logits, then what bars tokens. See `_constrain` for the second. cold: greedy rows.
        spare: nobody needs these logits any more."""
        logits, failed = self.processing.apply(self._adjust(logits, seats, positions), seats)
        logits, barred = self.trails.bar(logits, seats)
        if cold is not None and self.constraints.looks and (self.beams or barred):
            cold = cold.copy()
            cold[self._rows(seats, self.beams) + list(barred)] = False
        logits, best = self._constrain(logits, seats, cold, spare)
        most = Copy(logits[self._tensor(np.array(barred))].amax(-1), self._patience) if barred else None
        self.stuck = lambda: failed | ({} if most is None else _stuck(barred, most.values))
        return logits, best

    def _offer(self, raw: Tensor, logits: Tensor, seats: Ints) -> dict[int, Callable[[], list[Candidate]]]:
        """What the rows of beams offer: log probabilities under the `raw` distribution, moved as the logits were."""
        return {
            row: offering(raw[row], logits[row], self.beams[seat], int(self.logprobs[seat]), self._patience)
            for row, seat in enumerate(seats.tolist())
            if seat in self.beams
        }

    def _draw(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """Rows that use top_k all do; those that don't use another filter get its neutral value (2 for top_p)."""
        top_k, top_p, min_p = (self.values[name][seats] for name in ("top_k", "top_p", "min_p"))
        top_k = np.minimum(top_k, self.vocab).astype(np.int64)
        return draw(
            logits,
            self._tensor(uniform(self.seeds[seats], positions)),
            self._row(self.values["temperature"][seats]),
            min_p=self._row(min_p) if min_p.any() else None,
            top_k=self._tensor(top_k) if top_k.any() else None,
            top_p=self._row(np.where(top_p >= 1, 2.0, top_p)) if (top_p < 1).any() else None,
            most=int(top_k.max()),
        )

    def _draw_shaped(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        return self.shaping.draw(logits, seats, uniform(self.seeds[seats], positions), *self._plain_filters(seats))

    def _plain_filters(self, seats: Ints) -> tuple[Tensor, Tensor, Ints]:
        """(temperature, min_p, top_k)"""
        top_k = np.minimum(self.values["top_k"][seats], self.vocab).astype(np.int64)
        return self._row(self.values["temperature"][seats]), self._row(self.values["min_p"][seats]), top_k

    def _adjust(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """Biases, muted stop tokens and penalties; a copy when anything changes."""
        added = [(row, *self.biased[seats[row]]) for row in self._rows(seats, self.biased)]
        for row in self._rows(seats, self.muted):
            tokens, until = self.muted[seats[row]]
            if positions[row] < until:
                added.append((row, tokens, [-torch.inf] * len(tokens)))
        if added:
            logits = self._add(logits, added)
        return self.trails.penalise(self._penalise(logits, seats), seats)

    @staticmethod
    def _rows(seats: Ints, kept: Collection[int]) -> list[int]:
        """Rows of the seats of which something is kept."""
        return [row for row, seat in enumerate(seats.tolist()) if seat in kept] if kept else []

    def _constrain(self, logits: Tensor, seats: Ints, easy: Bools | None, spare: bool) -> tuple[Tensor, Tensor | None]:
        """(logits[R, V] of what the grammars allow; the best token of each row, if somebody had to know). Of `easy` rows nothing
        but the best token is wanted: where the likeliest one fits that is it. Their logits stay as they are."""
        count = np.count_nonzero(easy) if easy is not None and self.constraints.looks else 0
        put = bar if spare and logits.device.type == "cpu" else allow  # a second tensor is in no cache
        if easy is None or not count:
            rows, masks = self.constraints.masks(seats)
            return (put(logits, self._tensor(rows), self._tensor(masks)) if len(rows) else logits), None
        best = greedy(logits)
        tokens = best.numpy()
        plain = count == len(easy)
        rows, masks = self.constraints.masks(seats, (tokens if plain else np.where(easy, tokens, -1)).tolist())
        if not plain and (others := ~easy[rows]).any():
            index = self._tensor(rows[others])
            logits = put(logits, index, self._tensor(masks[others]))
            best[index] = greedy(logits[index])
            rows, masks = rows[~others], masks[~others]
        if len(rows):
            tokens[rows] = best_allowed(logits, self._tensor(rows), self._tensor(masks)).numpy()
        return logits, best

    def _penalise(self, logits: Tensor, seats: Ints) -> Tensor:
        """Penalties that look at everything; without any a step costs one look."""
        counted = self._rows(seats, self.counted)
        if not counted:
            return logits
        assert self.in_prompt is not None
        assert self.counts is not None
        values = {name: np.full(len(seats), NEUTRAL[name]) for name in PENALTIES}
        for name in PENALTIES:
            values[name][counted] = self.values[name][seats[counted]]
        repetition, presence, frequency = (self._row(values[name]) for name in PENALTIES)
        return penalise(
            logits,
            self.counts,
            self.in_prompt,
            repetition=repetition if (values["repetition_penalty"] != 1).any() else None,
            presence=presence,
            frequency=frequency,
            seats=self._tensor(seats),
        ).to(logits.dtype)

    def _add(self, logits: Tensor, additions: Sequence[tuple[int, list[int], list[float]]]) -> Tensor:
        rows = np.repeat([row for row, _, _ in additions], [len(ids) for _, ids, _ in additions])
        ids = np.concatenate([ids for _, ids, _ in additions]).astype(np.int64)
        values = self._row(np.concatenate([v for _, _, v in additions])).to(logits.dtype)
        return logits.index_put((self._tensor(rows), self._tensor(ids)), values, accumulate=True)

    def _count(self, new: NewSequence) -> None:
        """Note which tokens its prompt holds, and how often its output holds each."""
        if self.counts is None or self.in_prompt is None:
            shape = (self.max_num_seqs, self.vocab)
            self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        tokens = self._tensor(np.array(new.token_ids, np.int64))
        self.counted.add(new.seat)
        self.in_prompt[new.seat] = False
        self.in_prompt[new.seat].index_fill_(0, tokens[: new.prompt_len], 1)
        said = tokens[new.prompt_len :]
        self.counts[new.seat] = 0
        self.counts[new.seat].scatter_add_(0, said, torch.ones_like(said, dtype=torch.int32))

    def _row(self, values: npt.NDArray[np.float64]) -> Tensor:
        return self._tensor(values.astype(np.float32))

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return send(array, self.device)


def scoring(
    logits: Tensor, token_ids: Tensor, top: Sequence[int], patience: Patience | None
) -> Callable[[], list[TokenLogprob]]:
    """Scores of token_ids[R] under logits[R, V], each with its own number of likeliest tokens: asked for when the device has
    them."""
    copies = [Copy(found, patience) for found in score(logits, token_ids, max(top))]

    def scores() -> list[TokenLogprob]:
        own, rank, ids, values = (copy.values for copy in copies)
        return [
            TokenLogprob(own[i], rank[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
            for i, count in enumerate(top)
        ]

    return scores


def offering(
    raw: Tensor, logits: Tensor, most: int, likeliest: int, patience: Patience | None
) -> Callable[[], list[Candidate]]:
    """The likeliest tokens of a beam's row logits[V], `most` of them, with scores under raw[V] and `likeliest` others beside each
    (-1: none): asked for when the device has them."""
    values, ids = logits.topk(most)
    numbers, scores = Copy(ids, patience), Copy(values - raw.logsumexp(-1), patience)
    reported = None
    if likeliest >= 0:
        reported = scoring(raw.expand(most, -1), ids, [likeliest] * most, patience)

    def offers() -> list[Candidate]:
        beside: Sequence[TokenLogprob | None] = [None] * most if reported is None else reported()
        found = zip(numbers.values, scores.values, beside, strict=True)
        return [candidate for candidate in found if candidate[1] > -np.inf]

    return offers


def _stuck(rows: Sequence[int], best: Sequence[float]) -> dict[int, str]:
    """Those of `rows` whose best logit is -inf."""
    return {row: STUCK for row, value in zip(rows, best, strict=True) if value == -np.inf}
