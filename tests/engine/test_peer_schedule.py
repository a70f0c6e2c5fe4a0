"""Two schedulers that lend each other blocks, over caches that remember what was written where: whatever is late, lost or
refused, every output is the same, and no block is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain

import pytest
from scheduler_world import CHUNKS, ONE_GROUP, VOCABULARY, WINDOWS, WRONG, FakeTiers, World

from kvasir.engine.blocks import content_ids
from kvasir.engine.layout import Layout
from kvasir.engine.lends import Terms
from kvasir.engine.parts import Form, Part, items
from kvasir.engine.peer_wire import Ask, Offer, RefusedError
from kvasir.engine.prices import Prices
from kvasir.engine.pulls import Pulls
from kvasir.engine.request import Peer, Request, SamplingParams
from kvasir.engine.step import Lent, Moves, Pull

Chance = Callable[[float], bool]


class FakeIndex:
    """Lends of a rank, that end when they like."""

    def __init__(self, chance: Chance, draw: random.Random) -> None:
        self.chance, self.draw, self.lends = chance, draw, set[int]()

    @property
    def room(self) -> int:
        return self.draw.choice((0, 3, 1000)) if self.chance(0.9) else 1000

    def open(self, lend: int, readers: int, way: str) -> None:
        assert readers == 1
        self.lends.add(lend)

    def is_live(self, lend: int) -> bool:
        if self.chance(0.02):
            self.lends.discard(lend)
        return lend in self.lends

    def end(self, lend: int) -> None:
        self.lends.discard(lend)


class FakeExchange(FakeTiers):
    """Tiers, and blocks of another world."""

    def __init__(self, seed: int | None, ranks: int = 1) -> None:
        super().__init__(ranks=ranks, seed=seed)
        self.index = FakeIndex(self.chance, self.draw)
        self.lent: dict[int, list[object]] = {}
        """lend -> what was copied aside of each item; None: it wasn't there"""
        self.begun = 0
        self.pulls: dict[int, tuple[Pull, Offer | None]] = {}

    def chance(self, share: float) -> bool:
        """Something goes wrong; never when it is reliable."""
        return not self.reliable and self.draw.random() < share

    def apply(self, moves: Moves, slots: dict[int, object], size: int) -> None:
        super().apply(moves, slots, size)
        for lent in moves.lends:
            self._copy(lent, slots, size)
        for ticket in moves.ended:
            self.pulls.pop(ticket, None)
        self.pulls |= {pull.ticket: (pull, None) for pull in moves.pulls}

    def _copy(self, lent: Lent, slots: dict[int, object], size: int) -> None:
        aside = self.lent.setdefault(lent.lend, [])
        assert len(aside) == lent.first
        for block, content in lent.places:
            below = self.held.get(content)
            aside.append(below if block < 0 else [slots[block * size + i] for i in range(size)])

    def begin(self, world: World, other: World, layout: Layout) -> None:
        """Lend to, and fetch from, the other world."""
        self.world, self.other, self.layout = world, other, layout
        prices = Prices(1.0)
        prices.computed(1, 1.0)
        most, step = 3 if self.chance(0.5) else 1000, world.budget if self.chance(0.7) else 0
        world.scheduler.use_peers(Pulls(world.scheduler.tables, "own", prices, most, step))
        world.scheduler.lends.begin(Terms(b"m", [self.form(world)], ["a"], "", ("tcp",)), self.index)

    def form(self, world: World) -> Form:
        groups = tuple(group.layers for group in self.layout.groups)
        layers = 1 + max(chain(*groups))
        return Form(Part(range(layers), range(1)), groups, self.layout.height, 1, world.pool.block_size, 1)

    def answers(self) -> list[tuple[int, int]]:
        found = super().answers()
        for ticket, (pull, offer) in list(self.pulls.items()):
            if self.chance(0.7):
                continue
            if offer is None:
                try:
                    self.pulls[ticket] = pull, self._ask(pull)
                except RefusedError:
                    found.append((ticket, 0))
                    del self.pulls[ticket]
                continue
            assert isinstance(self.other.tiers, FakeExchange)
            aside = self.other.tiers.lent.get(offer.lend, [])
            done = len(aside) == len(items(offer.firsts, offer.stop))
            if pull.ahead_s and self.chance(0.3):
                found += self._said(*self._begun(pull, offer, aside, done))
            elif done or self.chance(0.1):
                del self.pulls[ticket]
                if not self.chance(0.1):
                    found += self._said(ticket, self._stage(pull, offer, aside))
        return found

    def _said(self, ticket: int, count: int) -> list[tuple[int, int]]:
        """By all ranks: others than the first may have all of it already, or lack some."""
        found = [(ticket, count)]
        while len(found) < self.ranks:
            end = count if count >= 0 else ~count
            less = ~self.draw.randint(0, end) if self.chance(0.3) else count
            found.append((abs(ticket) if self.chance(0.5) else ticket, less))
        self.draw.shuffle(found)
        return found

    def _begun(self, pull: Pull, offer: Offer, aside: Sequence[object], done: bool) -> tuple[int, int]:
        """All is expected to come in time: it does, or some of it doesn't."""
        del self.pulls[pull.ticket]
        groups, size = len(self.layout.groups), self.world.pool.block_size
        first, end = pull.first // size, offer.end // size
        if not done or self._stage(pull, offer, aside) != end or self.chance(0.3):
            self.spoiled.add(pull.ticket)
            self.staged[pull.ticket] = [[WRONG] * size] * ((end - first) * groups)
        self.begun += 1
        return -pull.ticket, end

    def _ask(self, pull: Pull) -> Offer:
        size = self.world.pool.block_size
        part = self.form(self.world).part
        ask = Ask(
            pull.fetch, b"m", pull.chain, pull.tokens, size, pull.first, pull.end, self.layout.groups, (part,), ("tcp",)
        )
        return self.other.scheduler.lends.lend(ask, content_ids(pull.chain, pull.tokens, self.other.pool.block_size))

    def _stage(self, pull: Pull, offer: Offer, aside: Sequence[object]) -> int:
        """Cut anew what came, up to what didn't."""
        listed = items(offer.firsts, offer.stop)
        good = next((n for n, item in enumerate(aside) if item is None), len(aside))
        theirs, mine = self.other.pool.block_size, self.world.pool.block_size
        stamps = {
            (group, block * theirs + i): stamp
            for (block, group), item in zip(listed[:good], aside, strict=False)
            for i, stamp in enumerate(item)  # type: ignore[arg-type]
        }
        whole = good == len(listed)
        end = (offer.end if whole else listed[good][0] * theirs) // mine
        if not whole and any(group.reach is not None for group in self.layout.groups):
            return ~0
        groups, first = len(self.layout.groups), pull.first // mine
        rows = [
            [stamps.get((group, block * mine + i)) for i in range(mine)]
            for block in range(first, end)
            for group in range(groups)
        ]
        self.staged[pull.ticket] = rows  # type: ignore[assignment]
        return end if whole else ~end


