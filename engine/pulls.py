"""Pulls: which blocks a waiting sequence gets from another group. The scheduler's side, used by `loads`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Seq
from typing import Any

from kvasir.engine.blocks import token_bytes
from kvasir.engine.prices import Prices
from kvasir.engine.request import Peer
from kvasir.engine.sequence import Sequence
from kvasir.engine.step import Pull
from kvasir.engine.tables import Tables

GRACE_S = 2.0
"""Ranks end a fetch themselves when its time is over; that long is waited for their word."""
LEAST_AHEAD_S = 0.01
"""A step that takes less isn't worth to be begun on the first layers."""
SLACK = 1024
"""So many tokens behind those that are wanted are told: the peer's last block may be larger."""


class Pulls:
    """Each peer that a request names is asked once, the best first, when that is expected to pay."""

    def __init__(self, tables: Tables, own: str, prices: Prices, most: int, step: int = 0) -> None:
        self._tables, self._own, self._prices = tables, own, prices
        self._step = step
        """Tokens of a step, which may begin before all layers are here; 0: none may."""
        self._most = most
        """Blocks that one fetch may bring."""
        self.loaded = self.failed = 0
        """Blocks that came, and that were asked for and didn't."""

    def choose(self, ticket: int, sequence: Sequence, have: int, most: int) -> Pull | None:
        """The next fetch for a sequence of whose prefix, of at most `most` blocks, `have` are cached."""
        peers, size = sequence.request.peers, self._tables.pool.block_size
        while sequence.peers_asked < len(peers):
            peer = peers[sequence.peers_asked]
            sequence.peers_asked += 1
            want = min(most, peer.tokens // size, have + self._most // len(self._tables.layout.groups))
            if want > have and self._is_worth(peer, (want - have) * size):
                return Pull(
                    ticket,
                    peer.address,
                    peer.secret,
                    secrets.token_hex(16),
                    self._tables.chain(sequence),
                    token_bytes(sequence.tokens[: want * size + SLACK]),
                    have * size,
                    want * size,
                    self._prices.limit_s((want - have) * size),
                    self._ahead_s(sequence, want * size) if self._prices.layers_pay() else 0.0,
                )
        return None

    def _ahead_s(self, sequence: Sequence, end: int) -> float:
        """Of the step behind `end` tokens. Beams share blocks in ways that can't be taken back."""
        seconds = self._prices.step_s(min(self._step, len(sequence.tokens) - end))
        return 0.0 if seconds < LEAST_AHEAD_S or sequence.request.sampling.use_beam_search else seconds

    def expected_s(self, pull: Pull, sequence: Sequence) -> float:
        """What it and the step behind it take one after the other; 0: that isn't known, or there is no such step."""
        fetch_s, step_s = self._prices.fetch_s(pull.address, pull.end - pull.first), self._ahead_s(sequence, pull.end)
        return fetch_s + step_s if fetch_s and step_s else 0.0

    def stepped(self, pull: Pull, expected_s: float, took_s: float) -> None:
        """All of it came, and the step behind it is over."""
        self._prices.stepped(pull.ahead_s > 0, expected_s, took_s)

    def came(self, pull: Pull, said: Seq[int]) -> int:
        """Up to which block of the prompt every rank has all; said: what each of them said."""
        if min(said) < 0:
            self._prices.failed(pull.address)
        ends = [end if end >= 0 else ~end for end in said]
        if min(ends) < max(ends) and any(group.reach is not None for group in self._tables.layout.groups):
            return 0  # what layers that see nearby tokens alone need there isn't what was fetched
        return min(ends)

    def late(self, pull: Pull) -> None:
        """Nothing was heard of it."""
        self._prices.failed(pull.address)

    def counts(self) -> dict[str, Any]:
        """By the names of the scheduler's Stats."""
        return {"peer_loaded": self.loaded, "peer_failed": self.failed, **self._prices.counts()}

    def _is_worth(self, peer: Peer, tokens: int) -> bool:
        if peer.address == self._own or not self._prices.may_ask(peer.address):
            return False
        return peer.ordered or self._prices.pays(peer.address, tokens)
