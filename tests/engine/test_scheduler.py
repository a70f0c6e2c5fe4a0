"""The scheduler against a cache that remembers what was written where: whatever the sizes, every output is the same."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
from fuzzing import examples

from kvasir.engine.beam_search import BeamSearch
from kvasir.engine.blocks import BlockPool
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Event, Failed, Finished, Pooled, Token, TokenLogprob
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.request import PoolingParams, Request, SamplingParams
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


def searched(request: Request, limit: int) -> list[list[int]]:
    """What a beam search must find, computed without any scheduler."""
    stops = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else (END,))}
    wanted, prompt = request.sampling.max_tokens, list(request.prompt_token_ids)
    search = BeamSearch(request.sampling, stops, limit - len(prompt) if wanted is None else wanted)
    count = request.sampling.continuations + len(stops)
    while search.advance([offers([*prompt, *beam.token_ids], count) for beam in search.live]):
        pass
    return [list(ending.beam.token_ids) for ending in search.best(request.sampling.n)]


def expected(request: Request, index: int, seed: int, limit: int) -> list[int]:
    """What the continuation must be, computed without any scheduler."""
    if request.sampling.use_beam_search:
        return searched(request, limit)[index]
    tokens = [*request.prompt_token_ids, *request.resume_token_ids]
    stops = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else (END,))}
    wanted = request.sampling.max_tokens
    longest = limit if wanted is None else len(request.prompt_token_ids) + wanted
    start = len(tokens)
    while len(tokens) < longest:
        tokens.append(model(tokens, seed + index))
        if tokens[-1] in stops and len(tokens) - len(request.prompt_token_ids) >= request.sampling.min_tokens:
            break
    return tokens[start:]


@dataclass
class Seat:
    tokens: list[int]
    prompt_len: int
    seed: int
    pools: bool
    beams: int
    """So many tokens are offered; 0: one is sampled."""
    stretched: bool
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
        self.asked: dict[int, list[bytes]] = {}
        self.staged: dict[int, list[list[object]]] = {}
        self.spoiled: set[int] = set()
        """Tickets of fetches of which layers won't have come."""
        self.loaded = 0
        self.saved: list[bytes] = []
        self.used: list[tuple[int, Seq[bytes]]] = []

    def knows(self, content: bytes) -> bool:
        return content in self.held

    def forget(self, contents: Iterable[bytes]) -> None:
        for content in contents:
            self.held.pop(content, None)

    def save(self, saves: Iterable[tuple[int, bytes]], slots: dict[int, object], size: int) -> None:
        for block, content in saves:
            self.saved.append(content)
            self.held[content] = [slots[block * size + i] for i in range(size)]
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
            self.seats[new.seat] = Seat(known, new.prompt_len, new.seed, pools, beams, new.stretched, tables)
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
        sampled, scores, pooled, offered = [], {}, {}, {}
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
                sampled.append(0 if seat_.beams or wrong else model(seat_.tokens, seat_.seed))
        sampling = [self.seats[part.seat] for part in step.slices if part.sample]
        self.awaited.append((step.id, list(zip(sampling, sampled, strict=True))))
        loads = step.moves.loads if step.moves is not None else ()
        spoiled = self.tiers.spoiled & {ticket for ticket, _, _ in loads} if self.tiers is not None else set()
        assert step.moves is None or spoiled <= {*step.moves.landing} <= {ticket for ticket, _, _ in loads}
        return Result(step.id, sampled, prompt_logprobs=scores, pooled=pooled, offers=offered, spoiled=[*spoiled])

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
        assert sorted(e.index for e in ends) == list(range(request.sampling.n)), ends
        for end in ends:
            assert isinstance(end, Finished)
            wanted = expected(request, end.index, 3, self.limit)
            got = self.output(name, end.index)
            assert got == (wanted if end.reason != "abort" else wanted[: len(got)])


