"""Planning: which tokens of which sequences one step computes, and who gets a seat for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

from kvasir.engine.loads import Loads
from kvasir.engine.seats import Seats
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.step import Slice

AHEAD = 4
"""So many of those that wait for a seat have their blocks read from lower tiers meanwhile."""

LEAST_PIECE = 64
"""Tokens of prompts that a stage is given at least, if there are so many."""


def piece(left: int, budget: int, depth: int) -> int:
    """Tokens of prompts for one step, when so many are left: with several stages pieces so small that all have work, but worth
    reading the weights for. c pieces keep d stages busy for c / (c + d - 1) of the time."""
    return budget if depth == 1 else max(LEAST_PIECE, budget // 8, -(-left // (4 * depth)))


class Planning:
    """The parameters are the scheduler's. park(head): somebody gave up its place for `head`."""

    def __init__(
        self,
        seats: Seats,
        loads: Loads,
        totals: MutableMapping[str, int],
        park: Callable[[Sequence], bool],
        *,
        budget: int,
        depth: int,
        whole_prompts: bool,
        pool_last: bool,
        stretch_len: float,
    ) -> None:
        self._seats, self._loads, self._totals, self._park = seats, loads, totals, park
        self.pool, self.tables, self.budget = seats.pool, seats.tables, budget
        self._depth, self._whole_prompts, self._pool_last, self._stretch_len = (
            depth,
            whole_prompts,
            pool_last,
            stretch_len,
        )
        self.steps = 0
        """That were planned."""
        self.slices: list[tuple[Sequence, bool]] = []
        """Of the step that is being planned, in their order: whose they are, and whether they follow an unknown token."""
        self._blocked: tuple[Order, tuple[int, int]] | None = None
        """Who lacked blocks, and how many blocks and seats were free when it was last asked."""
        self._turn = 0

    def plan(self, now: float) -> list[Slice]:
        """The next step's slices. `steps` and `slices` are the caller's to advance."""
        self._seats.stalled = None
        self._look_below(now)
        lacking = [(sequence.behind, sequence) for _, sequence in self._seats.running]
        prompts = sum(count > 1 for count, _ in lacking)
        slices = self._plan_streams([sequence for count, sequence in lacking if count == 1], prompts > 0)
        left = self.budget - len(slices)
        admitted = self._admit(left - prompts, now) if self._seats.stalled is None else set()
        if not prompts and not admitted:
            return slices
        behind = [s for _, s in self._seats.running if s.behind > 1 or id(s) in admitted]
        return slices + self._plan_prompts(behind, min(left, self._dealt(behind)), self._ends(len(slices)))

    def _ends(self, streams: int) -> int:
        """How many prompts may end in a step with so many streams. With several stages all that get a token in one step wait
        for it together, so sequences are dealt out over as many steps as there are stages; else some stages would idle."""
        live = len(self._seats.running)
        return live if self._depth == 1 else max(1, -(-live // self._depth) - streams)

    def _dealt(self, prompts: list[Sequence]) -> int:
        """Tokens of prompts for one step."""
        if self._whole_prompts:
            return self.budget
        return piece(sum(sequence.behind + sequence.flying for sequence in prompts), self.budget, self._depth)

    def _plan_streams(self, streams: list[Sequence], prompts: bool) -> list[Slice]:
        """One token for each of these, that lack one; when there are more than fit, they take turns."""
        room = self.budget if self._depth == 1 else min(self.budget, -(-len(streams) // self._depth))
        streams = [sequence for sequence in streams if not sequence.promised or self._ready(sequence)]
        if prompts or (self._seats.waiting and self._seats.free):
            room = min(
                room, self.budget - max(1, self.budget // 4)
            )  # prompts make progress however many streams there are
        room = max(room, 1)
        if len(streams) > room:
            self._turn = (self._turn + room) % len(streams)
            streams = (streams[self._turn :] + streams[: self._turn])[:room]
            streams.sort(key=lambda sequence: sequence.order)
        # most important first, so that nobody loses blocks to a less important one
        ready = [sequence for sequence in streams if self._seats.grow(sequence, sequence.planned + 1, self.steps + 1)]
        return [self._slice(sequence, 1) for sequence in ready]

    def _ready(self, sequence: Sequence) -> bool:
        """The token that it lacks is still being sampled, but will be known where it is needed, and won't be its last."""
        length = len(sequence.tokens) + sequence.promised
        known = self.steps + 1 - sequence.step >= self._depth
        same = sequence.stretched or length <= self._stretch_len
        return known and same and not sequence.waits and length < sequence.max_len

    def _plan_prompts(self, prompts: list[Sequence], left: int, ends: int) -> list[Slice]:
        """Even shares of `left` tokens; what one sequence doesn't need, the others get. Up to `ends` get their last one."""
        shares: list[tuple[Order, int, Sequence]] = []
        for number, sequence in enumerate(sorted(prompts, key=lambda s: (s.behind, s.order))):
            share = min(sequence.behind, -(-left // (len(prompts) - number)))
            if self._whole_prompts:
                share = sequence.behind if sequence.behind <= left else 0
            if share > 0:
                shares.append((sequence.order, share, sequence))
                left -= share
        shares.sort(key=lambda entry: entry[0])
        ready = [
            (share, sequence)
            for share, sequence in self._held_back(shares, ends)
            if self._seats.grow(sequence, sequence.planned + share, self.steps + 1)
        ]
        return [self._slice(sequence, share) for share, sequence in ready]

    def _held_back(self, shares: list[tuple[Order, int, Sequence]], ends: int) -> Iterator[tuple[int, Sequence]]:
        """(tokens, whose) without the last token of those that would end beyond the first `ends`. What isn't sampled is done
        with its prompt, and nobody waits."""
        for _, share, sequence in shares:
            if share == sequence.behind and sequence.request.pooling is None and not self._whole_prompts:
                ends -= 1
                share -= ends < 0
            if share:
                yield share, sequence

    def _slice(self, sequence: Sequence, count: int) -> Slice:
        assert sequence.seat is not None
        start, known = sequence.planned, len(sequence.tokens)
        end = start + count
        scores = sequence.prompt_scores is not None and start < sequence.prompt_len - 1
        scores = scores and sequence.request.sampling.prompt_logprob_start - 1 < end
        pool = sequence.request.pooling is not None
        sample = end == known + sequence.promised and not pool
        planned = Slice(
            sequence.seat, start, count, sample, scores, pool, start + 1 < known and sequence.replays(count)
        )
        self.slices.append((sequence, end > known))
        sequence.flying, sequence.promised = sequence.flying + count, sequence.promised + sample
        sequence.step = self.steps + 1
        return planned

    def _admit(self, room: int, now: float) -> set[int]:
        """Seat waiting sequences, strictly in order: one that lacks blocks isn't overtaken, or it might wait for ever."""
        admitted: set[int] = set()
        while self._seats.waiting and len(admitted) < room:
            sequence = self._seats.waiting[0][1]
            if not self._seats.free or self._still_blocked(sequence):
                if self._park(sequence):
                    continue
                break
            most = self.cacheable(sequence)
            if self._loads.seek(sequence, most, now):
                del self._seats.waiting[0]
                continue
            found = self._fitting(sequence, most)
            if found is None and self._seats.lends.give_up():
                continue
            if found is None:
                self._blocked = (sequence.order, self._free)
                if self._park(sequence):
                    continue
                break
            if self._loads.land(sequence):
                continue  # more of it is cached now
            matched, tables = found
            del self._seats.waiting[0]
            sequence.computed = matched * self.pool.block_size
            if not sequence.scheduled:
                sequence.scheduled = now
            # what its own prompt left behind is no hit, nor what a beam's parent did
            if not (sequence.preemptions or sequence.index or sequence.first_token):
                sequence.cached = min(sequence.computed, sequence.prompt_len)
                self._totals["prefix_queries"] += len(sequence.tokens)
                self._totals["prefix_hits"] += sequence.computed
            self._seats.seat(sequence, self.tables.begin(sequence, tables))
            admitted.add(id(sequence))
        return admitted

    def _fitting(self, sequence: Sequence, most: int) -> tuple[int, list[list[int]]] | None:
        """(blocks, tables) of its longest cached prefix, up to `most` blocks; None: what it needs besides isn't free."""
        spare = sum(self.tables.due(other) for _, other in self._seats.running)
        for limit in (
            (most,) if self._seats.running else (most, 0)
        ):  # a window's blocks come on top of what it needs alone
            matched, tables = self.tables.match(sequence, limit)
            need = self.tables.need(sequence, matched)
            if need + spare <= self.pool.num_free - sum(self.pool.count_free(table) for table in tables):
                return matched, tables
        return None

    def _still_blocked(self, sequence: Sequence) -> bool:
        """It lacked blocks, and none was given back since: its prompt needn't be looked up again at every step. Nor a seat,
        with the blocks that were meant for whoever had it: of one that came and went within a step none was ever taken."""
        order, (blocks, seats) = self._blocked or (None, (0, 0))
        if order != sequence.order or self._free[0] > blocks or self._free[1] > seats:
            return False
        self._blocked = (sequence.order, self._free)
        return True

    @property
    def _free(self) -> tuple[int, int]:
        return self.pool.num_free, len(self._seats.free)

    def _look_below(self, now: float) -> None:
        """Read what the next to be seated lack in the cache; who has waited too long for that gets its turn without."""
        for sequence in self._loads.overdue(now):
            self._seats.queue(sequence)
        for entry in self._seats.waiting[:AHEAD]:
            sequence = entry[1]
            if sequence.sought == -2 and self._loads.seek(sequence, self.cacheable(sequence), now):
                self._seats.waiting.remove(entry)

    def cacheable(self, sequence: Sequence) -> int:
        """Blocks of it that may come from the cache; at least one token is left to compute, since its row is needed."""
        stretched = len(sequence.tokens) > self._stretch_len
        if stretched != sequence.stretched:
            sequence.stretched, sequence.contents = stretched, []
        if not self.pool.prefix_caching or (sequence.request.pooling is not None and not self._pool_last):
            return 0
        unseen = sequence.skippable
        if sequence.prompt_scores is not None:
            unseen = min(unseen, max(0, sequence.request.sampling.prompt_logprob_start - 1))
        return unseen // self.pool.block_size
