"""What a request costs at each group is the same by compiled code as by numpy, which defines it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from kvasir.cluster.block_journal import TIERS
from kvasir.cluster.block_tables import Tables
from kvasir.cluster.directory import key_list
from kvasir.cluster.router import Asked, Router
from kvasir.engine import block_ids
from kvasir.engine.blocks import chain_start, content_ids, token_bytes
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Stats

INFO = ModelInfo(name="m", max_model_len=2**17, vocab_size=2**17, salt=b"salt" * 4, block_bytes=16_000)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_costs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups in every state: idle, busy, never measured, that lend or don't, with blocks in any tier; of all or some of them;
    of requests that move away from one of them."""
    if block_ids.loading().result() is None:
        pytest.skip("there is no C++ compiler")
    draw, router = random.Random(seed), Router()
    members = [
        router.join(f"g{n}", ("host:1", "s") if draw.random() < 0.7 else ("", "")) for n in range(draw.randint(1, 90))
    ]
    trunk = [draw.randrange(1000) for _ in range(2000)]
    for number, member in enumerate(members):
        info = replace(INFO, block_size=draw.choice((16, 16, 32)))
        member.welcome(info, str(number))
        member.rate = draw.choice((0.0, 5000.0, draw.uniform(100, 10_000)))
        for tier in TIERS:
            start, tokens = (
                chain_start(info.salt, "", None, False),
                token_bytes(trunk[: draw.choice((draw.randrange(2000), 1952, 1984))]),
            )
            ids = content_ids(start, tokens, info.block_size)
            router.directory.change(member.group, tier, key_list(ids) if draw.random() < 0.5 else (), ())
        queued = draw.choice((0, draw.randrange(20_000)))
        stats = Stats(queued_prefill_tokens=queued, prefills=1 if queued else 0, decode_blocks=draw.randrange(9000))
        if draw.random() < 0.5:
            member.report(stats, 0, 0.0)
        member.reserve(draw.randrange(1000), 3)
        if draw.random() < 0.1:
            member.lost()
    router._pace.rate = draw.choice((0.0, 4000.0))
    for _ in range(20):
        tokens = trunk[: draw.choice((draw.randrange(1, 2000), 2000))] + [
            draw.randrange(1000) for _ in range(draw.randrange(1, 50))
        ]
        request = Request(request_id="r", prompt_token_ids=tokens, sampling=SamplingParams())
        some = draw.sample(members, draw.randint(1, len(members))) if draw.random() < 0.5 else members
        source = draw.choice([None, *members])
        asked = Asked(some, router._lenders.values(), 0)
        one = router._choices(request, asked, len(tokens), source)
        assert one.priced is not None
        with monkeypatch.context() as patch:
            patch.setattr("kvasir.cluster.router.group_costs", lambda *args: None)
            patch.setattr(router, "_costs", None)
            other = router._choices(request, asked, len(tokens), source)
        assert other.priced is None
        mean = router._pace.rate or 1.0
        for name in ("cached", "held", "rest", "fetched"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12)
        np.testing.assert_allclose(one.costs(mean), other.costs(mean), rtol=1e-12)
        assert [one.peers(place) for place in range(len(some))] == [other.peers(place) for place in range(len(some))]
        assert one.best == other.best
        homes = one.home(mean), other.home(mean)
        assert homes[0] == homes[1] or (
            None not in homes and np.ptp(one.costs(mean)[[*homes]]) < 1e-9 * one.costs(mean).max()
        ), "another home, and not one of two that cost the same"
        half = [*range(0, len(some), 2)]
        np.testing.assert_allclose(one.only(half).costs(mean), other.only(half).costs(mean), rtol=1e-12)


def test_without_a_compiler_numpy_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_ids, "_compiled", lambda: None)
    router = Router()
    member = router.join("g")
    member.welcome(INFO, "g")
    request = Request(request_id="r", prompt_token_ids=[*range(100)], sampling=SamplingParams())
    assert router.place(request, [member], 0.0).prompt_tokens == 100
    assert router._costs is None
    assert isinstance(router.directory._tables, Tables)