WINDOWS = Layout((LayerGroup((0,)), LayerGroup((1,), window=9), LayerGroup((2,), window=9)), 1)
CHUNKS = Layout((LayerGroup((0, 1)), LayerGroup((2, 3), chunk=7), LayerGroup((4,), window=20)), 2)
ALL_NEAR = Layout((LayerGroup((0,), window=6), LayerGroup((1,), window=1)), 1)


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, CHUNKS, ALL_NEAR], ids=["one", "windows", "chunks", "near"])
@pytest.mark.parametrize("seed", range(examples(10)))
def test_outputs_do_not_depend_on_sizes_order_or_memory(seed: int, layout: Layout) -> None:
    draw = random.Random(seed)
    tiers = FakeTiers(1 + seed % 3 // 2, (1000, 3)[seed % 2], seed) if seed % 3 else None
    size, budget = draw.choice((1, 2, 4, 16)), draw.choice((1, 3, 16, 200))
    blocks = draw.choice((100, 140, 400)) // size + 1
    if layout is not ONE_GROUP:
        blocks = max(blocks, layout.peak(90, size, budget) + draw.choice((0, 1, 5)))
    world = World(
        blocks=blocks, size=size, seats=draw.choice((1, 2, 5, 20)), budget=budget, limit=90,
        prefix_caching=draw.random() < 0.8, layout=layout, stretch_len=draw.choice((None, None, 30)), pool_last=True,
        tiers=tiers, depth=draw.choice((1, 1, 2, 3)), ahead=draw.random() < 0.7,
    )  # fmt: skip
    trunk = [draw.randrange(VOCABULARY) for _ in range(40)]
    waiting = [f"r{i}" for i in range(25)]
    cut: set[str] = set()
    for _ in range(30000):
        if waiting and draw.random() < 0.3:
            prompt = trunk[: draw.randrange(41)] + [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 15))]
            if draw.random() < 0.1:
                world.add(waiting.pop(), prompt, pooling=PoolingParams())
                continue
            wanted = draw.choice((1, 2, 8, 30))
            if draw.random() < 0.25:
                width = draw.choice((1, 2, 5))
                world.add(
                    waiting.pop(), prompt, priority=draw.choice((0, 0, 1)), n=width, best_of=width + draw.choice((0, 2)),
                    use_beam_search=True, max_tokens=wanted, ignore_eos=draw.random() < 0.3,
                    early_stopping=draw.random() < 0.3, prompt_logprobs=draw.choice((None, None, 0)),
                )  # fmt: skip
                continue
            resume = [1, 2][: draw.choice((0, 0, 2))] if wanted > 2 else []
            world.add(
                waiting.pop(), prompt, priority=draw.choice((0, 0, 1)), salt=draw.choice(("", "x")),
                n=1 if resume else draw.choice((1, 1, 2, 4)), max_tokens=wanted, resume=resume,
                min_tokens=draw.choice((0, 1)), ignore_eos=draw.random() < 0.3,
                prompt_logprobs=draw.choice((None, None, 0)),
            )  # fmt: skip
        if world.requests and draw.random() < 0.05:
            name = draw.choice(list(world.requests))
            index = draw.choice((None, 0, 1))
            world.events += world.scheduler.abort(name, index, now=world.now)
            assert not world.pool.check()
            cut.add(name)
        world.step()
        if not waiting and not world.scheduler.has_work:
            break
    world.run()
    assert tiers is None or not tiers.staged
    for name in world.requests:
        world.check(name)
        scored = [
            e.prompt_logprobs
            for e in world.events
            if isinstance(e, Token) and e.request_id == name and e.prompt_logprobs
        ]
        if world.requests[name].sampling.prompt_logprobs is not None and name not in cut:
            (scores,) = scored
            assert [s and s.logprob for s in scores] == [
                None,
                *(-float(p) for p in range(1, len(world.requests[name].prompt_token_ids))),
            ]


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS], ids=["one", "windows"])
@pytest.mark.parametrize(("seats", "blocks", "caching"), [(1, 60, True), (8, 11, True), (8, 11, False), (2, 24, False)])
def test_beams_that_do_not_fit_at_once_wait_for_each_other(
    seats: int, blocks: int, caching: bool, layout: Layout
) -> None:
    """Those that have their offers give up their places, also for what is more important than they are."""
    blocks *= len(layout.groups)
    world = World(blocks=blocks, size=4, seats=seats, budget=20, limit=36, prefix_caching=caching, layout=layout)
    for name in ("a", "b"):
        world.add(name, [1, 2, 3] * 4, n=3, best_of=6, use_beam_search=True, max_tokens=20, ignore_eos=True)
    for _ in range(8):
        world.step()
    world.add("urgent", [5] * 9, priority=-1, max_tokens=24, ignore_eos=True)
    world.add("later", [6] * 20, max_tokens=12, ignore_eos=True)
    world.run()
    for name in world.requests:
        world.check(name)


