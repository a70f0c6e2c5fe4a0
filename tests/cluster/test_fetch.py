"""What a fetch costs in routing: who is told of whom, when it pays; and which prompts a prefill group computes."""

from __future__ import annotations

import dataclasses
import random

import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.fetch import MAX_PEERS
from kvasir.cluster.router import Router
from kvasir.engine.block_ids import loading
from kvasir.engine.blocks import chain_start, content_ids, salted, token_bytes
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import PoolingParams, Request, SamplingParams
from kvasir.engine.scheduler import Stats

INFO = ModelInfo(name="m", max_model_len=2**20, vocab_size=2**17, salt=salted("m"), max_num_seqs=64, block_bytes=16_000)
BYTES = 1000
"""A token's."""


def prompt(number, length=1000):
    return random.Random(number).choices(range(2**17), k=length)


class Fleet:
    """Groups that serve blocks, behind a router."""

    def __init__(self, count, *, serving=True, policy="cost", roles=(), sizes=()):
        """sizes: of the first groups' blocks, 16 by default."""
        self.infos = [dataclasses.replace(INFO, block_size=size, block_bytes=BYTES * size) for size in sizes]
        self.infos += [INFO] * (count - len(sizes))
        self.router = Router(policy, draw=random.Random(0))
        kv = [(f"host:{n}", f"secret {n}") if serving else ("", "") for n in range(count)]
        self.members = [self.router.join(f"g{n}", kv[n]) for n in range(count)]
        for number, member in enumerate(self.members):
            self.welcome(member, f"life {number}", self.infos[number])
            self.load(number)
        for member, role in zip(self.members, roles, strict=False):
            member.role = role

    def welcome(self, member, life, info=INFO):
        member.welcome(info, life)
        member.rate = 10_000.0
        self.tell(member, BlockJournal(life).snapshot())

    def tell(self, member, messages):
        for message in messages:
            member.blocks(message)

    def load(self, number, **stats):
        stats = {"prefills": 1 if stats.get("queued_prefill_tokens") else 0, "free_blocks": 10_000, **stats}
        measured = {"fetch_floor_s": 0.002, "fetch_bytes_per_s": 100e6}
        self.members[number].report(Stats(**{**measured, **stats}), 0, 0.0)

    def hold(self, number, tokens):
        info = self.infos[number]
        ids = content_ids(chain_start(info.salt, "", None, False), token_bytes(tokens), info.block_size)
        keys = [int.from_bytes(one[:8], "little") for one in ids]
        self.router.directory.change(self.members[number].group, "device", keys, ())

    def place(self, tokens, among=None, source=None, **fields):
        asked = Request(request_id="r", prompt_token_ids=tokens, sampling=SamplingParams(), **fields)
        members = self.members if among is None else [self.members[number] for number in among]
        return self.router.place(asked, members, 0.0, "", source)

    def number(self, route):
        return self.members.index(route.member)


def test_a_busy_home_lends_its_blocks():
    fleet = Fleet(3)
    fleet.hold(1, prompt(1))
    fleet.load(1, queued_prefill_tokens=20_000, prefills=20)
    route = fleet.place(prompt(1) + prompt(2))
    assert fleet.number(route) in (0, 2)
    assert (route.fetched_tokens, route.cached_tokens, route.peer_name) == (992, 0, "g1")
    assert [(peer.address, peer.secret, peer.tokens, peer.ordered) for peer in route.peers] == [
        ("host:1", "secret 1", 992, False)
    ]
    assert route.reservation.tokens == 1008 + int(0.002 * 10_000 + 992 * BYTES / 100e6 * 10_000)
    assert route.header().endswith("; peer=g1; fetched_tokens=992")
    assert (route.facts()["peer"], route.facts()["fetched_tokens"]) == ("g1", 992)


def test_what_is_at_home_is_not_fetched():
    fleet = Fleet(2)
    fleet.hold(1, prompt(1))
    fleet.hold(0, prompt(1)[:500])
    route = fleet.place(prompt(1))
    assert (fleet.number(route), route.peers, route.fetched_tokens) == (1, (), 0)


@pytest.mark.parametrize("floor", [0.002, 0.09, 0.2])
@pytest.mark.parametrize("speed", [100e6, 11e6, 5e6])
def test_fetching_has_to_beat_computing(floor, speed):
    """992 tokens take 99 ms to compute."""
    fleet = Fleet(2)
    fleet.hold(1, prompt(1))
    fleet.load(0, fetch_floor_s=floor, fetch_bytes_per_s=speed)
    route = fleet.place(prompt(1), among=[0])
    price = floor + 992 * BYTES / speed
    assert bool(route.peers) == (price < 0.0992)
    assert route.reservation.tokens == pytest.approx(8 + min(992, price * 10_000), abs=1)


