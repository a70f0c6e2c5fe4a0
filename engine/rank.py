"""Rank: executes steps on one device. It knows no request and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvasir.engine.batch import Batch, Rows
from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.event import TokenLogprob
from kvasir.engine.sampler import Sampler, score_rows
from kvasir.engine.step import NewSequence, Result, Step
from torch import Tensor


class Rank:
    """A decoder, its KV cache, and the state of max_num_seqs seats."""

    def __init__(self, decoder: Decoder, cache: KVCache, *, max_num_seqs: int, max_model_len: int) -> None:
        self.decoder, self.cache = decoder, cache
        self.batch = Batch(max_num_seqs, max_model_len, cache.block_size, decoder.device)
        self.sampler = Sampler(max_num_seqs, decoder.spec.vocab, decoder.device)
        self._top_prompt: dict[int, int] = {}
        """seat -> how many likeliest tokens its prompt logprobs list"""

    @torch.inference_mode()
    def run(self, step: Step) -> Result:
        """Apply the step's differences, compute its rows, sample."""
        self.cache.copy(step.copies)
        self.batch.apply(step)
        for new in step.new:
            self._enter(new)
        if not step.slices:
            return Result(step.id, ())
        rows = self.batch.rows(step.slices)
        logits = self.decoder(rows.tokens, rows.ragged, self.cache, rows.logits)
        prompt_scores = {part.seat: self._score(logits[where], part.seat, ids) for part, where, ids in rows.scored}
        token_ids, scores = self._sample(logits, rows)
        return Result(step.id, token_ids, scores, prompt_scores)

    def _enter(self, new: NewSequence) -> None:
        self.sampler.enter(new)
        if new.sampling.prompt_logprobs is not None:
            self._top_prompt[new.seat] = new.sampling.prompt_logprobs

    def _sample(self, logits: Tensor, rows: Rows) -> tuple[list[int], list[TokenLogprob | None]]:
        if not len(rows.sampled):
            return [], []
        if len(rows.sampled) < len(logits):
            logits = logits[torch.from_numpy(rows.sampled).to(logits.device)]
        tokens = self.sampler.sample(logits, rows.seats, rows.positions)
        self.sampler.remember(rows.seats, tokens)
        scores = self.sampler.score_sampled(logits, rows.seats, tokens)
        token_ids: list[int] = tokens.tolist()
        self.batch.append(rows.seats, token_ids)
        return token_ids, scores

    def _score(self, logits: Tensor, seat: int, predicted: object) -> Sequence[TokenLogprob]:
        token_ids = torch.as_tensor(predicted, device=logits.device)
        return score_rows(logits, token_ids, [self._top_prompt[seat]] * len(token_ids))
