"""Batch: what a rank knows of the sequences in its seats, and how a step's rows lie. No Python work per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.engine.step import Slice, Step
from kvasir.kernels.ragged import Ragged

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The rows of one step, ready for the decoder."""

    tokens: Tensor
    """[T] int64"""
    ragged: Ragged
    logits: Tensor
    """[R] int64: rows whose logits are wanted, in the order of the slices."""
    sampled: Ints
    """Which of those R give a new token."""
    seats: Ints
    """Their sequences' seats."""
    positions: Ints
    """The new tokens' positions."""
    scored: list[tuple[Slice, slice, Ints]]
    """Slices that want prompt logprobs: (slice, where their rows are among the R, the tokens these rows predict)."""
    replayed: list[tuple[Slice, slice, Ints]] = field(default_factory=list)
    """The same of slices whose outputs the sampler sees again."""


class Batch:
    """tokens[seat, position] and table[group, seat, block]. Rows that are never used cost no memory (zeroed by the
    system)."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device, groups: int = 1
    ) -> None:
        self.block_size, self.device = block_size, device
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.table = np.zeros((groups, max_num_seqs, -(-max_model_len // block_size) + 1), np.int32)
        self.lengths = np.zeros(max_num_seqs, np.int64)
        self.known = np.zeros(max_num_seqs, np.int64)
        """Tokens that are in `tokens`: all, or all but the newest."""
        self.latest = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """Each seat's newest token, where it may still be unknown here."""
        self.prompt_lengths = np.zeros(max_num_seqs, np.int64)
        self.held = np.zeros((groups, max_num_seqs), np.int64)
        """Blocks in a seat's tables."""
        self.stretched = np.zeros(max_num_seqs, np.bool_)

    def apply(self, step: Step) -> None:
        """Take in a step's differences."""
        for new in step.new:
            length = len(new.token_ids)
            self.tokens[new.seat, :length] = new.token_ids
            self.lengths[new.seat] = self.known[new.seat] = length
            self.prompt_lengths[new.seat], self.held[:, new.seat] = new.prompt_len, 0
            self.stretched[new.seat] = new.stretched
        for seat, group, blocks in step.blocks:
            held = self.held[group, seat]
            self.table[group, seat, held : held + len(blocks)] = blocks
            self.held[group, seat] = held + len(blocks)

    def rows(self, slices: Sequence[Slice]) -> Rows:
        """Lay out the rows of these slices, one sequence after the other."""
        seats = np.array([s.seat for s in slices], np.int64)
        start = np.array([s.start for s in slices], np.int64)
        count = np.array([s.count for s in slices], np.int64)
        starts = np.concatenate(([0], np.cumsum(count)))
        owner = np.repeat(np.arange(len(slices)), count)
        positions = np.arange(starts[-1]) - starts[owner] + start[owner]
        lengths = start + count
        ragged = self._ragged(seats, owner, positions, starts, lengths)
        tokens = send(self.tokens[seats[owner], positions].astype(np.int64), self.device)
        if len(unknown := np.flatnonzero(lengths > self.known[seats])):
            newest = self.latest[send(seats[unknown], self.device)]
            tokens = tokens.index_copy(0, send(starts[1:][unknown] - 1, self.device), newest)
        return self._wanted(slices, seats, starts, lengths, tokens, ragged)

    def _ragged(self, seats: Ints, owner: Ints, positions: Ints, starts: Ints, lengths: Ints) -> Ragged:
        host_starts, host_lengths = starts.astype(np.int32), lengths.astype(np.int32)
        stretched = self.stretched[seats]
        blocks = -(-int(lengths.max()) // self.block_size)
        sent = send(positions, self.device), send(host_starts, self.device), send(host_lengths, self.device)
        turned = send(stretched[owner], self.device) if stretched.any() else None
        places, inside = np.divmod(positions, self.block_size)

        def group(number: int, others: tuple[Ragged, ...] = ()) -> Ragged:
            table = self.table[number, :, :blocks][seats]
            slots = table[owner, places].astype(np.int64) * self.block_size
            slots += inside
            return Ragged(
                positions=sent[0],
                slots=send(slots, self.device),
                starts=sent[1],
                lengths=sent[2],
                table=send(table, self.device),
                host_starts=host_starts,
                host_lengths=host_lengths,
                stretched=turned,
                others=others,
            )

        return group(0, tuple(map(group, range(1, len(self.table)))))

    def _wanted(
        self, slices: Sequence[Slice], seats: Ints, starts: Ints, lengths: Ints, tokens: Tensor, ragged: Ragged
    ) -> Rows:
        """Which rows' logits are needed: the last of a slice that samples, all that score a prompt token."""
        if not any(s.prompt_logprobs or s.replay for s in slices):
            sample = np.array([s.sample for s in slices])
            rows = send(starts[1:][sample] - 1, self.device)
            return Rows(tokens, ragged, rows, np.arange(sample.sum()), seats[sample], lengths[sample], [])
        wanted: list[Ints] = []
        sampled, have = [], 0
        known: tuple[list[tuple[Slice, slice, Ints]], list[tuple[Slice, slice, Ints]]] = ([], [])
        for i, part in enumerate(slices):
            for positions, found in zip(self._known(part), known, strict=True):
                if len(positions):
                    predicted = self.tokens[part.seat, positions + 1].astype(np.int64)
                    found.append((part, slice(have, have + len(positions)), predicted))
                    wanted.append(positions - part.start + starts[i])
                    have += len(positions)
            if part.sample:
                wanted.append(starts[i + 1 : i + 2] - 1)
                have += 1
                sampled.append(have - 1)
        sample = np.array([s.sample for s in slices])
        rows = send(np.concatenate(wanted), self.device)
        return Rows(tokens, ragged, rows, np.array(sampled, np.int64), seats[sample], lengths[sample], *known)

    def _known(self, part: Slice) -> tuple[Ints, Ints]:
        """Positions in a slice whose successors are known and wanted: those to be scored, those to be replayed."""
        end, border = part.start + part.count, int(self.prompt_lengths[part.seat]) - 1
        scored = np.arange(part.start, min(end, border) if part.prompt_logprobs else part.start)
        first, last = max(part.start, border), min(end, int(self.lengths[part.seat]) - 1)
        return scored, np.arange(first, last if part.replay else first)

    def promise(self, seats: Ints, sampled: Tensor) -> None:
        """A step sampled these tokens; `learn` says which they are."""
        self.latest[send(seats, self.device)] = sampled
        self.lengths[seats] += 1

    def learn(self, seats: Ints, token_ids: Sequence[int]) -> None:
        """The oldest unknown tokens of these seats; negative ones are nobody's any more."""
        own = seats >= 0
        at = seats[own]
        self.tokens[at, self.known[at]] = np.array(token_ids, np.int32)[own]
        self.known[at] += 1

    def append(self, seats: Ints, token_ids: Sequence[int]) -> None:
        """The tokens that a step sampled elsewhere; seats as in `learn`."""
        self.lengths[seats[seats >= 0]] += 1
        self.learn(seats, token_ids)


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. Copies from pinned memory don't make the host wait; a CPU tensor shares the array."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