def test_figures_of_its_like_until_it_has_its_own():
    fleet = Fleet(3)
    fleet.load(0, fetch_floor_s=0.05, fetch_bytes_per_s=50e6)
    fleet.load(1, fetch_floor_s=0.0, fetch_bytes_per_s=0.0)
    assert fleet.members[1].fetch_price(0) == pytest.approx(500)
    assert fleet.members[1].fetch_price(100) == pytest.approx(500 + 100 * BYTES / 50e6 * 10_000)


def test_who_cannot_serve_is_no_peer():
    fleet = Fleet(3, serving=False)
    fleet.hold(1, prompt(1))
    assert not fleet.place(prompt(1), among=[0, 2]).peers
    fleet = Fleet(3)
    fleet.hold(1, prompt(1))
    fleet.hold(2, prompt(1)[:640])
    assert [peer.tokens for peer in fleet.place(prompt(1), among=[0]).peers] == [992, 640]
    fleet.members[1].lost()
    assert [peer.tokens for peer in fleet.place(prompt(1), among=[0]).peers] == [640]


def test_the_longest_and_then_the_least_loaded_come_first():
    fleet = Fleet(6)
    for number, length in enumerate((0, 800, 1000, 1000, 900, 700)):
        fleet.hold(number, prompt(1)[:length])
    fleet.load(2, running=5)
    route = fleet.place(prompt(1), among=[0])
    assert [peer.address for peer in route.peers] == ["host:3", "host:2", "host:4"]
    assert len(route.peers) == MAX_PEERS


def test_a_move_fetches_from_where_it_ran():
    """The group has just computed the blocks; the directory doesn't know yet."""
    fleet = Fleet(3)
    route = fleet.place(prompt(1), among=[1, 2], source=fleet.members[0], resume_token_ids=prompt(2)[:30])
    assert [(peer.address, peer.tokens, peer.ordered) for peer in route.peers] == [("host:0", 1024, True)]
    assert (route.peer_name, route.fetched_tokens) == ("g0", 1024)


def test_a_group_that_left_lends_nothing_and_its_number_belongs_to_the_next():
    fleet = Fleet(3)
    gone = fleet.members[0]
    fleet.router.leave(gone)
    assert not fleet.place(prompt(1), among=[1, 2], source=gone).peers
    new = fleet.members[0] = fleet.router.join("g3", ("host:3", "secret 3"))
    assert new.group == gone.group
    fleet.welcome(new, "life 3")
    fleet.load(0)
    assert not fleet.place(prompt(1), among=[1, 2], source=gone).peers
    assert [peer.address for peer in fleet.place(prompt(1), among=[1, 2], source=new).peers] == ["host:3"]


@settings(max_examples=examples(100))
@given(data=st.data())
def test_prices_are_right_whatever_is_held(data):
    """Against a brute-force model: nobody pays more than for computing, and whoever is told of holds what is said."""
    count = data.draw(st.integers(1, 6))
    fleet = Fleet(count, policy=data.draw(st.sampled_from(["cost", "prefix"])))
    held = {}
    for number in range(count):
        held[number] = data.draw(st.integers(0, 62)) * 16
        fleet.hold(number, prompt(1)[: held[number]])
        figures = {
            "fetch_floor_s": data.draw(st.floats(1e-4, 0.2)),
            "fetch_bytes_per_s": data.draw(st.floats(1e6, 1e9)),
        }
        fleet.load(number, queued_prefill_tokens=data.draw(st.integers(0, 5000)), **figures)
    down = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    for number in down:
        fleet.members[number].lost()
    route = fleet.place(prompt(1))
    number = fleet.number(route)
    best = max((held[other] for other in range(count) if other not in down), default=0)
    lacking, stats = best - held[number], route.member.stats
    price = (stats.fetch_floor_s + lacking * BYTES / stats.fetch_bytes_per_s) * route.member.speed
    pays = lacking > 0 and price < lacking
    assert route.cached_tokens == held[number]
    assert route.fetched_tokens == (lacking if pays else 0)
    assert route.reservation.tokens == pytest.approx(1000 - held[number] - (lacking - price if pays else 0), abs=1)
    assert [peer.tokens for peer in route.peers] == (
        sorted((h for o, h in held.items() if o not in down and h > held[number]), reverse=True)[:MAX_PEERS]
        if pays
        else []
    )