@pytest.mark.parametrize("layout", [ONE_GROUP, WINDOWS, CHUNKS], ids=["one", "windows", "chunks"])
@pytest.mark.parametrize("seed", range(20))
def test_outputs_do_not_depend_on_what_comes_from_peers(seed: int, layout: Layout) -> None:
    draw = random.Random(seed)
    worlds = [world_of(draw, layout) for _ in range(2)]
    for one, other in (worlds, worlds[::-1]):
        assert isinstance(one.tiers, FakeExchange)
        one.tiers.begin(one, other, layout)
    trunk = [draw.randrange(VOCABULARY) for _ in range(60)]
    for name in range(30):
        prompt = trunk[: draw.randrange(61)] + [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 8))]
        world = draw.choice(worlds)
        peers = tuple(
            Peer("other", "s", draw.choice((8, 40, 100)), ordered=True) for _ in range(draw.choice((0, 1, 2)))
        )
        sampling = SamplingParams(seed=3, max_tokens=draw.choice((1, 8)), ignore_eos=True, n=draw.choice((1, 1, 2)))
        request = Request(request_id=str(name), prompt_token_ids=prompt, sampling=sampling, peers=peers)
        world.scheduler.add(request, world.now)
        world.requests[str(name)] = request
        for _ in range(draw.choice((0, 1, 10))):
            for each in draw.sample(worlds, 2):
                each.step()
        if draw.random() < 0.1:
            world.events += world.scheduler.abort(str(name), now=world.now)
    while any(world.scheduler.has_work or world.scheduler.lends.active for world in worlds):
        for each in worlds:
            each.step()
    for world in worlds:
        world.run()
        assert not world.pool.check()
        for name_ in world.requests:
            world.check(name_)


def world_of(draw: random.Random, layout: Layout) -> World:
    size, budget = draw.choice((1, 2, 3, 4, 8)), draw.choice((3, 16, 200))
    blocks = draw.choice((120, 200, 400)) // size + 1
    if layout is not ONE_GROUP:
        blocks = max(blocks, layout.peak(90, size, budget) + draw.choice((0, 1, 5, 100)))
    tiers = FakeExchange(draw.randrange(10**6), draw.choice((1, 1, 2)))
    seats, depth = draw.choice((2, 5, 20)), draw.choice((1, 1, 2))
    ahead = draw.random() < 0.7
    return World(
        blocks=blocks,
        size=size,
        seats=seats,
        budget=budget,
        limit=90,
        layout=layout,
        tiers=tiers,
        depth=depth,
        ahead=ahead,
    )


def test_blocks_do_come_from_peers() -> None:
    """What the test above is about happens."""
    draw = random.Random(1)
    worlds = [World(blocks=400, size=size, tiers=FakeExchange(None)) for size in (4, 8)]
    for one, other in (worlds, worlds[::-1]):
        assert isinstance(one.tiers, FakeExchange)
        one.tiers.begin(one, other, ONE_GROUP)
    prompt = [draw.randrange(VOCABULARY) for _ in range(50)]
    worlds[0].add("a", prompt, max_tokens=1)
    worlds[0].run()
    request = Request(
        request_id="b",
        prompt_token_ids=prompt,
        sampling=SamplingParams(seed=3, max_tokens=1),
        peers=(Peer("x", "", 50, True),),
    )
    worlds[1].scheduler.add(request, 0.0)
    while worlds[1].scheduler.has_work:
        for each in worlds:
            each.step()
    (end,) = worlds[1].ends("b")
    assert end.cached_tokens == 48  # type: ignore[union-attr]