def seats_of(step: Step | None) -> list[tuple[int, int, int]]:
    """(seat, start, count) of a step's slices."""
    assert step is not None
    return [(part.seat, part.start, part.count) for part in step.slices]


def test_a_long_prompt_does_not_stall_streams_or_short_prompts() -> None:
    world = World(blocks=400, size=4, budget=16, limit=500)
    world.add("stream", [1], max_tokens=100, ignore_eos=True)
    world.step()
    world.add("long", [2] * 300, max_tokens=2, ignore_eos=True)
    world.step()
    world.add("short", [3] * 6, max_tokens=2, ignore_eos=True)
    for _ in range(2):
        step = world.step()
        assert step is not None
        assert step.slices[0].count == 1  # the stream, first
        assert sum(part.count for part in step.slices) == 16
    assert len(world.output("short")) >= 1
    assert not world.output("long")


def test_prompts_make_progress_however_many_streams_there_are() -> None:
    world = World(blocks=400, size=4, seats=30, budget=8, limit=200)
    for i in range(20):
        world.add(f"s{i}", [i + 1], max_tokens=60, ignore_eos=True)
    for _ in range(40):
        world.step()
    world.add("prompt", [9] * 20, max_tokens=1, ignore_eos=True)
    for _ in range(15):
        world.step()
    assert world.output("prompt")
    lengths = [len(world.output(f"s{i}")) for i in range(20)]
    assert max(lengths) - min(lengths) <= 4  # streams that don't fit together take turns


def test_streams_are_dealt_out_evenly_among_stages() -> None:
    """Each of two stages always has half of them; when some end, those that are left are dealt out anew."""
    world = World(blocks=400, size=4, budget=64, limit=200, depth=2, ahead=True)
    for i in range(8):
        world.add(f"s{i}", [i + 1], max_tokens=30 if i < 4 else 60, ignore_eos=True)
    seats = [{part.seat for part in step.slices} for step in (world.step() for _ in range(100)) if step is not None]
    steady = seats[1:50]
    assert {len(each) for each in steady} == {4}
    assert all(len(one | two) == 8 for one, two in pairwise(steady))
    assert {len(each) for each in seats[64:100]} == {2}


def test_lower_priority_numbers_go_first() -> None:
    world = World(seats=1)
    world.add("a", [1], max_tokens=1)
    world.add("late", [2], max_tokens=1, priority=5)
    world.add("soon", [3], max_tokens=1, priority=-1)
    world.run()
    assert [e.request_id for e in world.events if isinstance(e, Finished)] == ["soon", "a", "late"]


def test_a_request_that_lacks_blocks_is_not_overtaken() -> None:
    world = World(blocks=10, size=4, limit=40, budget=64)
    world.add("first", [1] * 20, max_tokens=4, ignore_eos=True)
    world.step()
    world.add("big", [2] * 30, max_tokens=4, ignore_eos=True)
    world.add("small", [3], max_tokens=1)
    world.run()
    scheduled = {e.request_id: e.timing.scheduled for e in world.events if isinstance(e, Finished)}
    assert scheduled["first"] < scheduled["big"] <= scheduled["small"]


def test_a_blocked_prompt_is_not_looked_up_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(blocks=12, size=4, limit=48, budget=64)
    world.add("first", [1] * 20, max_tokens=20, ignore_eos=True)
    world.step()
    world.add("big", [2] * 40, max_tokens=4, ignore_eos=True)
    looked: list[int] = []
    match = world.pool.match
    monkeypatch.setattr(world.pool, "match", lambda ids: looked.append(1) or match(ids))
    for _ in range(10):
        world.step()
    assert len(looked) == 1
    world.run()
    world.check("big")


def test_who_was_blocked_by_some_that_came_and_went_in_a_step_is_seated() -> None:
    """No block was taken while it looked for some, so none seems to be given back."""
    world = World(layout=ALL_NEAR, blocks=137, size=1, seats=3, budget=64, limit=80, pool_last=True)
    for number in range(3):
        world.add(f"r{number}", [10 + number] * 38, pooling=PoolingParams())
    world.run()
    assert world.scheduler.stats().ended == 3


