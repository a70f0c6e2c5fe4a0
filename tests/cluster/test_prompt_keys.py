"""A prompt's keys: those of its blocks, however much of it was seen before, and no more hashed than somebody asks for."""

from __future__ import annotations

import random
from itertools import chain, islice

import pytest

from kvasir.cluster import prompt_keys
from kvasir.cluster.directory import key_list
from kvasir.cluster.prompt_keys import BLOCKS, Hasher
from kvasir.engine import block_ids
from kvasir.engine.blocks import chain_start, content_ids, token_bytes
from kvasir.engine.request import Request, SamplingParams

SALT, SIZE = b"s" * 16, 4


def request(tokens: list[int], resumed: list[int] | None = None) -> Request:
    return Request(
        request_id="r", prompt_token_ids=tokens, sampling=SamplingParams(), resume_token_ids=resumed or []
    )  # fmt: skip


def wanted(tokens: list[int]) -> list[int]:
    """Keys of all blocks that leave one token."""
    whole = (len(tokens) - 1) // SIZE * SIZE
    return key_list(content_ids(chain_start(SALT, "", None, False), token_bytes(tokens[:whole]), SIZE))


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def hasher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hasher:
    if not request.param:
        monkeypatch.setattr(block_ids, "_compiled", lambda: None)
    elif block_ids.loading().result() is None:
        pytest.skip("there is no C++ compiler")
    return Hasher(SALT, SIZE)


@pytest.mark.parametrize("seed", range(4))
def test_keys_are_those_of_the_blocks(hasher: Hasher, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that continue others, at any length, with a memory that forgets."""
    monkeypatch.setattr(prompt_keys, "MEMORY", 6)
    draw, known = random.Random(seed), [list[int]()]
    for _ in range(25):
        head = draw.choice(known)
        tokens = head[: draw.randrange(len(head) + 1)]
        tokens += [draw.randrange(3) for _ in range(draw.randrange(1, 4 * BLOCKS * SIZE))]
        keys = hasher.prompt(request(tokens))
        for _ in range(2):
            assert [*chain.from_iterable(keys)] == wanted(tokens)
        assert all(len(portion) == BLOCKS for portion in [*keys][:-1])
        known.append(tokens)
    assert len(hasher.memory) <= 6


def test_delivered_tokens_count(hasher: Hasher) -> None:
    tokens = [*range(50)]
    assert [*chain.from_iterable(hasher.prompt(request(tokens[:20], tokens[20:])))] == wanted(tokens)


def test_no_more_is_hashed_than_is_asked_for(hasher: Hasher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt whose beginning nobody has, one portion; then the rest in one call, less what was seen before."""
    calls: list[int] = []
    hashed = prompt_keys.hashed
    monkeypatch.setattr(prompt_keys, "hashed", lambda *args: calls.append(len(args[1]) // (4 * SIZE)) or hashed(*args))
    tokens = [*range(SIZE * BLOCKS * 5)]
    keys = hasher.prompt(request(tokens))
    assert len([*islice(keys, 1)]) == 1
    assert calls == [BLOCKS]
    assert len([*keys]) == 5
    assert calls == [BLOCKS, 4 * BLOCKS - 1]
    other = [*tokens[: 2 * BLOCKS * SIZE], *tokens]
    assert [*chain.from_iterable(hasher.prompt(request(other)))] == wanted(other)
    assert calls[2:] == [5 * BLOCKS - 1]
