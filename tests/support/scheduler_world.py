"""A scheduler, a cache that remembers what was written where, and what every request is to get."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import product
from typing import Any

from kvasir.engine.beam_search import BeamSearch
from kvasir.engine.blocks import BlockPool
from kvasir.engine.event import Event, Failed, Finished, Pooled, Token, TokenLogprob
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.request import PoolingParams, Request, SamplingParams, StructuredOutput
from kvasir.engine.scheduler import ONE_GROUP, Scheduler
from kvasir.engine.step import Candidate, Moves, Result, Step

VOCABULARY = 50
END = 7


def model(tokens: Seq[int], seed: int) -> int:
    """The next token: a pure function of all tokens so far and the seed."""
    return random.Random(f"{seed} {tokens}").randrange(VOCABULARY)


def offers(tokens: Seq[int], count: int) -> list[Candidate]:
    """A beam's likeliest next tokens: a pure function of all tokens so far."""
    draw = random.Random(f"beam {tokens}")
    scores = {draw.randrange(VOCABULARY): -draw.expovariate(1.0) for _ in range(3 * count)}
    return [(token, score, None) for token, score in sorted(scores.items(), key=lambda item: -item[1])[:count]]


RULES = StructuredOutput(regex="the scheduler never reads it")
WHY = "no token fits"
FAILS = object()
"""What an output that its grammar has no token for ends with."""


def verdict(tokens: Seq[int]) -> set[str | None]:
    """Of a grammar on all tokens so far: it goes on (empty), is over (None), or has no token (WHY)."""
    drawn = random.Random(f"grammar {tokens}").random()
    return {None} if drawn < 0.1 else {WHY} if drawn < 0.12 else set()


def stops_of(request: Request) -> set[int]:
    sampling = request.sampling
    always = sampling.use_beam_search and sampling.structured_outputs is not None
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos and not always else (END,))}


def searched(request: Request, limit: int) -> list[tuple[list[int], object]]:
    """What a beam search must find, computed without any scheduler."""
    stops, held = stops_of(request), request.sampling.structured_outputs is not None
    wanted, prompt = request.sampling.max_tokens, list(request.prompt_token_ids)
    search = BeamSearch(request.sampling, stops, limit - len(prompt) if wanted is None else wanted)
    count = request.sampling.continuations + len(stops)
    while True:
        sequences = [[*prompt, *beam.token_ids] for beam in search.live]
        if held and any(WHY in verdict(tokens) for tokens in sequences):
            return [([], FAILS)] * request.sampling.n
        if not search.advance([offers(tokens, count) for tokens in sequences]):
            break
    return [(list(ending.beam.token_ids), ending.reason) for ending in search.best(request.sampling.n)]


def expected(request: Request, index: int, seed: int, limit: int) -> tuple[list[int], object]:
    """What the continuation must be, and why it ends, computed without any scheduler."""
    if request.sampling.use_beam_search:
        return searched(request, limit)[index]
    tokens = [*request.prompt_token_ids, *request.resume_token_ids]
    stops, held = stops_of(request), request.sampling.structured_outputs is not None
    wanted = request.sampling.max_tokens
    longest = limit if wanted is None else len(request.prompt_token_ids) + wanted
    start, reason = len(tokens), None  # type: int, object
    while reason is None:
        tokens.append(model(tokens, seed + index))
        found = verdict(tokens) if held else set()
        enough = len(tokens) - len(request.prompt_token_ids) >= request.sampling.min_tokens
        if WHY in found:
            reason = FAILS
        elif None in found or (enough and tokens[-1] in stops):
            reason = "stop"
        elif len(tokens) >= longest:
            reason = "length"
    return tokens[start:], reason


@dataclass
class Seat:
    tokens: list[int]
    prompt_len: int
    seed: int
    pools: bool
    beams: int
    """So many tokens are offered; 0: one is sampled."""
    stretched: bool
    held: bool
    """To a grammar."""
    tables: list[list[int]]


WRONG = object()
"""What stands where a layer didn't come, and where something was computed from that."""