def test_the_least_important_gives_up_its_blocks() -> None:
    world = World(blocks=8, size=4, limit=32, budget=64)
    world.add("important", [1] * 8, max_tokens=20, ignore_eos=True)
    world.add("other", [2] * 8, max_tokens=20, ignore_eos=True, priority=1)
    world.run()
    preempted = {e.request_id: e.preemptions for e in world.events if isinstance(e, Finished)}
    assert preempted["important"] == 0
    assert preempted["other"] >= 1
    for name in preempted:
        world.check(name)


def test_a_prompt_that_is_all_cached_computes_one_block() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1)
    world.run()
    world.add("b", [1] * 16, max_tokens=1)
    assert seats_of(world.step()) == [(0, 12, 4)]
    (end,) = world.ends("b")
    assert isinstance(end, Finished)
    assert end.cached_tokens == 12
    stats = world.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (32, 12)


def test_a_salt_keeps_tenants_apart() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1, salt="x")
    world.run()
    world.add("b", [1] * 16, max_tokens=1, salt="y")
    assert seats_of(world.step()) == [(0, 0, 16)]


def test_branches_share_full_blocks_and_copy_the_last() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 10, n=3, max_tokens=4, ignore_eos=True)
    world.step()
    assert world.pool.num_used == 3 + 2  # the branches have a last block of their own
    step = world.step()
    assert step is not None
    assert len(step.copies) == 2
    assert [part.start for part in step.slices] == [10, 9, 9]
    world.run()
    world.check("a")


def test_more_branches_than_seats() -> None:
    world = World(seats=2)
    world.add("a", [1] * 10, n=5, max_tokens=4, ignore_eos=True)
    world.run()
    world.check("a")


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_deadlines_hold_at_every_stage(steps: int) -> None:
    """Waiting, in its prompt, streaming."""
    world = World(budget=8, seats=1 if steps == 0 else 4)
    if steps == 0:
        world.add("before", [1], max_tokens=30, ignore_eos=True)
    world.add("late", [2] * 20, max_tokens=50, ignore_eos=True, deadline_s=steps + 0.5, n=2)
    world.run()
    (end,) = world.ends("late")
    assert isinstance(end, Failed)
    assert end.code == "deadline_exceeded"


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_cancelling_at_every_stage(steps: int, index: int | None) -> None:
    world = World(budget=8)
    world.add("a", [1] * 20, n=2, max_tokens=10, ignore_eos=True)
    for _ in range(steps):
        world.step()
    events = world.scheduler.abort("a", index, now=world.now)
    assert {e.index for e in events} == ({0, 1} if index is None else {index})
    assert not world.scheduler.abort("a", index, now=world.now)
    assert not world.scheduler.abort("unknown")
    world.events += events
    world.run()
    world.check("a")


def test_an_abort_while_the_step_runs_gives_blocks_back_at_its_commit() -> None:
    world = World()
    world.add("a", [1] * 10, max_tokens=4)
    step = world.scheduler.plan(0.0)
    assert step is not None
    assert world.scheduler.abort("a")
    assert world.pool.num_used == 3
    assert world.scheduler.commit(step, world.rank.run(step), 0.0) == []
    world.run()


def test_a_stop_string_found_outside_ends_a_continuation() -> None:
    world = World()
    world.add("a", [1], max_tokens=50, ignore_eos=True)
    world.step()
    (end,) = world.scheduler.abort("a", 0, "stop")
    assert isinstance(end, Finished)
    assert end.reason == "stop"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 95, "max_tokens": 10}, "--max-model-len"),
        ({"prompt": [1] * 100, "max_tokens": None}, "100 prompt tokens"),
        ({"prompt": [1] * 60, "max_tokens": 30, "blocks": 10}, "--kv-cache-memory-bytes"),
        ({"prompt": [1], "resume": [2], "n": 2}, "n = 1"),
        ({"prompt": [1], "resume": [2, 3], "max_tokens": 2}, "resume_token_ids"),
    ],
)
def test_requests_that_can_never_run_are_refused(fields: dict[str, Any], says: str) -> None:
    world = World(blocks=fields.pop("blocks", 64))
    with pytest.raises(ClientError, match=says):
        world.add("a", **fields)
    assert not world.scheduler.has_work


