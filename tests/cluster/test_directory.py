"""The directory against a brute-force model: what groups say, lost, repeated, reordered; restarts; memory."""

from __future__ import annotations

import random
from collections import deque

import pytest

from kvasir.cluster.block_journal import TIERS, BlockJournal
from kvasir.cluster.block_tables import Tables
from kvasir.cluster.directory import BlockDirectory, BlockFeed, key_list
from kvasir.cluster.prompt_keys import Hasher, PromptKeys
from kvasir.engine import block_ids
from kvasir.engine.blocks import content_ids, salted, token_bytes
from kvasir.proto import group_pb2 as pb

START = salted("start")
IDS = [salted(bytes([number])) for number in range(60)]


def prefixes(directory, portions, worst="device"):
    """Group -> blocks, of those that hold any."""
    found = directory._tables.prefixes(portions, TIERS.index(worst) + 1, directory._places)
    return {group: count for group, count in enumerate(found) if count}


@pytest.fixture
def in_python(monkeypatch):
    monkeypatch.setattr(block_ids, "_compiled", lambda: None)


def key(number):
    return key_list([IDS[number]])[0]


def keys(numbers):
    return key_list(IDS[number] for number in numbers)


def brute_force(held, wanted):
    """Group -> length of the longest prefix of `wanted` in its set."""
    found = {}
    for group, contents in held.items():
        count = next((i for i, one in enumerate(wanted) if one not in contents), len(wanted))
        if count:
            found[group] = count
    return found


@pytest.mark.parametrize("seed", range(10))
def test_prefixes_are_those_of_brute_force(in_python, seed):
    draw = random.Random(seed)
    directory, held = BlockDirectory(), {}
    for _ in range(400):
        action = draw.random()
        if action < 0.05 or not held:
            held[directory.join()] = set()
        elif action < 0.07:
            group = draw.choice([*held])
            directory.leave(group)
            del held[group]
        elif action < 0.1:
            group = draw.choice([*held])
            held[group] = {key(number) for number in draw.sample(range(60), 30)}
            directory.replace(group, "device", held[group])
        else:
            group = draw.choice([*held])
            stored = keys(draw.sample(range(60), draw.randrange(12)))
            evicted = [one for one in keys(draw.sample(range(60), draw.randrange(12))) if one not in stored]
            directory.change(group, "device", stored, evicted)
            held[group] = (held[group] | set(stored)) - set(evicted)
        wanted = keys(draw.sample(range(60), draw.randrange(20)))
        exact = brute_force(held, wanted)
        assert prefixes(directory, ([one] for one in wanted)) == exact
        size = draw.randrange(1, 8)
        found = prefixes(directory, (wanted[i : i + size] for i in range(0, len(wanted), size)))
        for group in held:  # a gap isn't seen in a portion whose last block is there; without gaps they are equal
            count, least = found.get(group, 0), exact.get(group, 0)
            assert count >= least
            assert count == least or count == len(wanted) or wanted[count] not in held[group]
            assert count == least or any(one in held[group] for one in wanted[least + 1 :])
        assert directory.num_holdings == sum(map(len, held.values()))


@pytest.mark.parametrize("size", [1, 3, 7, 32])
def test_portions_make_no_difference_where_there_are_no_gaps(in_python, size):
    draw = random.Random(size)
    directory, wanted = BlockDirectory(), keys(range(60))
    held = {directory.join(): wanted[: draw.randrange(61)] for _ in range(30)}
    for group, stored in held.items():
        directory.change(group, "device", stored, ())
    found = prefixes(directory, (wanted[i : i + size] for i in range(0, 60, size)))
    assert found == {group: len(stored) for group, stored in held.items() if stored}


def test_worse_tiers_continue_what_the_device_holds(in_python):
    directory = BlockDirectory()
    one, two = directory.join(), directory.join()
    wanted = keys(range(6))
    directory.change(one, "device", wanted[:2], ())
    directory.change(one, "host", wanted[1:4], ())
    directory.change(one, "disk", [wanted[4]], ())
    directory.change(two, "disk", wanted[:1], ())
    assert prefixes(directory, ([one] for one in wanted)) == {one: 2}
    assert prefixes(directory, ([one] for one in wanted), "host") == {one: 4}
    assert prefixes(directory, ([one] for one in wanted), "disk") == {one: 5, two: 1}
    directory.change(one, "host", (), wanted[1:4])
    assert prefixes(directory, ([one] for one in wanted), "disk") == {one: 2, two: 1}