class FakeTiers:
    """What lies below the cache of `ranks` ranks, in words: loses blocks, answers late or never, has less than it says."""

    def __init__(self, ranks: int = 1, most: int = 1000, seed: int | None = None) -> None:
        self.ranks, self.most_fetched = ranks, most
        self.draw = random.Random(seed)
        self.reliable = seed is None
        self.held: dict[bytes, list[object]] = {}
        self.at_hand: set[bytes] = set()
        """What lies in memory, of what is held."""
        self.asked: dict[int, list[bytes]] = {}
        self.staged: dict[int, list[list[object]]] = {}
        self.spoiled: set[int] = set()
        """Tickets of fetches of which layers won't have come."""
        self.loaded = 0
        self.saved: list[bytes] = []
        self.used: list[tuple[int, Seq[bytes]]] = []

    def knows(self, content: bytes) -> bool:
        return content in self.held

    def has_at_hand(self, content: bytes) -> bool:
        return self.knows(content) and content in self.at_hand

    def forget(self, contents: Iterable[bytes]) -> None:
        for content in contents:
            self.held.pop(content, None)

    def save(self, saves: Iterable[tuple[int, bytes]], slots: dict[int, object], size: int) -> None:
        for block, content in saves:
            self.saved.append(content)
            self.held[content] = [slots[block * size + i] for i in range(size)]
            if not self.reliable and self.draw.random() < 0.5:
                self.at_hand.add(content)
            if not self.reliable and self.draw.random() < 0.2:
                self.held.pop(self.draw.choice(list(self.held)))

    def apply(self, moves: Moves, slots: dict[int, object], size: int) -> None:
        for ticket, number, block in moves.loads:
            slots |= {block * size + i: stamp for i, stamp in enumerate(self.staged[ticket][number])}
            self.loaded += 1
        for ticket in moves.ended:
            self.asked.pop(ticket, None)
            self.staged.pop(ticket, None)
        self.asked |= {ticket: list(contents) for ticket, contents in moves.fetches}
        self.used += moves.used

    def answers(self) -> list[tuple[int, int]]:
        """What the ranks have read since the last time."""
        found = []
        for ticket, contents in list(self.asked.items()):
            if not self.reliable and self.draw.random() < 0.8:
                continue
            del self.asked[ticket]
            there = next((i for i, content in enumerate(contents) if content not in self.held), len(contents))
            self.staged[ticket] = [self.held[content] for content in contents[:there]]
            if not self.reliable and self.draw.random() < 0.05:
                continue  # one of them hangs
            counts = [there if self.reliable else self.draw.randint(0, there) for _ in range(self.ranks)]
            found += [(ticket, count) for count in counts]
        return found


