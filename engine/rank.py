"""Rank: executes steps on one device. It knows no request and decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvasir.engine import mesh
from kvasir.engine.batch import Batch, Ints, Rows, send
from kvasir.engine.cache import KVCache
from kvasir.engine.constraint import Constraint
from kvasir.engine.decoder import Decoder
from kvasir.engine.event import TokenLogprob
from kvasir.engine.exchange import Exchange
from kvasir.engine.grammar import Grammars
from kvasir.engine.graphs import Forward, Graphs
from kvasir.engine.memory import LEAST_LOGITS
from kvasir.engine.outcome import Copy, Outcome, Part
from kvasir.engine.pooler import Pooler
from kvasir.engine.processors import Processors
from kvasir.engine.sampler import Sampler, scoring
from kvasir.engine.step import NewSequence, Result, Slice, Step, replays
from kvasir.engine.tiers import Tiers
from kvasir.engine.words import Words

if TYPE_CHECKING:  # transformers, which is slow to import and seldom needed
    from kvasir.engine.fallback import Fallback

GONE = -1


@dataclass(frozen=True, eq=False)
class Coming:
    """What a step samples, on its way to the first stage."""

    step: int
    seats: Ints
    tokens: Tensor
    """Filled once `work` has been waited for."""
    work: Any


class Rank:
    """A decoder, its KV cache, and the state of max_num_seqs seats.

    Of several ranks each runs its share of every step; one of them samples, and the others are sent or `learn` what.
    """

    def __init__(
        self,
        decoder: Decoder | Fallback,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        pooler: Pooler | None = None,
        grammars: Grammars | None = None,
        tiers: Tiers | None = None,
        processors: Processors | None = None,
    ) -> None:
        self.tiers = tiers
        self.exchange: Exchange | None = None
        """Set when the group fetches blocks from others, and lends them."""
        self.decoder, self.cache, self.pooler, self._grammars = decoder, cache, pooler, grammars
        self.forward: Forward = decoder
        """The decoder, or CUDA graphs around it."""
        self._processors = processors or Processors(())
        self.place = decoder.mesh.place
        self.max_logits = max(max_num_seqs, LEAST_LOGITS)
        self.batch = Batch(max_num_seqs, max_model_len, cache.block_size, decoder.device, len(cache.layout.groups))
        self.mesh = decoder.mesh
        vocab, patience = decoder.spec.vocab, self.mesh.patience
        self.sampler = Sampler(max_num_seqs, vocab, decoder.device, patience) if self.place.samples else None
        self.lags = decoder.device.type in mesh.LAGGING
        """What is sampled lies on the device until the next step begins; on a CPU the host has it at once."""
        self._awaited: dict[int, Ints] = {}
        """step -> seats whose next token it samples; GONE: another sequence has taken it since"""
        self._unread: deque[Outcome] = deque()
        """Where this rank `promises`: the last steps, whose tokens the host hasn't read."""
        self._coming: deque[Coming] = deque()
        """In the first of several stages: what the last one samples of the steps that are being executed."""
        self._promised: set[int] = set()
        """Steps whose tokens are there, in the first of several stages, and that this host hasn't learnt."""
        self._top_prompt: dict[int, int] = {}
        """seat -> how many likeliest tokens its prompt logprobs list"""

    @property
    def promises(self) -> bool:
        """Every rank's device has what is sampled: no host is told. Of several stages the first has it alone, later."""
        return self.lags and self.place.pp == 1

    @property
    def _awaits(self) -> bool:
        """What is sampled comes here from the last stage, by the time that a step which follows it begins: such a step is
        launched before any host knows what it follows."""
        return self.lags and self.place.pp > 1 and self.place.first

    @torch.inference_mode()
    def launch(self, step: Step) -> Outcome:
        """Apply the step's differences, compute its rows, sample. What is sampled is all that ranks that don't sample know of a
        result, if they know that.

        The host waits for no device here: the tokens of the step before lie there alone until the next one begins. Only
        rules that look at tokens on the host (windows, barred texts, grammars, processors) wait for theirs, and vectors
        are waited for.
        """
        while self._unread and self._unread[0].step < step.id - 1:
            oldest = self._unread.popleft()
            self.batch.learn(self._awaited.pop(oldest.step), oldest.token_ids)
        self._take(step.id - self.place.pp)
        outcome = Outcome(step.id)
        if isinstance(self.forward, Graphs) and (step.slices or step.copies or step.moves):
            self.forward.forget()
        self._move(step)
        self.batch.apply(step)
        for new in step.new:
            for seats in self._awaited.values():
                seats[seats == new.seat] = GONE
            self._enter(new)
        if step.slices:
            self._compute(step, outcome)
        if self.exchange is not None:
            outcome.spoiled = self.exchange.arrivals.settle()
        if step.record and isinstance(self.forward, Graphs):
            self.forward.record()
        return outcome

    @property
    def lacks_graphs(self) -> bool:
        """A step may `record` one."""
        return isinstance(self.forward, Graphs) and self.forward.lacking is not None

    def _move(self, step: Step) -> None:
        """Blocks change hands while a step is planned, so all that is read of them is read before it is overwritten: what is
        saved before the copies, whose targets may have held it, and these before the loads, which may go where a copy's
        source was. What is lent may have been loaded in the same step."""
        moves = step.moves
        if moves is not None and self.tiers is not None:
            self.tiers.save(moves.saves)
        self.cache.copy(step.copies)
        if moves is not None and self.tiers is not None:
            self.tiers.apply(moves)
        if moves is not None and self.exchange is not None:
            self.exchange.apply(moves)

    def _take(self, last: int) -> None:
        """What steps up to `last` sampled: the device waits for it, and no host. Who was told already needs it no more, and
        without that none of these seats has another sequence yet."""
        while self._coming and self._coming[0].step <= last:
            coming = self._coming.popleft()
            coming.work.wait()
            if coming.step in self._awaited:
                self.batch.promise(coming.seats, coming.tokens)
                self._promised.add(coming.step)

    def _compute(self, step: Step, outcome: Outcome) -> None:
        """The forward, or several, and what is sampled."""
        if self.sampler is not None:
            self.sampler.constraints.prepare()
        sampling: list[Ints] = []
        for slices in portions(step.slices, self.max_logits):
            rows = self.batch.rows(slices)
            if slices[0].pool:
                outcome.pooled |= self._pool(slices, rows)
                continue
            sampling.append(rows.seats)
            logits = self._forward(rows)
            if logits is not None and self.sampler is not None:
                self._look_back(self.sampler, logits, rows, outcome)
                if len(rows.sampled):
                    outcome.parts.append(self._sample(self.sampler, logits, rows))
            elif self._awaits and len(rows.sampled):
                tokens = torch.zeros(len(rows.sampled), dtype=torch.int64, device=self.batch.device)
                self._coming.append(Coming(step.id, rows.seats, tokens, self.mesh.bring_back(tokens)))
            elif self.promises and len(rows.sampled):
                tokens = torch.empty(len(rows.sampled), dtype=torch.int64, device=self.batch.device)
                self._promise(rows, tokens)
                outcome.parts.append(Part(Copy(tokens, self.mesh.patience), list))
        if (self.lags or self.place.size > 1) and any(map(len, sampling)):
            self._awaited[step.id] = np.concatenate(sampling)
            if self.promises:
                self._unread.append(outcome)

    def _look_back(self, sampler: Sampler, logits: Tensor, rows: Rows, outcome: Outcome) -> None:
        """At tokens that are known: those whose scores are wanted, and those that the sampler sees again."""
        for part, where, ids in rows.scored:
            outcome.prompt_scores.append((part.seat, self._score(logits[where], part.seat, ids)))
        for part, where, ids in rows.replayed:
            first = max(part.start + 1, int(self.batch.prompt_lengths[part.seat]))
            sampler.replay(part.seat, logits[where], ids, first)

    def run(self, step: Step) -> Result:
        """`launch`, and wait for the result."""
        return self.launch(step).result()

    def learn(self, step: int, token_ids: Sequence[int]) -> None:
        """Append the tokens that a step sampled to their sequences: told to ranks that don't `promise`."""
        seats = self._awaited.pop(step, None)
        if seats is None:
            return
        if step in self._promised:
            self._promised.remove(step)
            self.batch.learn(seats, token_ids)
        else:
            self.batch.append(seats, token_ids)

    def _forward(self, rows: Rows) -> Tensor | None:
        """Logits of the rows that are wanted; None on ranks that don't have them."""
        forward = self.forward if self.cache.awaited is None else self.decoder  # graphs wait for no layer
        logits: Tensor | None = forward(rows.tokens, rows.ragged, self.cache, rows.logits)
        return logits

    def _enter(self, new: NewSequence) -> None:
        if self.pooler is not None and new.pooling is not None:
            self.pooler.enter(new)
            return
        if self.sampler is not None:
            self._enter_sampler(self.sampler, new)
        if new.sampling.prompt_logprobs is not None:
            self._top_prompt[new.seat] = new.sampling.prompt_logprobs

    def _enter_sampler(self, sampler: Sampler, new: NewSequence) -> None:
        """One with Mirostat shows the sampler again what it said: see `Slice.replay`."""
        if replays(new.sampling):
            new = replace(new, token_ids=new.token_ids[: new.prompt_len])
        words = self._grammars.words if self._grammars is not None else Words(lambda: None)
        barred, spared = words.barred(new.sampling), words.newlines(new.sampling)
        processes = self._processors.make(new.sampling, new.token_ids[: new.prompt_len])
        sampler.enter(new, self._constraint(new), barred=barred, spared=spared, processes=processes)

    def _constraint(self, new: NewSequence) -> Constraint | None:
        """Replays what a sequence said before it came (again)."""
        wanted, thoughts, grammars = new.sampling.structured_outputs, new.sampling.thoughts, self._grammars
        if wanted is None:
            limited = thoughts is not None and thoughts.budget is not None
            return Constraint(new, None, -1) if limited else None
        assert grammars is not None, "a grammar is asked of a rank that was made without any"
        return Constraint(new, partial(grammars.compiled, wanted), grammars.vocabulary().eos_token_id)

    def _pool(self, slices: Sequence[Slice], rows: Rows) -> dict[int, Sequence[float]]:
        assert self.pooler is not None, "a vector is wanted of a model that was loaded without a pooler"
        wanted, segments = self.pooler.rows(slices), self.pooler.token_types(slices)
        x = self.decoder.hidden(rows.tokens, rows.ragged, self.cache, wanted, segments)
        if not self.place.last:
            return {}
        return self.pooler.take(slices, x, self.decoder.logits)

    def _sample(self, sampler: Sampler, logits: Tensor, rows: Rows) -> Part:
        if len(rows.sampled) < len(logits):
            logits = logits[send(rows.sampled, logits.device)]
        tokens = sampler.sample(logits, rows.seats, rows.positions)
        sampled = Copy(tokens, self.mesh.patience)
        if self.promises:
            self._promise(rows, tokens)
        elif self.place.size == 1:
            self.batch.append(rows.seats, sampled.values)
        elif self.lags:
            self.mesh.bring_back(tokens)
        ended = sampler.constraints.advance(rows.seats, lambda: sampled.values)
        sampler.remember(rows.seats, tokens, lambda: sampled.values)
        scores = sampler.score_sampled(logits, rows.seats, tokens)
        return Part(sampled, scores, ended, sampler.stuck, sampler.offers)

    def _promise(self, rows: Rows, tokens: Tensor) -> None:
        """What was sampled, or is about to come here, follows its sequences."""
        self.batch.promise(rows.seats, self.mesh.tell(tokens))

    def _score(self, logits: Tensor, seat: int, predicted: Ints) -> Callable[[], list[TokenLogprob]]:
        top = [self._top_prompt[seat]] * len(predicted)
        return scoring(logits, send(predicted, logits.device), top, self.mesh.patience)


def portions(slices: Sequence[Slice], limit: int) -> Iterator[Sequence[Slice]]:
    """A step's slices by what is wanted of them: first those that are pooled, then those whose logits are wanted."""
    pooled = [part for part in slices if part.pool]
    if not pooled:
        yield from _bounded(slices, limit)
        return
    yield pooled
    if len(pooled) < len(slices):
        yield from _bounded([part for part in slices if not part.pool], limit)


def _bounded(slices: Sequence[Slice], limit: int) -> Iterator[Sequence[Slice]]:
    """Cut so that no forward wants the logits of more than `limit` rows: those of 8192 rows of a scored prompt would
    take 4 GB with a vocabulary of 128k."""
    if not any(part.prompt_logprobs or part.replay for part in slices):
        yield slices
        return
    portion: list[Slice] = []
    room = limit
    for part in slices:
        start, end = part.start, part.start + part.count
        while start < end:
            many = part.prompt_logprobs or part.replay
            count = min(end - start, room) if many else end - start
            sample = part.sample and start + count == end
            portion.append(replace(part, start=start, count=count, sample=sample))
            start += count
            room -= count if many else 1
            if room <= 0:
                yield portion
                portion, room = [], limit
    if portion:
        yield portion