def test_an_id_is_used_once() -> None:
    world = World()
    world.add("a", [1])
    with pytest.raises(ClientError, match="in use"):
        world.add("a", [1])


def test_a_step_costs_the_same_however_long_the_context_is() -> None:
    """Planning a token touches no old token: tokens behind a sentinel that explodes when it is copied or sliced."""

    class Untouchable(list[int]):
        def __getitem__(self, key: Any) -> Any:
            assert not isinstance(key, slice) or (key.stop or 0) - (key.start or 0) <= 4
            return super().__getitem__(key)

        def __iter__(self) -> Any:
            raise AssertionError("all tokens were read")

    world = World(blocks=400, size=4, limit=1500, budget=2000)
    world.add("a", [1] * 1000, max_tokens=100, ignore_eos=True)
    world.step()
    ((_, sequence),) = world.scheduler._seats.running
    sequence.tokens = Untouchable(sequence.tokens)
    for _ in range(20):
        step = world.scheduler.plan(0.0)
        assert step is not None
        world.scheduler.commit(step, Result(step.id, [1]), 0.0)
    assert len(sequence.tokens) == 1021


def test_stats_count_tokens() -> None:
    world = World(budget=8)
    world.add("a", [1] * 20, max_tokens=3, ignore_eos=True)
    assert world.scheduler.stats().queued_prefill_tokens == 20
    world.step()
    stats = world.scheduler.stats()
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (1, 0, 12)
    assert stats.kv_usage == 5 / 64
    world.run()
    stats = world.scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.step_tokens, stats.kv_usage) == (20, 3, 22, 0)


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    world = World()
    for i in range(200):
        world.add(str(i), [1], max_tokens=1, deadline_s=1e6)
    world.run()
    world.add("one more", [1], max_tokens=1, deadline_s=1e6)
    assert len(world.scheduler._deadlines) == 1


def test_a_deadline_belongs_to_one_request_even_if_its_id_is_used_again() -> None:
    world = World()
    world.add("a", [1], max_tokens=1, deadline_s=5)
    world.run()
    world.add("a", [1], max_tokens=30, ignore_eos=True)
    world.run()
    assert all(isinstance(end, Finished) for end in world.ends("a"))


@pytest.mark.parametrize(("blocks", "limit"), [(100, 64), (2, 64)], ids=["context", "cache"])
def test_more_resumed_tokens_than_fit_are_refused(blocks: int, limit: int) -> None:
    """Accepted, they would overrun the ranks' rows, or wait for ever and let nobody pass."""
    world = World(blocks=blocks, size=16, limit=limit)
    with pytest.raises(ClientError, match="leave no room"):
        world.add("a", [1] * 10, resume=[2] * 100, max_tokens=None)
    world.add("b", [1], max_tokens=1)
    world.run()
    world.check("b")


def test_cached_tokens_are_tokens_of_the_prompt() -> None:
    world = World(blocks=40, size=4, budget=64)
    world.add("a", [1] * 16, max_tokens=1)
    world.run()
    world.add("b", [1] * 4, resume=[1] * 12, max_tokens=13, ignore_eos=True)
    world.run()
    (end,) = world.ends("b")
    assert isinstance(end, Finished)
    assert (end.prompt_tokens, end.cached_tokens) == (4, 4)


def test_prompts_share_a_step_evenly() -> None:
    world = World(blocks=400, size=4, budget=16, limit=500)
    world.add("a", [1] * 100, max_tokens=1)
    world.add("b", [2] * 100, max_tokens=1)
    assert [count for _, _, count in seats_of(world.step())] == [8, 8]


def test_an_adapter_has_blocks_of_its_own() -> None:
    world = World(blocks=40, size=4, budget=64)
    for name, adapter in (("a", "x"), ("b", "y")):
        world.scheduler.add(
            Request(request_id=name, prompt_token_ids=[1] * 16, sampling=SamplingParams(max_tokens=1), adapter=adapter), 0.0
        )  # fmt: skip
        assert seats_of(world.step()) == [(0, 0, 16)]


def test_no_stop_before_min_tokens() -> None:
    """The sampler mutes stop tokens; the scheduler wouldn't take one either."""
    world = World()
    world.add("a", [1], max_tokens=20, min_tokens=6, stop_token_ids=list(range(VOCABULARY)))
    world.run()
    assert len(world.output("a")) == 6