class FakeRank:
    """Keeps, for every slot, the group and all the tokens that led to what was written there; reads fail on anything
    else."""

    def __init__(self, block_size: int, layout: Layout, tiers: FakeTiers | None = None, depth: int = 1) -> None:
        self.size, self.groups, self.tiers, self.depth = block_size, layout.groups, tiers, depth
        self.awaited: deque[tuple[int, list[tuple[Seat, int]]]] = deque()
        """Of the last steps: the tokens that they sampled, known at the latest when the `depth`-th step after them begins."""
        self.slots: dict[int, object] = {}
        self.seats: dict[int, Seat] = {}
        self.tokens = 0

    def run(self, step: Step) -> Result:
        self.learn(step.id - self.depth)
        for seat in step.freed:
            del self.seats[seat]
        for new in step.new:
            assert new.seat not in self.seats
            tables: list[list[int]] = [[] for _ in self.groups]
            pools = new.pooling is not None
            beams = new.sampling.use_beam_search * (new.sampling.continuations + len(new.stop_token_ids))
            known = list(new.token_ids)
            held = new.sampling.structured_outputs is not None
            self.seats[new.seat] = Seat(known, new.prompt_len, new.seed, pools, beams, new.stretched, held, tables)
        for seat, group, blocks in step.blocks:
            self.seats[seat].tables[group] += blocks
        moves = step.moves or Moves()
        if self.tiers is not None:
            self.tiers.save(moves.saves, self.slots, self.size)
        copied = [
            (target * self.size + i, self.slots.get(source * self.size + i))
            for source, target in step.copies
            for i in range(self.size)
        ]
        for slot, content in copied:
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content
        if self.tiers is not None:
            self.tiers.apply(moves, self.slots, self.size)
        sampled, scores, pooled, offered, ended = [], {}, {}, {}, {}
        for part in step.slices:
            seat_ = self.seats[part.seat]
            for position in range(part.start, part.start + part.count):
                for group in range(len(self.groups)):
                    self.slots[self.slot(seat_, group, position)] = self.stamp(seat_, group, position)
            self.tokens += part.count
        for part in step.slices:  # all rows are written before any is read, as in a layer
            seat_ = self.seats[part.seat]
            end = part.start + part.count
            wrong = False
            for number, group_ in enumerate(self.groups):
                for position in range(group_.first_seen(part.start), end):
                    found = self.slots.get(self.slot(seat_, number, position))
                    wrong |= found is WRONG
                    assert found is WRONG or found == self.stamp(seat_, number, position)
            if wrong:
                for number, position in product(range(len(self.groups)), range(part.start, end)):
                    self.slots[self.slot(seat_, number, position)] = WRONG
            if part.prompt_logprobs:
                last = min(end, seat_.prompt_len - 1)
                scores[part.seat] = [TokenLogprob(-float(p + 1), 1) for p in range(part.start, last)]
            assert part.pool == seat_.pools
            if part.pool and end == len(seat_.tokens):
                pooled[part.seat] = [float(sum(seat_.tokens))]
            if part.sample:
                assert end == len(seat_.tokens)
                if seat_.beams:
                    offered[len(sampled)] = offers(seat_.tokens, seat_.beams)
                token = 0 if seat_.beams or wrong else model(seat_.tokens, seat_.seed)
                if seat_.held:
                    found_ = verdict(seat_.tokens if seat_.beams else [*seat_.tokens, token])
                    ended |= {len(sampled): why for why in found_ if why or not seat_.beams}
                sampled.append(token)
        sampling = [self.seats[part.seat] for part in step.slices if part.sample]
        self.awaited.append((step.id, list(zip(sampling, sampled, strict=True))))
        loads = step.moves.loads if step.moves is not None else ()
        spoiled = self.tiers.spoiled & {ticket for ticket, _, _ in loads} if self.tiers is not None else set()
        assert step.moves is None or spoiled <= {*step.moves.landing} <= {ticket for ticket, _, _ in loads}
        return Result(
            step.id, sampled, prompt_logprobs=scores, pooled=pooled, offers=offered, ended=ended, spoiled=[*spoiled]
        )

    def learn(self, last: int) -> None:
        """What steps up to `last` sampled."""
        while self.awaited and self.awaited[0][0] <= last:
            for seat, token in self.awaited.popleft()[1]:
                seat.tokens.append(token)

    def stamp(self, seat: Seat, group: int, position: int) -> object:
        return group, seat.stretched, tuple(seat.tokens[: position + 1])

    def slot(self, seat: Seat, group: int, position: int) -> int:
        block = seat.tables[group][position // self.size]
        assert block >= 0, "a block that was given back is read"
        return block * self.size + position % self.size


class World:
    """A scheduler, its rank, and what came out."""

    def __init__(
        self,
        blocks: int = 64,
        size: int = 4,
        seats: int = 8,
        budget: int = 16,
        limit: int = 100,
        prefix_caching: bool = True,
        layout: Layout = ONE_GROUP,
        tiers: FakeTiers | None = None,
        depth: int = 1,
        ahead: bool = False,
        **options: Any,
    ) -> None:
        self.tiers = tiers
        self.flying: deque[tuple[Step, Result]] = deque()
        self.most = depth + ahead
        """Steps that are planned before the first of them is committed."""
        self.pool = BlockPool(blocks, size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            block_pool=self.pool,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            max_model_len=limit,
            eos_token_ids=(END,),
            layout=layout,
            tiers=tiers,
            ranks=tiers.ranks if tiers else 1,
            depth=depth,
            **options,
        )
        self.rank, self.limit, self.now, self.budget = FakeRank(size, layout, tiers, depth), limit, 1000.0, budget
        self.events: list[Event] = []
        self.requests: dict[str, Request] = {}

    def add(
        self,
        name: str,
        prompt: Seq[int],
        deadline_s: float | None = None,
        priority: int = 0,
        salt: str = "",
        resume: Seq[int] = (),
        pooling: PoolingParams | None = None,
        **sampling: object,
    ) -> None:
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(seed=3, **sampling),  # type: ignore[arg-type]
            deadline_s=deadline_s, priority=priority, cache_salt=salt, resume_token_ids=resume, pooling=pooling,
        )  # fmt: skip
        self.scheduler.add(request, self.now)
        self.requests[name] = request

    def step(self) -> Step | None:
        self.now += 1
        self.events += self.scheduler.expire(self.now)
        for ticket, count in self.tiers.answers() if self.tiers else ():
            self.scheduler.fetched(ticket, count)
        step = self.scheduler.plan(self.now)
        assert not self.pool.check()
        if step is not None:
            assert sum(part.count for part in step.slices) <= self.budget
            self.flying.append((step, self.rank.run(step)))
        if self.flying and (step is None or len(self.flying) == self.most):
            oldest, result = self.flying.popleft()
            self.rank.learn(oldest.id)
            self.events += self.scheduler.commit(oldest, result, self.now)
            assert not self.pool.check()
        return step

    def run(self) -> None:
        for _ in range(20000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        flying = True
        while flying:
            flying = bool(self.flying)
            flying |= self.step() is not None
        assert self.pool.num_used == 0
        assert not self.rank.seats

    def output(self, name: str, index: int = 0) -> list[int]:
        return [
            t
            for e in self.events
            if isinstance(e, Token) and (e.request_id, e.index) == (name, index)
            for t in e.token_ids
        ]

    def ends(self, name: str) -> list[Finished | Failed]:
        return [e for e in self.events if isinstance(e, (Finished, Failed)) and e.request_id == name]

    def check(self, name: str) -> None:
        request = self.requests[name]
        ends = self.ends(name)
        if request.pooling is not None:
            pooled = [e.values for e in self.events if isinstance(e, Pooled) and e.request_id == name]
            assert pooled == [[float(sum(request.prompt_token_ids))]] or [e.reason for e in ends] == ["abort"]  # type: ignore[union-attr]
            return
        wanted = [expected(request, index, 3, self.limit) for index in range(request.sampling.n)]
        failed = [end for end in ends if isinstance(end, Failed)]
        if failed:  # once, behind all else
            assert failed == ends[-1:]
            assert WHY in failed[0].message
            assert FAILS in [reason for _, reason in wanted]
        else:
            assert sorted(e.index for e in ends) == list(range(request.sampling.n)), ends
        for index, (tokens, reason) in enumerate(wanted):
            end = next((end for end in ends if end.index == index), None)
            got = self.output(name, index)
            assert got == (tokens if isinstance(end, Finished) and end.reason != "abort" else tokens[: len(got)])
            assert not isinstance(end, Finished) or end.reason in (reason, "abort")


WINDOWS = Layout((LayerGroup((0,)), LayerGroup((1,), window=9), LayerGroup((2,), window=9)), 1)
CHUNKS = Layout((LayerGroup((0, 1)), LayerGroup((2, 3), chunk=7), LayerGroup((4,), window=20)), 2)
ALL_NEAR = Layout((LayerGroup((0,), window=6), LayerGroup((1,), window=1)), 1)


def seats_of(step: Step | None) -> list[tuple[int, int, int]]:
    """(seat, start, count) of a step's slices."""
    assert step is not None
    return [(part.seat, part.start, part.count) for part in step.slices]
