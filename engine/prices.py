"""Prices: what fetching blocks from peers took lately, against what computing them took."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

KEEP = 0.7
"""What each new measurement leaves of the old ones."""
WARY_S = 10.0
"""So long a peer that failed isn't asked."""
STALE_S = 60.0
"""A price that is older is tried again."""
LIMIT_S = (0.5, 10.0)
"""Least and most time that a fetch may take."""
PATIENCE = 2.0
"""A fetch may take so many times what computing would, then what has come is used and the rest computed."""


@dataclass(slots=True)
class Price:
    """floor_s + bytes / (bytes / seconds)"""

    at: float
    floor_s: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def note(self, floor_s: float, bytes_: int, seconds: float, now: float) -> None:
        keep = KEEP if self.bytes and now - self.at < STALE_S else 0.0
        self.floor_s = keep * self.floor_s + (1 - keep) * floor_s
        self.bytes = keep * self.bytes + bytes_
        self.seconds = keep * self.seconds + seconds
        self.at = now

    def of(self, bytes_: int) -> float:
        return self.floor_s + bytes_ * self.seconds / self.bytes if self.bytes else 0.0


@dataclass(slots=True)
class Way:
    """Fetches in one piece, or layer by layer, until the step behind them ends: what they took over what was expected."""

    at: float = 0.0
    ratio: float = 0.0

    def note(self, ratio: float, now: float) -> None:
        keep = KEEP if self.is_known(now) else 0.0
        self.at, self.ratio = now, keep * self.ratio + (1 - keep) * ratio

    def is_known(self, now: float) -> bool:
        """It was measured lately."""
        return bool(self.ratio) and now - self.at < STALE_S


class Prices:
    """Any thread. token_bytes: what a token's keys and values take in all ranks."""

    def __init__(self, token_bytes: float) -> None:
        self._token_bytes = token_bytes
        self._lock = threading.Lock()
        self._peers: dict[str, Price] = {}
        self._all = Price(0.0)
        self._failed: dict[str, float] = {}
        self._ways = {False: Way(), True: Way()}
        """By whether layer by layer."""
        self._tokens = self._seconds = 0.0
        self.bytes = 0

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of prompts took so long."""
        self._tokens = KEEP * self._tokens + tokens
        self._seconds = KEEP * self._seconds + seconds

    def fetched(self, address: str, tokens: int, floor_s: float, seconds: float) -> None:
        """A fetch of so many tokens' blocks: `seconds` behind the first byte."""
        now, size = time.monotonic(), int(tokens * self._token_bytes)
        with self._lock:
            self.bytes += size
            for price in (self._peers.setdefault(address, Price(now)), self._all):
                price.note(floor_s, size, max(seconds, 1e-6), now)
            for old in [key for key, price in self._peers.items() if now - price.at > STALE_S]:
                del self._peers[old]

    def failed(self, address: str) -> None:
        """It didn't answer, or wrongly, or too late."""
        now = time.monotonic()
        with self._lock:
            self._failed = {key: until for key, until in self._failed.items() if until > now}
            self._failed[address] = now + WARY_S

    def may_ask(self, address: str) -> bool:
        """It didn't fail lately."""
        with self._lock:
            return self._failed.get(address, 0.0) <= time.monotonic()

    def pays(self, address: str, tokens: int) -> bool:
        """Fetching is expected to be faster than computing; what was never measured is tried."""
        now, compute = time.monotonic(), self._compute(tokens)
        with self._lock:
            price = self._peers.get(address)
            if price is None or now - price.at > STALE_S or compute is None:
                return True
            return price.of(int(tokens * self._token_bytes)) < compute

    def fetch_s(self, address: str, tokens: int) -> float:
        """What a fetch is expected to take; 0: nothing was measured."""
        with self._lock:
            return self._peers.get(address, self._all).of(int(tokens * self._token_bytes))

    def stepped(self, layered: bool, expected_s: float, took_s: float) -> None:
        """A fetch and the step behind it."""
        self._ways[layered].note(took_s / expected_s, time.monotonic())

    def layers_pay(self) -> bool:
        """What begins on the first layers ends sooner. Each way that wasn't tried lately is tried."""
        now, whole, layered = time.monotonic(), self._ways[False], self._ways[True]
        return not layered.is_known(now) or (whole.is_known(now) and layered.ratio <= whole.ratio)

    def limit_s(self, tokens: int) -> float:
        """How long a fetch may take."""
        compute, (least, most) = self._compute(tokens), LIMIT_S
        return most if compute is None else min(most, max(least, PATIENCE * compute))

    def step_s(self, tokens: int) -> float:
        """What computing them is expected to take; 0: nothing was measured."""
        return self._compute(tokens) or 0.0

    def counts(self) -> dict[str, float]:
        """By the names of the scheduler's Stats."""
        with self._lock:
            speed = self._all.bytes / self._all.seconds if self._all.seconds else 0.0
            return {"peer_bytes": self.bytes, "fetch_floor_s": self._all.floor_s, "fetch_bytes_per_s": speed}

    def _compute(self, tokens: int) -> float | None:
        return tokens * self._seconds / self._tokens if self._tokens else None