def test_a_newcomer_leaves_a_block_for_each_running_sequence() -> None:
    """Or it would be preempted at once, and its prompt computed twice."""
    world = World(blocks=8, size=4, limit=32, budget=64)
    world.add("a", [1] * 14, max_tokens=8, ignore_eos=True)
    world.step()
    world.add("b", [2] * 16, max_tokens=8, ignore_eos=True)
    world.step()
    assert world.scheduler.num_waiting == 1
    world.run()
    assert world.scheduler.stats().preemptions == 0


def test_what_no_row_sees_is_given_back() -> None:
    """A prompt of 400 tokens in a model of which only one of ten groups sees everything."""
    near = tuple(LayerGroup((i,), window=16) for i in range(1, 10))
    layout = Layout((LayerGroup((0,)), *near), 1)
    world = World(blocks=200, size=4, budget=16, limit=440, layout=layout)
    world.add("long", [random.Random(0).randrange(9, 40) for _ in range(400)], max_tokens=20, ignore_eos=True)
    most = 0
    while world.scheduler.has_work:
        world.step()
        most = max(most, world.pool.num_used)
    assert most <= 105 + 9 * 9
    world.check("long")
    assert all(isinstance(e, Finished) and not e.preemptions for e in world.ends("long"))


def test_a_hit_needs_only_what_later_rows_see() -> None:
    world = World(blocks=400, size=4, budget=16, limit=200, layout=WINDOWS)
    prompt = [random.Random(0).randrange(9, 40) for _ in range(100)]
    world.add("first", prompt, max_tokens=1)
    world.run()
    world.add("again", [*prompt, 1, 2, 3], max_tokens=1)
    world.run()
    (end,) = world.ends("again")
    assert isinstance(end, Finished)
    assert end.cached_tokens == 100
    world.check("again")


def test_whole_prompts_are_computed_in_one_step() -> None:
    world = World(blocks=60, size=4, budget=32, limit=100, prefix_caching=False, whole_prompts=True)
    for name, length in (("a", 20), ("b", 30), ("c", 1), ("d", 12), ("e", 32)):
        world.add(name, [5] * length, pooling=PoolingParams())
    with pytest.raises(ClientError, match=r"33 prompt tokens exceed the 32 tokens of a step .--max-num-batched-tokens"):
        world.add("too-long", [5] * 33, pooling=PoolingParams())
    while world.scheduler.has_work:
        step = world.step()
        assert step is not None
        assert all(part.start == 0 and part.pool and not part.sample for part in step.slices)
    for name in "abcde":
        world.check(name)


def test_a_sequence_that_grows_too_long_starts_again_stretched() -> None:
    world = World(blocks=60, size=4, budget=64, limit=100, stretch_len=20)
    world.add("a", [5] * 16, max_tokens=10, ignore_eos=True)
    stretched = []
    while world.scheduler.has_work:
        step = world.step()
        stretched += [new.stretched for new in step.new] if step else []
    assert stretched == [False, True]
    world.check("a")
    (end,) = world.ends("a")
    assert isinstance(end, Finished)
    assert end.preemptions == 0


def tiered(**options: Any) -> tuple[World, FakeTiers]:
    """A world whose cache was emptied after a prompt of 40 tokens, of which the tiers have 10 blocks of each group."""
    tiers = FakeTiers()
    world = World(blocks=60, size=4, budget=16, limit=200, tiers=tiers, **options)
    world.add("first", PROMPT, max_tokens=1)
    world.run()
    assert len(tiers.held) == 10 * len(options.get("layout", ONE_GROUP).groups)
    world.pool.reset()
    world.rank.slots.clear()
    return world, tiers


PROMPT = [random.Random(1).randrange(9, 40) for _ in range(40)]


def cached(world: World, name: str) -> int:
    (end,) = world.ends(name)
    assert isinstance(end, Finished)
    return end.cached_tokens


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, ALL_NEAR], ids=["one", "windows", "near"])
def test_a_prompt_starts_behind_what_the_tiers_have(layout: Layout) -> None:
    world, tiers = tiered(layout=layout)
    world.add("again", [*PROMPT, 1, 2], max_tokens=3, ignore_eos=True)
    assert world.step() is not None  # asks
    assert world.scheduler.loading
    assert world.scheduler.stats().waiting == world.scheduler.num_waiting == 1
    world.run()
    world.check("again")
    assert cached(world, "again") == 40
    assert tiers.loaded <= len(tiers.held)
    if layout is not ONE_GROUP:
        assert tiers.loaded < 10 * len(layout.groups)  # what no later row sees stays where it is