@pytest.mark.parametrize("compiled", [True, False])
def test_groups_of_other_block_sizes_lend_and_fetch(compiled, monkeypatch):
    """Each is known by its own blocks, all counts are of tokens."""
    if not compiled:
        monkeypatch.setattr("kvasir.engine.block_ids._compiled", lambda: None)
    elif loading().result() is None:
        pytest.skip("there is no C++ compiler")
    fleet = Fleet(3, sizes=(32, 16, 64))
    fleet.hold(0, prompt(1))
    fleet.hold(1, prompt(1)[:640])
    route = fleet.place(prompt(1), among=[2])
    assert [(peer.address, peer.tokens) for peer in route.peers] == [("host:0", 992), ("host:1", 640)]
    assert (route.cached_tokens, route.fetched_tokens, route.best_tokens) == (0, 992, 0)
    assert fleet.place(prompt(1), among=[1]).fetched_tokens == 352
    here = fleet.place(prompt(1))
    assert (fleet.number(here), here.cached_tokens, here.peers) == (0, 992, ())
    moved = fleet.place(prompt(2), among=[1, 2], source=fleet.members[0])
    assert [(peer.tokens, peer.ordered) for peer in moved.peers] == [(992, True)]


# -- roles


def test_long_prompts_are_computed_by_a_prefill_group_and_short_ones_where_they_decode():
    fleet = Fleet(3, roles=("prefill", "decode", "decode"))
    for number in (1, 2):
        fleet.load(number, running=20)
    route = fleet.place(prompt(1, 8000))
    assert (fleet.number(route), route.why, route.facts()["role"]) == (0, "split", "prefill")
    route.reservation.settle()
    route = fleet.place(prompt(1, 30))
    assert (fleet.number(route) in (1, 2), route.facts()["role"]) == (True, "decode")
    fleet.hold(1, prompt(2, 8000)[:7900])
    assert fleet.number(fleet.place(prompt(2, 8000))) == 1


def test_who_computes_prompts_hands_over_to_other_block_sizes_and_to_no_other_version():
    fleet = Fleet(2, roles=("prefill", "decode"), sizes=(32, 16))
    fleet.load(1, running=20)
    route = fleet.place(prompt(1, 8000))
    assert (fleet.number(route), route.why) == (0, "split")
    route.reservation.settle()
    fleet.welcome(fleet.members[0], "next life", dataclasses.replace(INFO, version=b"new", salt=b"new" * 5))
    assert fleet.number(fleet.place(prompt(1, 8000))) == 1


def test_a_queue_at_the_prefill_groups_sends_prompts_to_the_others():
    fleet = Fleet(3, roles=("prefill", "decode", "decode"))
    for number in (1, 2):
        fleet.load(number, running=4)
    found = [fleet.number(fleet.place(prompt(number, 4000))) for number in range(12)]
    assert set(found) == {0, 1, 2}


def test_a_slow_link_keeps_prompts_where_they_decode():
    fleet = Fleet(2, roles=("prefill", "decode"))
    fleet.load(1, running=4, fetch_floor_s=0.1, fetch_bytes_per_s=10e6)
    assert fleet.number(fleet.place(prompt(1, 4000))) == 1


@pytest.mark.parametrize("roles", [("prefill", "prefill"), ("decode", "decode"), ("both", "decode")])
def test_without_one_kind_the_others_do_all(roles):
    fleet = Fleet(2, roles=roles)
    assert {fleet.number(fleet.place(prompt(number, 4000))) for number in range(4)} == {0, 1}


@pytest.mark.parametrize("policy", ["round-robin", "least-load", "prefix", "cost"])
def test_what_goes_on_or_is_no_stream_is_not_split(policy):
    fleet = Fleet(3, roles=("prefill", "decode", "both"), policy=policy)
    for number in range(3):
        fleet.load(number, running=20)
    assert fleet.number(fleet.place(prompt(1, 4000))) == 0
    assert fleet.number(fleet.place(prompt(1, 4000), resume_token_ids=[1])) != 0
    assert fleet.number(fleet.place(prompt(1, 4000), pooling=PoolingParams())) != 0


def test_a_session_is_where_it_decodes():
    fleet = Fleet(3, roles=("prefill", "decode", "decode"))
    for number in (1, 2):
        fleet.load(number, running=20)
    asked = Request(request_id="r", prompt_token_ids=prompt(1, 8000), sampling=SamplingParams())
    assert fleet.router.place(asked, fleet.members, 0.0, "s").member is fleet.members[0]
    moved = dataclasses.replace(asked, resume_token_ids=(1,))
    home = fleet.router.place(moved, fleet.members, 0.0, "s").member
    for number in range(8):
        short = dataclasses.replace(asked, prompt_token_ids=prompt(number, 20))
        route = fleet.router.place(short, fleet.members, 0.0, "s")
        assert (route.member, route.why) == (home, "session")
        route.reservation.settle()
