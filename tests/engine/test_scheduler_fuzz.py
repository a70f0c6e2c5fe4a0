"""The scheduler against a cache that remembers what was written where: whatever the sizes, every output is the same."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import pytest

from kvasir.engine.blocks import BlockPool
from kvasir.engine.event import Event, Failed, Finished, Token, TokenLogprob
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Scheduler
from kvasir.engine.step import Result, Step

VOCABULARY = 50
END = 7


def model(tokens: Seq[int], seed: int) -> int:
    """The next token: a pure function of all tokens so far and the seed."""
    return random.Random(f"{seed} {tokens}").randrange(VOCABULARY)


def expected(request: Request, index: int, seed: int, limit: int) -> list[int]:
    """What the continuation must be, computed without any scheduler."""
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
    table: list[int] = field(default_factory=list)


class FakeRank:
    """Keeps, for every slot, all the tokens that led to what was written there; reads fail on anything else."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self.seats: dict[int, Seat] = {}
        self.tokens = 0

    def run(self, step: Step) -> Result:
        for seat in step.freed:
            del self.seats[seat]
        for new in step.new:
            assert new.seat not in self.seats
            self.seats[new.seat] = Seat(list(new.token_ids), new.prompt_len, new.seed)
        for seat, blocks in step.blocks:
            self.seats[seat].table += blocks
        copied = [
            (target * self.size + i, self.slots.get(source * self.size + i))
            for source, target in step.copies
            for i in range(self.size)
        ]
        for slot, content in copied:
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content
        sampled, scores = [], {}
        for part in step.slices:
            seat_ = self.seats[part.seat]
            for position in range(part.start, part.start + part.count):
                self.slots[self.slot(seat_, position)] = tuple(seat_.tokens[: position + 1])
            self.tokens += part.count
        for part in step.slices:  # all rows are written before any is read, as in a layer
            seat_ = self.seats[part.seat]
            end = part.start + part.count
            for position in range(end):
                assert self.slots.get(self.slot(seat_, position)) == tuple(seat_.tokens[: position + 1])
            if part.prompt_logprobs:
                last = min(end, seat_.prompt_len - 1)
                scores[part.seat] = [TokenLogprob(-float(p + 1), 1) for p in range(part.start, last)]
            if part.sample:
                assert end == len(seat_.tokens)
                sampled.append(model(seat_.tokens, seat_.seed))
        for part, token in zip([p for p in step.slices if p.sample], sampled, strict=True):
            self.seats[part.seat].tokens.append(token)
        return Result(step.id, sampled, prompt_logprobs=scores)

    def slot(self, seat: Seat, position: int) -> int:
        return seat.table[position // self.size] * self.size + position % self.size


class World:
    """A scheduler, its rank, and what came out."""

    def __init__(
        self, blocks: int = 64, size: int = 4, seats: int = 8, budget: int = 16, limit: int = 100, **options: bool
    ) -> None:
        self.pool = BlockPool(blocks, size, **options)
        self.scheduler = Scheduler(
            block_pool=self.pool, max_num_seqs=seats, max_num_batched_tokens=budget, max_model_len=limit, eos_token_ids=(END,)
        )  # fmt: skip
        self.rank, self.limit, self.now, self.budget = FakeRank(size), limit, 1000.0, budget
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
        **sampling: object,
    ) -> None:
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(seed=3, **sampling),  # type: ignore[arg-type]
            deadline_s=deadline_s, priority=priority, cache_salt=salt, resume_token_ids=resume,
        )  # fmt: skip
        self.scheduler.add(request, self.now)
        self.requests[name] = request

    def step(self) -> Step | None:
        self.now += 1
        self.events += self.scheduler.expire(self.now)
        step = self.scheduler.plan(self.now)
        assert not self.pool.check()
        if step is not None:
            assert sum(part.count for part in step.slices) <= self.budget
            self.events += self.scheduler.commit(step, self.rank.run(step), self.now)
            assert not self.pool.check()
        return step

    def run(self) -> None:
        for _ in range(20000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        self.step()
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
        assert sorted(e.index for e in ends) == list(range(request.sampling.n)), ends
        for end in ends:
            assert isinstance(end, Finished)
            wanted = expected(request, end.index, 3, self.limit)
            got = self.output(name, end.index)
            assert got == (wanted if end.reason != "abort" else wanted[: len(got)])


@pytest.mark.parametrize("seed", range(60))
def test_outputs_do_not_depend_on_sizes_order_or_memory(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.choice((1, 2, 4, 16))
    world = World(
        blocks=draw.choice((100, 140, 400)) // size + 1, size=size, seats=draw.choice((1, 2, 5, 20)),
        budget=draw.choice((1, 3, 16, 200)), limit=90, prefix_caching=draw.random() < 0.8,
    )  # fmt: skip
    trunk = [draw.randrange(VOCABULARY) for _ in range(40)]
    waiting = [f"r{i}" for i in range(25)]
    cut: set[str] = set()
    for _ in range(30000):
        if waiting and draw.random() < 0.3:
            prompt = trunk[: draw.randrange(41)] + [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 15))]
            wanted = draw.choice((1, 2, 8, 30))
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
