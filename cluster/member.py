"""Member: a group as a router knows it: its load as reported, what this gateway sent it since, how fast it computes."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.cluster.directory import BlockDirectory, BlockFeed
from kvasir.cluster.prompt_keys import Hasher, Hashers
from kvasir.cluster.standings import Column, Standings
from kvasir.engine.config import Role
from kvasir.engine.info import ModelInfo
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb

MEMORY_S = 5.0
"""Rates are averages over about this long."""
KNOWN_S = 60.0
"""A group that was measured this long ago may have become another."""
FETCH_FLOOR_S, FETCH_BYTES_PER_S = 0.01, 1e9
"""What a fetch is taken to cost until one was measured."""
FETCH_FLOOR, FETCH_TOKEN = 64.0, 0.1
"""The same in tokens computed, while it isn't known how fast a group computes, or how large its blocks are."""
DECODE_WEIGHT = 0.02
"""What a token in the cache of running sequences costs, in tokens computed: it slows down its group's steps."""


@dataclass(slots=True, eq=False)
class Reservation:
    """A request that was given to a group and isn't part of its reported load yet."""

    member: Member
    tokens: int
    """To be computed before it streams."""
    blocks: int
    open: bool = True
    number: int | None = None
    """The request's number on the stream, once it was sent."""

    def streams(self) -> None:
        """Nothing of its prompt is left to compute."""
        if self.open and self.tokens:
            self.tokens = 0
            self.member.settle(None)

    def settle(self) -> None:
        """It is counted in the group's reports from now on, has ended or was refused."""
        if self.open:
            self.open = False
            self.member.settle(self)


@dataclass(slots=True)
class Pace:
    """What a model's groups compute on average, for those that weren't measured yet."""

    rate: float = 0.0
    fetch_floor_s: float = 0.0
    fetch_bytes_per_s: float = 0.0