def test_others_compute_while_one_loads() -> None:
    world, tiers = tiered()
    tiers.answers = list  # type: ignore[method-assign]
    world.add("slow", [*PROMPT, 1], max_tokens=1)
    world.add("other", [5] * 30, max_tokens=1)
    for _ in range(8):
        world.step()
    world.check("other")
    assert world.scheduler.loading
    world.run()  # it doesn't wait for ever
    world.check("slow")
    assert cached(world, "slow") == 0
    world.pool.reset()
    world.add("next", [*PROMPT, 2], max_tokens=1)  # a tier that hangs isn't asked again
    step = world.step()
    assert step is not None
    assert step.slices
    world.scheduler.fetched(1, 10)  # it has come round
    world.pool.reset()
    world.add("last", [*PROMPT, 3], max_tokens=1)
    world.step()
    assert world.scheduler.loading


def test_who_waits_for_a_seat_has_its_blocks_read_meanwhile() -> None:
    world, tiers = tiered(seats=1)
    world.add("long", [6], max_tokens=100, ignore_eos=True)
    world.step()
    world.add("next", [*PROMPT, 1], max_tokens=1)
    world.step()
    world.step()
    assert tiers.staged
    assert not world.scheduler.loading
    world.run()
    assert cached(world, "next") == 40


def test_a_fetch_is_cut_to_what_may_be_staged() -> None:
    world, tiers = tiered()
    tiers.most_fetched = 3
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    assert cached(world, "again") == 40


@pytest.mark.parametrize("when", [0, 1, 2])
def test_ending_at_every_stage_of_a_load(when: int) -> None:
    world, tiers = tiered()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    for _ in range(when):
        world.step()
    world.scheduler.abort("again", now=world.now)
    world.run()
    assert not tiers.staged
    assert not tiers.asked


def test_what_one_rank_lacks_is_written_again() -> None:
    world, tiers = tiered()
    tiers.ranks = world.scheduler._loads._ranks = 2
    tiers.answers = lambda: [(t, n) for t in list(tiers.asked) if tiers.staged.setdefault(t, [
        tiers.held[c] for c in tiers.asked.pop(t)]) for n in (10, 4)]  # type: ignore[method-assign]  # fmt: skip
    tiers.saved.clear()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    assert cached(world, "again") == 16
    assert len(tiers.saved) == 6


def test_use_is_told_tail_first_and_what_was_lost_below_is_saved_again() -> None:
    world, tiers = tiered()
    world.add("again", [*PROMPT, 1], max_tokens=1)
    world.run()
    chain = [*tiers.held][:10]
    assert tiers.used[-1] == (10, chain[::-1])
    assert tiers.used[-2] == (0, chain[::-1])
    tiers.held.clear()
    tiers.saved.clear()
    world.add("warm", [*PROMPT, 2], max_tokens=1)  # out of the cache
    world.run()
    assert tiers.saved == chain


def test_what_is_cached_does_not_make_room_for_what_follows_it() -> None:
    tiers = FakeTiers()
    world = World(blocks=12, size=4, budget=16, limit=48, tiers=tiers)
    for name, prompt in (("whole", PROMPT), ("head", PROMPT[:21]), ("other", [5] * 24), ("again", PROMPT)):
        if name == "head":
            world.pool.reset()
        world.add(name, prompt, max_tokens=1)
        world.run()
    assert tiers.loaded == 5 + 4
    assert cached(world, "again") == 36


def test_a_preempted_sequence_asks_the_tiers() -> None:
    tiers = FakeTiers()
    world = World(blocks=12, size=4, seats=4, budget=16, limit=48, tiers=tiers)
    for name in "ab":
        world.add(name, [ord(name)] * 14, max_tokens=20, ignore_eos=True)
    world.run()
    assert world.scheduler.stats().preemptions > 0
    assert tiers.loaded > 0
    for name in "ab":
        world.check(name)
