"""The router: policies, homes, sessions, reservations, limits; and its reasons."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.member import MEMORY_S
from kvasir.cluster.router import STAY_S, Router
from kvasir.engine.blocks import chain_start, content_ids, salted, token_bytes
from kvasir.engine.errors import OverloadedError
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Stats

INFO = ModelInfo(name="m", max_model_len=2**20, vocab_size=2**17, salt=salted("m"), block_size=16, max_num_seqs=8)
FREE = {"free_blocks": 10_000}


def request(tokens, name="r", **fields):
    return Request(request_id=name, prompt_token_ids=tokens, sampling=SamplingParams(), **fields)


def prompt(number, length=1000):
    return random.Random(number).choices(range(2**17), k=length)


class Fleet:
    """Groups behind a router, that hold what they are told to."""

    def __init__(self, count, policy="cost", info=INFO, **options):
        self.router = Router(policy, draw=random.Random(0), **options)
        self.members = [self.router.join(f"g{number}") for number in range(count)]
        self.journals = [BlockJournal(f"life {number}") for number in range(count)]
        for member, journal in zip(self.members, self.journals, strict=True):
            member.welcome(info, journal._incarnation)
            for message in journal.snapshot():
                member.blocks(message)
            member.report(Stats(**FREE), 0, 0.0)

    def hold(self, number, tokens, tier="device", salt="", adapter=None):
        start = chain_start(INFO.salt, salt, adapter, False)
        self.journals[number].take(tier, dict.fromkeys(content_ids(start, token_bytes(tokens), 16), True))
        for message in self.journals[number].flush():
            assert not self.members[number].blocks(message)

    def load(self, number, rate=0.0, **stats):
        stats = {"prefills": 1 if stats.get("queued_prefill_tokens") else 0, **stats}
        self.members[number].report(Stats(**{**FREE, **stats}), 0, 0.0)
        self.members[number].rate = rate

    def place(self, tokens, session="", now=0.0, **fields):
        asked = request(tokens, **fields)
        return self.router.place(asked, self.members, now, session)

    def number(self, route):
        return self.members.index(route.member)


def test_round_robin_takes_turns():
    fleet = Fleet(3, "round-robin")
    assert Counter(fleet.number(fleet.place(prompt(1))) for _ in range(9)) == {0: 3, 1: 3, 2: 3}


def test_least_load_counts_what_was_just_sent():
    fleet = Fleet(3, "least-load")
    fleet.load(0, running=2, waiting=1)
    fleet.load(1, running=1)
    assert Counter(fleet.number(fleet.place(prompt(1))) for _ in range(5)) == {1: 2, 2: 3}


def test_prefix_goes_to_the_longest_whatever_its_load():
    fleet = Fleet(3, "prefix")
    fleet.hold(1, prompt(1)[:500])
    fleet.hold(2, prompt(1)[:800])
    fleet.load(2, running=100, waiting=100, queued_prefill_tokens=10**6)
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.cached_tokens, route.why) == (2, 800, "prefix")


def test_cost_weighs_the_prefix_against_the_queue():
    fleet = Fleet(2)
    fleet.hold(1, prompt(1)[:400])
    fleet.load(1, queued_prefill_tokens=100)
    assert fleet.number(fleet.place(prompt(1))) == 1
    fleet.load(1, queued_prefill_tokens=900)
    fleet = Fleet(2)
    fleet.hold(1, prompt(1)[:400])
    fleet.load(1, queued_prefill_tokens=900)
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.cached_tokens, route.best_tokens) == (0, 0, 400)


def test_faster_groups_get_more():
    fleet = Fleet(2)
    fleet.load(0, rate=1000.0)
    fleet.load(1, rate=3000.0)
    found = Counter(fleet.number(fleet.place(prompt(number))) for number in range(40))
    assert found[1] == pytest.approx(30, abs=2)


def test_decoding_counts():
    fleet = Fleet(2)
    fleet.load(0, running=8, decode_blocks=5000)
    assert fleet.number(fleet.place(prompt(1))) == 1


def test_a_conversation_stays_home_until_the_wait_there_is_too_long():
    fleet = Fleet(2)
    fleet.hold(1, prompt(1)[:816])
    fleet.load(0, rate=2000.0)
    fleet.load(1, rate=2000.0, queued_prefill_tokens=int(2000 * STAY_S), prefills=9)
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.why) == (1, "home")
    route.reservation.settle()
    fleet.load(1, rate=2000.0, queued_prefill_tokens=int(2000 * STAY_S) + 1, prefills=9)
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.why) == (0, "cost")


def test_equals_are_drawn_and_the_less_loaded_of_two_is_taken():
    fleet = Fleet(8)
    for number in range(8):
        fleet.load(number, waiting=number, running=0)
    found = Counter()
    for _ in range(400):
        route = fleet.place(prompt(1))
        found[fleet.number(route)] += 1
        route.reservation.settle()
    assert 0 < found[5] < found[1]
    assert found[7] == 0


def test_a_burst_is_spread_before_any_report():
    fleet = Fleet(4)
    found = Counter(fleet.number(fleet.place(prompt(number))) for number in range(40))
    assert all(count == 10 for count in found.values())


def test_reservations_end_when_the_group_counts_them():
    fleet = Fleet(1)
    member = fleet.members[0]
    one, two = fleet.place(prompt(1)).reservation, fleet.place(prompt(2)).reservation
    one.number, two.number = 1, 2
    assert (member.prefill_tokens, member.requests) == (2000, 2)
    member.report(Stats(waiting=1, queued_prefill_tokens=1000, **FREE), 1, 0.1)
    assert (member.prefill_tokens, member.requests) == (2000, 2)
    two.streams()
    assert (member.prefill_tokens, member.requests) == (1000, 2)
    two.settle()
    two.settle()
    assert (member.prefill_tokens, member.requests) == (1000, 1)


def test_rates_are_measured_while_there_is_a_queue():
    fleet = Fleet(1)
    member = fleet.members[0]
    member.report(Stats(queued_prefill_tokens=5000, step_tokens=100, **FREE), 0, 1.0)
    member.report(Stats(queued_prefill_tokens=3000, step_tokens=2150, generation_tokens=50, **FREE), 0, 2.0)
    assert member.rate == 2000.0
    assert member.wait(1000, together=True) == 2.0
    assert member.wait(1000) == 0.5  # nobody is ahead by more than it has itself, and nobody was said to wait
    member.report(Stats(step_tokens=2200, **FREE), 0, 3.0)
    member.report(Stats(step_tokens=2200, **FREE), 0, 4.0)
    assert member.rate == 2000.0


def test_seats_are_waited_for():
    fleet = Fleet(1)
    member = fleet.members[0]
    member.report(Stats(running=8, waiting=2, ended=0, **FREE), 0, 1.0)
    member.report(Stats(running=8, waiting=2, ended=4, **FREE), 0, 2.0)
    assert member.queue(0) == pytest.approx(3 / 4)
    member.report(Stats(running=3, waiting=0, ended=9, free_blocks=10), 0, 3.0)
    assert member.queue(160) == 0.0
    assert member.queue(161) == pytest.approx(1 / 4)


def test_what_cant_be_served_in_time_is_refused_at_once():
    fleet = Fleet(2, max_ttft_s=2.0)
    for number in (0, 1):
        fleet.load(number, rate=1000.0, running=1, waiting=1, queued_prefill_tokens=900)
    fleet.place(prompt(1, 500))
    fleet.place(prompt(2, 500))
    with pytest.raises(OverloadedError, match=r"about 1.9 s, too close to --max-ttft, 2 s") as refusal:
        fleet.place(prompt(3, 500))
    assert refusal.value.retry_after_s == 1.0
    with pytest.raises(OverloadedError, match=r"deadline is 0.5 s"):
        fleet.place(prompt(4, 100), deadline_s=0.5)
    assert sum(member.requests for member in fleet.members) == 6
    assert fleet.place(prompt(4, 50)).why == "cost"


def test_a_home_that_is_late_is_left_for_a_group_in_time():
    fleet = Fleet(2, "prefix", max_ttft_s=2.0)
    fleet.hold(0, prompt(1))
    fleet.load(0, rate=1000.0, running=1, queued_prefill_tokens=5000)
    fleet.load(1, rate=1000.0, running=1)
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.why) == (1, "limit")


def test_an_idle_group_is_given_a_chance_whatever_is_believed_of_it():
    fleet = Fleet(1, max_ttft_s=1.0)
    fleet.load(0, rate=1.0)
    assert fleet.place(prompt(1)).wait_s == 1000.0


def test_a_group_that_says_how_fast_it_starts_is_given_no_more_than_it_can_do_in_time():
    router = Router("cost", max_ttft_s=1.0, draw=random.Random(0))
    member = router.join("g")
    member.welcome(INFO, "life")
    member.report(Stats(prefill_rate=1000.0, **FREE), 0, 0.0)
    with pytest.raises(OverloadedError, match=r"about 1.0 s"):
        router.place(request(prompt(1, 1000)), [member], 0.1)
    assert router.place(request(prompt(2, 600)), [member], 0.2).wait_s == 0.6
    with pytest.raises(OverloadedError):
        router.place(request(prompt(3, 600)), [member], 0.3)
    other = router.join("slow to start")
    other.welcome(INFO, "life")
    other.report(Stats(prefill_rate=1.0, **FREE), 0, 0.0)
    # soon it is tried all the same
    assert router.place(request(prompt(1, 1000)), [other], MEMORY_S + 0.1).member is other
    other.report(Stats(prefill_rate=5000.0, **FREE), 0, MEMORY_S + 1)
    assert other.wait(1000) == 0.4  # as much is before it


def test_sessions_stick_while_that_is_good_for_them():
    fleet = Fleet(4)
    first = fleet.place(prompt(1), session="s")
    for number in range(2, 8):
        assert fleet.place(prompt(number), session="s").member is first.member
    for number in range(4):
        fleet.load(number, rate=10_000.0)
    fleet.load(fleet.number(first), rate=100.0, queued_prefill_tokens=10_000, prefills=10)
    moved = fleet.place(prompt(9), session="s")
    assert moved.member is not first.member
    assert fleet.place(prompt(10), session="s").member is moved.member
    fleet.members.remove(moved.member)
    fleet.place(prompt(11), session="s")


@pytest.mark.parametrize("fields", [{"cache_salt": "other"}, {"adapter": "other"}])
def test_salts_and_adapters_share_nothing(fields):
    fleet = Fleet(2)
    fleet.hold(0, prompt(1))
    assert fleet.place(prompt(1)).cached_tokens == 992
    assert fleet.place(prompt(1), **fields).best_tokens == 0
    fleet.hold(1, prompt(1), salt=fields.get("cache_salt", ""), adapter=fields.get("adapter"))
    assert fleet.place(prompt(1), **fields).cached_tokens == 992


def test_delivered_tokens_are_part_of_the_prompt():
    fleet = Fleet(2)
    fleet.hold(1, prompt(1))
    route = fleet.place(prompt(1)[:600], resume_token_ids=prompt(1)[600:])
    assert (fleet.number(route), route.prompt_tokens, route.cached_tokens) == (1, 1000, 992)


def test_a_group_that_left_touches_not_the_next_one_of_its_number():
    """Its last requests end when another has joined."""
    router = Router("cost")
    old = router.join("old")
    reservation = old.reserve(1000, 10)
    router.leave(old)
    new = router.join("new")
    assert new.group == old.group
    new.serves = True
    kept = new.reserve(70, 1)
    expected = new.prefill_tokens
    old.settle(reservation)
    old.lost()
    assert (new.serves, new.prefill_tokens) == (True, expected)
    new.settle(kept)


def test_groups_of_two_versions_are_compared():
    fleet = Fleet(2)
    other = Fleet(1, info=ModelInfo(name="m", max_model_len=9, vocab_size=9, salt=salted("new"), block_size=32))
    third = fleet.router.join("g2")
    third.welcome(ModelInfo(name="m", max_model_len=9, vocab_size=9, salt=salted("new"), block_size=32), "x")
    fleet.members.append(third)
    assert other.members[0].hasher is not third.hasher
    fleet.hold(1, prompt(1))
    assert fleet.number(fleet.place(prompt(1))) == 1


def test_worse_tiers_have_their_price():
    fleet = Fleet(3)
    fleet.hold(1, prompt(1), "disk")
    fleet.hold(2, prompt(1), "host")
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.cached_tokens) == (2, 0)
    assert route.header().endswith("; wait_s=0.0; below_tokens=992")
    assert route.reservation.tokens == 8 + int(992 * 0.05)
    route.reservation.settle()


def test_reasons():
    fleet = Fleet(2)
    fleet.hold(1, prompt(1)[:800])
    route = fleet.place(prompt(1))
    assert route.header() == (
        "policy=cost; why=home; group=g1; candidates=2; prompt_tokens=1000; cached_tokens=800; best_tokens=800;"
        " queued_tokens=0; wait_s=0.0"
    )


def test_sessions_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("kvasir.cluster.router.MAX_SESSIONS", 5)
    fleet = Fleet(2)
    for number in range(20):
        fleet.place([1], session=str(number))
    assert [*fleet.router._sessions] == [str(number) for number in range(15, 20)]