class Member:
    """Belongs to one router. `hasher` is None until the first connection."""

    prefill_tokens = Column(int)
    """To be computed before all that it was given streams."""
    prefills = Column(int)
    """Requests that these belong to; they share its steps evenly."""
    decoding = Column(float)
    """What its decoding slows down, in tokens computed."""
    requests = Column(int)
    """Running or waiting."""
    rate = Column(float)
    """Prompt tokens that it computes in a second, beside its decoding; 0 until there was a queue."""
    fetch_floor = Column(float)
    """What fetching costs it, in tokens computed."""
    fetch_token = Column(float)
    """And for each token."""
    serves = Column(bool)
    """Peers can fetch its blocks."""

    def __init__(
        self,
        name: str,
        directory: BlockDirectory,
        hashers: Hashers,
        pace: Pace,
        standings: Standings,
        kv: tuple[str, str] = ("", ""),
    ) -> None:
        self.name = name
        self.kv_address, self.kv_secret = kv
        """Where peers fetch its blocks, if it serves any."""
        self._role: Role = "both"
        self.hasher: Hasher | None = None
        self.version = b""
        """What it has begun, only others of this version go on with."""
        self.stats = Stats()
        self.group = directory.join()
        """Its number in the directory, and among the standings."""
        self.standings = standings
        standings.join(self.group)
        self.block_size = 16
        self.fetch_floor, self.fetch_token = FETCH_FLOOR, FETCH_TOKEN
        self._measured_at = -KNOWN_S
        self._token_bytes = 0.0
        self._max_num_seqs = 0
        self._step_s = 0.0
        """A step's length: a request waits for the end of the one that is being computed."""
        self._end_rate = 0.0
        """Sequences that end in a second while others wait for a seat."""
        self._hashers, self._directory, self._pace = hashers, directory, pace
        self._feed = BlockFeed(directory, self.group)
        self._open: list[Reservation] = []
        self._told_at: float | None = None

    # -- what the group says

    def welcome(self, info: ModelInfo, incarnation: str) -> None:
        """A connection; load and a snapshot of its blocks follow."""
        self.hasher, self.block_size, self._max_num_seqs = self._hashers.of(info), info.block_size, info.max_num_seqs
        self.version = info.version
        self.standings.changes += 1
        self._told_at, self.serves = None, bool(self.kv_address)
        self._token_bytes = info.block_bytes / info.block_size
        self._feed.begin(incarnation)
        self._price_fetches()

    def lost(self) -> None:
        """The connection broke."""
        self.serves = False

    def report(self, stats: Stats, counted: int, now: float) -> None:
        """The group's load, with this gateway's requests up to number `counted` in it."""
        if self._told_at is not None and now > self._told_at:
            self._measure(self.stats, stats, now - self._told_at, now)
        elif not self.rate and stats.prefill_rate:  # believed, but not for long: it may have been slow to start
            self._measured_at = max(self._measured_at, now - KNOWN_S + MEMORY_S)
        self.stats, self._told_at = stats, now
        self._price_fetches()
        for reservation in [one for one in self._open if one.number is not None and one.number <= counted]:
            reservation.settle()
        self._add_up()

    def blocks(self, message: pb.Blocks) -> bool:
        """The group's blocks; True when a snapshot has to be asked for."""
        return self._feed.take(message)

    def lacks_blocks(self) -> bool:
        """A snapshot has to be asked for: the directory had no room for all of its blocks, and has some now."""
        return self._feed.lacks()

    def leave(self) -> None:
        """The group is no more."""
        self._directory.leave(self.group)
        self.standings.leave(self.group)
        self.standings = Standings()  # its number is the next group's, and whatever still ends is none of that one's
        self.standings.join(self.group)

    @property
    def role(self) -> Role:
        """What requests it takes."""
        return self._role

    @role.setter
    def role(self, role: Role) -> None:
        self._role = role
        self.standings.changes += 1

    # -- what it is given

    def reserve(self, tokens: int, blocks: int) -> Reservation:
        """Count a request as its load, from now until `settle`."""
        reservation = Reservation(self, tokens, blocks)
        self._open.append(reservation)
        self._add_up()
        return reservation

    def settle(self, reservation: Reservation | None) -> None:
        """A reservation ends, or (None) has changed."""
        if reservation is not None:
            self._open.remove(reservation)
        self._add_up()

    # -- what follows from it

    def before(self, tokens: float) -> float:
        """Tokens of others that are computed there before a request that has so many itself: all take the same share of
        each step, so that none of them is ahead by more than it has."""
        return min(self.prefill_tokens, self.prefills * tokens)

    def queue(self, tokens: float, together: bool = False) -> float:
        """Seconds that a request with so many tokens to compute waits for others; together: for all that were given to it
        before. Until its speed was measured, by what it says of its own steps; 0 while that isn't known."""
        seats = self._seat_wait(tokens) if self._end_rate else 0.0
        ahead = self.prefill_tokens if together else self.before(tokens)
        speed = self.speed or self.stats.prefill_rate
        return seats + self._step_s + ahead / speed if speed else seats

    def wait(self, tokens: float, together: bool = False) -> float:
        """The same, and for its own tokens."""
        speed = self.speed or self.stats.prefill_rate
        return self.queue(tokens, together) + (tokens / speed if speed else 0.0)

    def fetch_price(self, tokens: float) -> float:
        """What it costs this group to fetch the blocks of so many tokens, in tokens computed."""
        return self.fetch_floor + self.fetch_token * tokens

    @property
    def speed(self) -> float:
        """Its rate, or its like's; 0 while neither is known."""
        return self.rate or self._pace.rate

    def known(self, now: float) -> bool:
        """Its speed was measured lately."""
        return now - self._measured_at < KNOWN_S

    def _seat_wait(self, tokens: float) -> float:
        """Seconds until one more request has a seat and blocks for so many tokens."""
        stats = self.stats
        short = self.requests + 1 - self._max_num_seqs
        lacking = sum(one.blocks for one in self._open) + -(-tokens // self.block_size) - stats.free_blocks
        if lacking > 0:
            short = max(short, stats.waiting + len(self._open) + 1)
        return max(0, short) / self._end_rate

    def _add_up(self) -> None:
        stats, sent = self.stats, self._open
        tokens, prefills, blocks = stats.queued_prefill_tokens, stats.prefills, stats.decode_blocks
        for one in sent:
            tokens, prefills, blocks = tokens + one.tokens, prefills + (one.tokens > 0), blocks + one.blocks
        self.prefill_tokens, self.prefills = tokens, prefills
        self.requests = stats.running + stats.waiting + len(sent)
        self.decoding = DECODE_WEIGHT * blocks * self.block_size

    def _price_fetches(self) -> None:
        """What it measured itself, else what its like did."""
        stats, pace = self.stats, self._pace
        if stats.fetch_bytes_per_s:
            pace.fetch_floor_s, pace.fetch_bytes_per_s = stats.fetch_floor_s, stats.fetch_bytes_per_s
        floor = stats.fetch_floor_s or pace.fetch_floor_s or FETCH_FLOOR_S
        speed, bytes_per_s = self.speed, stats.fetch_bytes_per_s or pace.fetch_bytes_per_s or FETCH_BYTES_PER_S
        if speed and self._token_bytes:
            self.fetch_floor, self.fetch_token = floor * speed, self._token_bytes / bytes_per_s * speed

    def _measure(self, before: Stats, after: Stats, seconds: float, now: float) -> None:
        """Rates count only when there was enough to do."""
        share = min(1.0, seconds / MEMORY_S)
        if before.queued_prefill_tokens and after.queued_prefill_tokens:
            computed = after.step_tokens - before.step_tokens - (after.generation_tokens - before.generation_tokens)
            self.rate = _average(self.rate, max(0, computed) / seconds, share)
            if after.steps > before.steps:
                self._step_s += share * (seconds / (after.steps - before.steps) - self._step_s)
            self._measured_at = now
            self._pace.rate = _average(self._pace.rate, self.rate, share)
        if before.waiting and after.waiting:
            self._end_rate = _average(self._end_rate, (after.ended - before.ended) / seconds, share)


def _average(before: float, rate: float, share: float) -> float:
    """0 before: nothing was measured yet."""
    return before + share * (rate - before) or before if before else rate
