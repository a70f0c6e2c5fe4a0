"""Shaping: draws from distributions that are truncated by tail-free or typical sampling or by Mirostat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.engine.batch import Ints, send
from kvasir.engine.request import SamplingParams
from kvasir.kernels.sample import invert, tempered
from kvasir.kernels.truncation import NEUTRAL_MASS, truncated

Floats = npt.NDArray[np.float64]
SHARES = ("tfs_z", "typical_p", "top_p")
LOGIT_BYTES = 72
"""What a draw takes at most for each logit, in sorted values, order, sums and surprises (70 were measured)."""
MOST_BYTES = 1 << 28
"""What draws take at once, or a single row where that is more."""


def shaping_bytes(rows: int, vocab: int) -> int:
    """What drawing so many rows takes beside their logits."""
    return min(rows, _portion(vocab)) * vocab * LOGIT_BYTES


def _portion(vocab: int) -> int:
    """Rows that are drawn at once."""
    return max(1, MOST_BYTES // (vocab * LOGIT_BYTES))


class Shaping:
    """How surprising each seat's next token may be (Mirostat's state), and one batched draw for the seats that ask."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.seats = np.zeros(max_num_seqs, np.bool_)
        """Which draw here."""
        self._device = device
        self._versions = np.zeros(max_num_seqs, np.int64)
        self._targets, self._rates = np.zeros(max_num_seqs), np.zeros(max_num_seqs)
        self._shares = {name: np.ones(max_num_seqs) for name in SHARES}
        self._most: Tensor | None = None

    def enter(self, seat: int, sampling: SamplingParams) -> None:
        """A sequence takes a seat."""
        self.seats[seat] = sampling.mirostat or min(sampling.tfs_z, sampling.typical_p) < 1
        if not self.seats[seat]:
            return
        if self._most is None:
            self._most = torch.zeros(len(self.seats), dtype=torch.float64, device=self._device)
        self._versions[seat] = sampling.mirostat
        self._targets[seat], self._rates[seat] = sampling.mirostat_tau, sampling.mirostat_eta
        self._most[seat] = 2 * sampling.mirostat_tau
        for name, values in self._shares.items():
            values[seat] = getattr(sampling, name)

    def draw(
        self, logits: Tensor, seats: Ints, uniforms: Floats, temperature: Tensor, min_p: Tensor, top_k: Ints
    ) -> Tensor:
        """One token for each row of logits[R, V]. Rows go in portions: all of them at once may be more than a GPU has left."""
        size = _portion(logits.shape[-1])
        found = []
        for rows in (slice(at, at + size) for at in range(0, len(seats), size)):
            part = logits[rows], seats[rows], uniforms[rows], temperature[rows], min_p[rows], top_k[rows]
            found.append(self._draw(*part))
        return torch.cat(found)

    def _draw(
        self, logits: Tensor, seats: Ints, uniforms: Floats, temperature: Tensor, min_p: Tensor, top_k: Ints
    ) -> Tensor:
        values, ids, bits = self._truncated(logits, seats, temperature, min_p, top_k)
        # drawn in the order of ids: in the order of probability, two that differ by a rounding error would change places
        ids, order = ids.sort(-1)
        place = invert(values.gather(-1, order), send(uniforms, self._device))[:, None]
        if bits is not None:
            self._learn(seats, bits.gather(-1, order).gather(-1, place)[:, 0])
        return ids.gather(-1, place)[:, 0]

    def replay(
        self, logits: Tensor, seats: Ints, token_ids: Tensor, temperature: Tensor, min_p: Tensor, top_k: Ints
    ) -> None:
        """As `draw`, when it is known what was drawn."""
        _, ids, bits = self._truncated(logits, seats, temperature, min_p, top_k)
        if bits is None:
            return
        place = (ids == token_ids[:, None]).int().argmax(-1, keepdim=True)
        self._learn(seats, bits.gather(-1, place)[:, 0])

    def _truncated(
        self, logits: Tensor, seats: Ints, temperature: Tensor, min_p: Tensor, top_k: Ints
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Only by the rules that one of these seats asks for: each is some passes over all logits, or sorts them."""
        shares = {name: values[seats] for name, values in self._shares.items()}
        given = {
            name: send(np.where(values >= 1, NEUTRAL_MASS, values), self._device)
            for name, values in shares.items()
            if values.min() < 1
        }
        versions = self._versions[seats]
        if versions.any():
            assert self._most is not None
            given |= {"most": self._most[send(seats, self._device)], "version": send(versions, self._device)}
        return truncated(
            tempered(logits, temperature, min_p),
            top_k=send(np.where(top_k > 0, top_k, logits.shape[-1]), self._device),
            **given,
        )

    def _learn(self, seats: Ints, bits: Tensor) -> None:
        """most -= eta (surprise - tau) of Mirostat's seats: what was drawn was `bits` surprising."""
        assert self._most is not None
        index, rates = send(seats, self._device), send(self._rates[seats] * (self._versions[seats] > 0), self._device)
        bits = torch.where(bits.isfinite(), bits, 0.0)
        self._most[index] -= rates * (bits - send(self._targets[seats], self._device))