def test_memory_is_bounded(caplog):
    directory = BlockDirectory(max_holdings=100)
    one, two = directory.join(), directory.join()
    directory.change(one, "device", range(1, 1001), ())  # compiled code takes key 0 for 1
    directory.change(two, "host", range(1, 51), ())
    assert [record.getMessage() for record in caplog.records] == [
        "100 blocks of groups are known (100 in device, 0 in host, 0 in disk), no more fit: requests find less of what is cached"
    ]
    assert directory.num_holdings == 100
    directory.change(one, "device", (), range(1, 61))
    directory.change(two, "host", range(500, 550), ())
    assert directory.num_holdings == 90
    directory.leave(one)
    directory.leave(two)
    assert directory.num_holdings == 0
    assert not any(directory.has_tier(tier) for tier in ("device", "host", "disk"))


class Asked:
    """A prompt of one token a block."""

    block_size = 1

    def __init__(self, tokens, portion=5):
        self.portion = portion
        self.start, self.blocks, self.token_ids = START, len(tokens), tokens
        self.keys = key_list(content_ids(START, token_bytes(tokens), 1))

    def __iter__(self):
        size = self.portion
        return (self.keys[first : first + size] for first in range(0, self.blocks, size))


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def compiled(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(block_ids, "_compiled", lambda: None)
    elif block_ids.loading().result() is None:
        pytest.skip("there is no C++ compiler")
    return request.param


@pytest.mark.parametrize("seed", range(5))
def test_what_groups_hold_of_prompts_is_what_brute_force_finds(compiled, seed, monkeypatch):
    """Of many groups in all tiers, which come, go and change, with tables that grow and shrink; portions are forgotten and found
    again. Compiled code sees gaps, too."""
    monkeypatch.setattr("kvasir.kernels.block_directory.MEMORY", 16)
    draw, directory, held = random.Random(seed), BlockDirectory(), {}
    trunk = [draw.randrange(3) for _ in range(300)]
    prompts = [
        Asked(trunk[: draw.randrange(300)] + [draw.randrange(9) for _ in range(draw.randrange(90))]) for _ in range(12)
    ]
    for turn in range(40):
        action = draw.random()
        if action < 0.4 or not held:
            for _ in range(draw.choice((1, 40))):
                held[directory.join()] = {tier: set() for tier in TIERS}
        elif action < 0.5:
            directory.leave(group := draw.choice([*held]))
            del held[group]
        for group in draw.sample([*held], min(len(held), 12)):
            tier, keys = draw.choice(TIERS), draw.choice(prompts).keys
            end = draw.randrange(len(keys) + 1)
            known = held[group][tier]
            if draw.random() < 0.1:
                held[group][tier] = {*keys[:end]}
                directory.replace(group, tier, held[group][tier])
                continue
            gone = {*keys[end:]} if not compiled or draw.random() < 0.8 else {*draw.sample(keys, len(keys) // 9)}
            if not compiled:
                gone = {key for key in known if any(key in one.keys[end:] for one in prompts)}
            directory.change(group, tier, [key for key in keys[:end] if key not in gone], gone)
            held[group][tier] = known - gone | ({*keys[:end]} - gone)
        for prompt in draw.sample(prompts, 3) if turn % 3 else ():
            found = directory.found(prompt)
            for group, tiers in held.items():
                below = set()
                for number, tier in enumerate(TIERS):
                    below |= tiers[tier]
                    exact = next((n for n, key in enumerate(prompt.keys) if key not in below), prompt.blocks)
                    assert found[number, group] == exact or (not compiled and found[number, group] > exact)
        assert directory.num_holdings == sum(len(keys) for tiers in held.values() for keys in tiers.values())
        assert [directory.has_tier(tier) for tier in TIERS] == [
            any(tiers[tier] for tiers in held.values()) for tier in TIERS
        ]
    assert isinstance(directory._tables, block_ids.Holders) == compiled
    for group in held:
        directory.leave(group)
    assert directory.num_holdings == 0
    if compiled:
        assert [directory._tables.size(tier) for tier in range(3)] == [0, 0, 0]


def test_blocks_of_another_size_are_others(compiled):
    """Of one version of weights, too: groups get another size one after the other."""
    directory, tokens = BlockDirectory(), [*range(1, 1026)]
    groups = {size: directory.join() for size in (16, 32)}
    for size, group in groups.items():
        directory.change(group, "device", key_list(content_ids(START, token_bytes(tokens), size)), ())
    for _ in range(2):
        for size, group in groups.items():
            found = directory.found(PromptKeys(Hasher(START, size), tokens, START, 1024 // size))[0]
            assert {other: int(found[other]) for other in groups.values() if found[other]} == {group: 1024 // size}


def test_room_is_bounded_in_compiled_tables(compiled):
    directory = BlockDirectory(max_holdings=100)
    group, prompt = directory.join(), Asked([*range(150)])
    directory.change(group, "device", prompt.keys[:10], ())
    assert directory.found(prompt)[0, group] == 10
    directory.change(group, "device", prompt.keys, ())
    assert directory.num_holdings == 100
    assert directory.found(prompt)[:, group].tolist() == [100, 100, 100]


class Held:
    """What groups hold, by tier, and whether a directory that has little room may say so."""

    def __init__(self, draw, directory):
        self.draw, self.directory = draw, directory
        self.groups = {directory.join(): {tier: set() for tier in TIERS} for _ in range(5)}

    def change(self, keys):
        group, tier = self.draw.choice([*self.groups]), self.draw.choice(TIERS)
        known = self.groups[group][tier]
        stored = {*keys[: self.draw.randrange(len(keys))]} if self.draw.random() < 0.6 else set()
        evicted = {key for key in known if self.draw.random() < 0.2} - stored
        self.directory.change(group, tier, stored, evicted)
        self.groups[group][tier] = (known | stored) - evicted
        return tier

    def ask(self):
        for group, tiers in self.groups.items():
            if self.directory.lacks(group):
                for tier in TIERS:
                    self.directory.replace(group, tier, [*tiers[tier]][::2], [*tiers[tier]][1::2])

    def exact(self, prompt, group):
        """As `found` for one group."""
        for row in range(len(TIERS)):
            below = set().union(*(self.groups[group][tier] for tier in TIERS[: row + 1]))
            yield next((n for n, key in enumerate(prompt.keys) if key not in below), prompt.blocks)


@pytest.mark.parametrize("seed", range(5))
def test_a_full_directory_keeps_what_lies_on_devices(compiled, seed):
    """What it says is true, what it keeps for devices stays free, and when there is room again all becomes known."""
    draw, directory = random.Random(seed), BlockDirectory(max_holdings=96)
    prompts = [Asked([number, *range(30)], portion=1) for number in range(3)]
    held, full = Held(draw, directory), 0
    for _ in range(300):
        before, room = dict(directory.dropped), 96 - directory.num_holdings
        tier = held.change(draw.choice(prompts).keys)
        assert directory.num_holdings == sum(directory.sizes().values()) <= 96
        if directory.dropped["device"] > before["device"]:
            full += 1
            assert directory.sizes() == {"device": 96, "host": 0, "disk": 0}
        if tier != "device" and room >= 6:
            assert directory.num_holdings <= 90
        held.ask()
        prompt = draw.choice(prompts)
        found = directory.found(prompt)
        for group in held.groups:
            exact = [*held.exact(prompt, group)]
            assert all(one <= other for one, other in zip(found[:, group], exact, strict=True))
            assert group in directory._lacking or [*found[:, group]] == exact
    assert full
    assert all(directory.dropped.values())
    for group, tiers in held.groups.items():
        for tier in TIERS:
            tiers[tier] = {*draw.choice(prompts).keys[:5]}
            directory.change(group, tier, tiers[tier], {key for one in prompts for key in one.keys} - tiers[tier])
    held.ask()
    assert directory.num_holdings == 5 * 3 * 5
    for prompt in prompts:
        found = directory.found(prompt)
        assert all([*found[:, group]] == [*held.exact(prompt, group)] for group in held.groups)


@pytest.mark.parametrize("seed", range(5))
def test_little_is_done_at_a_time(compiled, seed, monkeypatch):
    """However much groups say, a gateway's loop goes on meanwhile; in the end all is known."""
    monkeypatch.setattr("kvasir.cluster.directory.SLICE", 7)
    draw, later, held = random.Random(seed), deque(), {}
    directory = BlockDirectory(max_holdings=10_000, later=later.append)
    prompts = [Asked([number, *range(90)], portion=1) for number in range(4)]

    def work():
        before = directory.num_holdings
        later.popleft()()
        assert abs(directory.num_holdings - before) <= 7
        assert len(later) <= 1

    for _ in range(400):
        action, before = draw.random(), directory.num_holdings
        if action < 0.1 or not held:
            held[directory.join()] = {tier: set() for tier in TIERS}
        elif action < 0.14:
            directory.leave(group := draw.choice([*held]))
            del held[group]
        else:
            group, tier, keys = draw.choice([*held]), draw.choice(TIERS), draw.choice(prompts).keys
            end, gone = draw.randrange(len(keys)), {*draw.sample(keys, 9)}
            if action < 0.5:
                directory.replace(group, tier, keys[: end // 2], keys[end // 2 : end])
                held[group][tier] = {*keys[:end]}
            else:
                directory.change(group, tier, [*{*keys[:end]} - gone], [*gone])
                held[group][tier] = (held[group][tier] | {*keys[:end]}) - gone
        assert abs(directory.num_holdings - before) <= 7
        while later and draw.random() < 0.8:
            work()
    while later:
        work()
    assert directory.sizes() == {tier: sum(len(tiers[tier]) for tiers in held.values()) for tier in TIERS}
    assert directory.num_holdings == sum(directory.sizes().values())
    for prompt in prompts:
        found = directory.found(prompt)
        for group, tiers in held.items():
            for row in range(len(TIERS)):
                below = set().union(*(tiers[tier] for tier in TIERS[: row + 1]))
                exact = next((n for n, key in enumerate(prompt.keys) if key not in below), prompt.blocks)
                assert found[row, group] == exact


def test_what_found_no_room_is_asked_for_again(compiled):
    directory = BlockDirectory(max_holdings=16)
    one, two = directory.join(), directory.join()
    feed, journal = BlockFeed(directory, two), BlockJournal("x")
    feed.begin("x")
    directory.change(one, "device", range(1, 15), ())
    journal.take("device", dict.fromkeys(IDS[:4], True))
    assert [feed.take(message) for message in (*journal.flush(), *journal.snapshot())] == [False, False]
    assert directory.num_holdings == 16
    assert not feed.lacks()
    directory.change(one, "device", (), range(1, 15))
    assert [feed.lacks(), feed.lacks(), feed.in_step] == [True, False, False]
    assert [feed.take(message) for message in journal.snapshot()] == [False]
    assert directory.sizes()["device"] == 4
    assert not feed.lacks()


def test_what_is_condemned_again_is_not_gone_through():
    """Python's tables: what was leaving and what leaves now aren't made one set. Each block leaves once, or comes back."""
    tables = Tables(1)
    for first in (0, 40):
        assert tables.store(0, 0, keys(range(first, first + 20)), 0, 60, 60).added == 20
        own = tables._part(0, 0).own
        tables.condemn(0, 0)
        assert any(one is own for one in tables._part(0, 0).leaving)
    assert tables.store(0, 0, keys([*range(5), 41]), 0, 0, 60) == (6, 0, 0)
    assert (tables.held(0, 0), tables.leaving(0, 0), tables.size(0)) == (6, 34, 40)
    assert [tables.sweep(0, 0, 25) for _ in range(3)] == [25, 9, 0]
    assert (tables.held(0, 0), tables.leaving(0, 0), tables.size(0)) == (6, 0, 6)


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**64, "x", None])
def test_what_is_no_token_is_refused(compiled, wrong):
    directory, prompt = BlockDirectory(), Asked([*range(150)])
    directory.change(directory.join(), "device", prompt.keys, ())
    prompt.token_ids = [*range(70), wrong, *range(71, 150)]
    hasher = Hasher(START, 1)
    with pytest.raises((OverflowError, TypeError)):
        directory.found(PromptKeys(hasher, prompt.token_ids, START, 150))


class Life:
    """A group whose pool changes at random, and what it says."""

    def __init__(self, draw, number):
        self.draw, self.name, self.held = draw, f"life {number}", set()
        self.journal = BlockJournal(self.name)

    def step(self):
        changes = {IDS[n]: self.draw.random() < 0.6 for n in self.draw.sample(range(60), self.draw.randrange(15))}
        self.held = (self.held | {c for c, stored in changes.items() if stored}) - {
            c for c, stored in changes.items() if not stored
        }
        self.journal.take("device", changes)
        return [*self.journal.flush()]


@pytest.mark.parametrize("seed", range(20))
def test_feeds_converge_whatever_the_network_does(in_python, seed, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.block_journal.MAX_IDS", 7)
    monkeypatch.setattr("kvasir.cluster.directory.ASK_AGAIN", 3)
    draw = random.Random(seed)
    directory = BlockDirectory()
    group = directory.join()
    feed, lives = BlockFeed(directory, group), 0
    life = Life(draw, lives)
    feed.begin(life.name)
    wire, seen = deque(life.journal.snapshot()), []
    for turn in range(600):
        calm = turn > 400  # the network is well again: within a few messages the directory is right
        wire.extend(life.step())
        if not calm and draw.random() < 0.02:
            lives += 1
            life = Life(draw, lives)
            feed.begin(life.name)
            wire.extend(life.journal.snapshot())
        while wire:
            message = wire.popleft()
            seen.append(message)
            luck = 1.0 if calm else draw.random()
            if luck < 0.1:
                continue
            if luck < 0.2:
                wire.append(message)
                wire.append(draw.choice(seen))
                continue
            if feed.take(pb.Blocks.FromString(message.SerializeToString())) and (calm or draw.random() < 0.7):
                wire.extend(life.journal.flush())
                wire.extend(life.journal.snapshot())
        if feed.in_step and calm and turn > 420:
            assert {one for one in range(60) if prefixes(directory, ([keys([one])]))} == {
                IDS.index(c) for c in life.held
            }
    assert feed.in_step


@pytest.mark.parametrize("seed", range(10))
def test_what_changes_while_a_snapshot_is_made(in_python, seed, monkeypatch):
    """Its parts are of different moments; what a group says next, as it says it from the first part on, makes up for that."""
    monkeypatch.setattr("kvasir.cluster.block_journal.MAX_IDS", 3)
    draw, directory = random.Random(seed), BlockDirectory()
    life, feed = Life(draw, 0), BlockFeed(directory, directory.join())
    for _ in range(10):
        life.step()
    feed.begin(life.name)
    behind, parts = [], 0
    for message in life.journal.snapshot():
        assert feed.take(message) is False
        parts += 1
        behind += life.step()
    assert parts > 2
    assert feed.in_step
    assert not any(feed.take(message) for message in behind)
    assert {one for one in range(60) if prefixes(directory, [keys([one])])} == {IDS.index(c) for c in life.held}


def test_a_journal_does_little_in_one_go(monkeypatch):
    monkeypatch.setattr("kvasir.cluster.block_journal.MAX_IDS", 100)
    journal, ids = BlockJournal("x"), [salted(str(number)) for number in range(1000)]
    journal.take("disk", dict.fromkeys(ids, True))
    told = journal.flush()
    assert len(next(told).tiers[0].stored) == 100 * 16
    assert len(next(journal.flush()).tiers[0].stored) == 100 * 16, "another goes on where the first is"
    assert sum(len(message.tiers[0].stored) for message in told) == 800 * 16
    sizes = [len(message.tiers[0].stored) // 16 for message in journal.snapshot()]
    assert sum(sizes) == 1000
    assert max(sizes) < 150


@pytest.mark.parametrize("seed", range(2))
def test_feeds_of_many_groups_in_all_tiers_converge(compiled, seed, monkeypatch):
    """Which come and go, while messages are lost and reordered."""
    monkeypatch.setattr("kvasir.cluster.block_journal.MAX_IDS", 7)
    monkeypatch.setattr("kvasir.cluster.directory.ASK_AGAIN", 3)
    draw, directory, groups = random.Random(seed), BlockDirectory(), {}
    tokens = [[chain, *range(100 * chain, 100 * chain + 12)] for chain in range(1, 5)]
    prompts = [PromptKeys(Hasher(START, 1), one, START, len(one)) for one in tokens]
    chains = [content_ids(START, token_bytes(one), 1) for one in tokens]
    ids = [content for chain in chains for content in chain]
    monkeypatch.setattr("kvasir.cluster.prompt_keys.BLOCKS", 1)  # without gaps that Python's tables don't see
    directory.found(prompts[0])
    for turn in range(120):
        calm = turn > 100
        if len(groups) < 66 and not calm:
            number, journal = directory.join(), BlockJournal(str(turn))
            feed = BlockFeed(directory, number)
            feed.begin(str(turn))
            groups[number] = (feed, journal, {tier: set() for tier in TIERS}, deque(journal.snapshot()))
        if draw.random() < 0.05 and not calm:
            directory.leave(number := draw.choice([*groups]))
            del groups[number]
        for feed, journal, held, wire in groups.values():
            if draw.random() < 0.3:
                changes = {content: draw.random() < 0.7 for content in draw.sample(ids, draw.randrange(20))}
                journal.take(tier := draw.choice(TIERS), changes)
                held[tier] = {content for content in ids if changes.get(content, content in held[tier])}
                wire.extend(journal.flush())
            while wire:
                message, luck = wire.popleft(), 1.0 if calm else draw.random()
                if luck < 0.2:
                    wire.extend([message] if luck < 0.1 else ())
                elif feed.take(message):
                    wire.extend([*journal.flush(), *journal.snapshot()])
    assert sum(feed.in_step for feed, *_ in groups.values()) > len(groups) // 2
    for prompt, chain in zip(prompts, chains, strict=True):
        found = directory.found(prompt)
        for number, (feed, _, held, _) in groups.items():
            for row in range(3 if feed.in_step else 0):
                known = set().union(*(held[tier] for tier in TIERS[: row + 1]))
                assert found[row, number] == next((n for n, one in enumerate(chain) if one not in known), len(chain))


def test_a_gap_asks_once_and_then_again_after_a_while(in_python, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.directory.ASK_AGAIN", 4)
    directory = BlockDirectory()
    feed, journal = BlockFeed(directory, directory.join()), BlockJournal("x")
    feed.begin("x")
    assert [feed.take(message) for message in journal.snapshot()] == [False]

    def change(number):
        journal.take("device", {IDS[number]: True})
        return next(journal.flush())

    assert feed.take(change(0)) is False
    change(1)
    assert [feed.take(change(number)) for number in range(2, 8)] == [True, False, False, False, True, False]
    assert [feed.take(message) for message in journal.snapshot()] == [False]
    assert prefixes(directory, [keys(range(5)), keys(range(5, 10))]) == {0: 8}


def test_the_journal_says_nothing_of_what_came_and_went():
    journal = BlockJournal("x")
    journal.take("device", {IDS[0]: True})
    journal.take("device", {IDS[0]: False, IDS[1]: False})
    assert [*journal.flush()] == []
    journal.take("device", {IDS[0]: True})
    (message,) = journal.flush()
    assert (message.number, message.tiers[0].stored, message.tiers[0].evicted) == (1, IDS[0], b"")
    journal.take("device", {IDS[0]: False})
    journal.take("device", {IDS[0]: True})
    assert [*journal.flush()] == []
