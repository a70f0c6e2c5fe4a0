"""The block pool: who holds what, and what can be found."""

from __future__ import annotations

import random

import pytest

from kvasir.engine.blocks import BlockPool, content_id, content_ids, salted, token_bytes
from kvasir.engine.layout import LayerGroup, Layout
from kvasir.engine.tables import Tables


def chain(tokens: list[int], salt: bytes = b"", size: int = 2) -> list[bytes]:
    """Content ids of the full blocks of these tokens."""
    found = [salted(salt)]
    for i in range(0, len(tokens) - size + 1, size):
        found.append(content_id(found[-1], tokens[i : i + size]))
    return found[1:]


def test_ids_depend_on_everything_before_and_on_the_salt() -> None:
    assert chain([1, 2, 3, 4])[1] != chain([9, 2, 3, 4])[1]
    assert chain([1, 2])[0] != chain([1, 2], b"tenant")[0]
    assert chain([1, 2, 3, 4])[0] == chain([1, 2, 5, 6])[0]
    assert len(chain([1, 2])[0]) == 16
    assert salted("ab", "c") != salted("a", "bc")


def test_ids_are_the_same_on_every_machine() -> None:
    assert content_id(salted("x"), [1, 70000]).hex() == "77b84de7c71f12e1382aa797b4ad6ec9"


def test_a_whole_chain_is_what_its_blocks_are() -> None:
    tokens = [random.randrange(2**17) for _ in range(23)]
    for size in (1, 2, 5, 16):
        assert content_ids(salted(b"x"), token_bytes(tokens), size) == chain(tokens, b"x", size)


def test_changes_are_noted_once_somebody_listens() -> None:
    pool = BlockPool(3, 2)
    one, two, three, four = chain([1, 2, 3, 4, 5, 6, 7, 8])
    blocks = pool.take(3)
    pool.commit(blocks[0], one)
    assert pool.drain() == {}
    pool.listen()
    pool.commit(blocks[1], two)
    pool.commit(blocks[2], two)  # a second copy stays private
    assert pool.drain() == {one: True, two: True}
    pool.commit(blocks[2], three)
    pool.free(blocks)
    pool.commit(pool.take(1)[0], four)
    assert pool.drain() == {three: False, four: True}
    assert pool.drain() == {}
    pool.reset()
    assert pool.drain() == {one: False, two: False, four: False}


def test_freed_blocks_stay_findable_until_they_are_reused() -> None:
    pool = BlockPool(4, 2)
    ids = chain([1, 2, 3, 4])
    blocks = pool.take(2)
    for block, content in zip(blocks, ids, strict=True):
        pool.commit(block, content)
    pool.free(blocks)
    assert pool.num_used == 0
    assert pool.match(ids) == blocks
    pool.take(2)  # the two that were never used
    assert pool.match(ids) == blocks
    pool.take(1)
    assert pool.match(ids) == blocks[:1]  # a sequence's tail goes first
    assert not pool.check()


def test_held_blocks_are_shared_and_leave_the_free_list() -> None:
    pool = BlockPool(3, 2)
    ids = chain([1, 2])
    (block,) = pool.take(1)
    pool.commit(block, ids[0])
    pool.hold([block])
    pool.free([block])
    assert pool.num_used == 1
    assert pool.count_free([block]) == 0
    pool.free([block])
    assert pool.count_free([block]) == 1
    pool.hold(pool.match(ids))
    assert pool.num_free == 2
    assert block not in pool.take(2)
    assert not pool.check()


def test_a_duplicate_stays_private() -> None:
    pool = BlockPool(3, 2)
    (content,) = chain([1, 2])
    first, second = pool.take(2)
    pool.commit(first, content)
    pool.commit(second, content)
    assert pool.match([content]) == [first]
    pool.free([second])
    assert pool.match([content]) == [first]
    assert not pool.check()


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(3, 2, prefix_caching=False)
    (content,) = chain([1, 2])
    pool.commit(pool.take(1)[0], content)
    assert pool.match([content]) == []


def test_more_than_there_is() -> None:
    with pytest.raises(AssertionError, match="4 blocks wanted, 3 free"):
        BlockPool(3, 2).take(4)


def test_check_names_what_is_wrong() -> None:
    pool = BlockPool(3, 2)
    (block,) = pool.take(1)
    pool.free([block])
    pool.free([block])
    assert any("holders" in text for text in pool.check())


@pytest.mark.parametrize("seed", range(5))
def test_invariants_hold_whatever_happens(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(20, 2)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            pool.free(held.pop(draw.randrange(len(held))))
        else:
            tokens = [draw.randrange(3) for _ in range(2 * draw.randint(1, 5))]
            ids = chain(tokens)
            found = pool.match(ids)
            if len(ids) - len(found) > pool.num_free - pool.count_free(found):
                continue
            pool.hold(found)
            blocks = found + pool.take(len(ids) - len(found))
            for block, content in zip(blocks[len(found) :], ids[len(found) :], strict=True):
                pool.commit(block, content)
            held.append(blocks)
        assert not pool.check()
    for blocks in held:
        pool.free(blocks)
    assert pool.num_used == 0


def test_of_several_tables_those_blocks_are_told_that_hits_depend_on() -> None:
    pool = BlockPool(10, 2)
    layout = Layout((LayerGroup((0,), window=4), LayerGroup((1,))), 1)
    tables = Tables(pool, layout, 8, b"")
    one, two = chain([1, 2, 3, 4])
    pool.listen()
    for block, content in zip(pool.take(4), (one, one + b"\x01", two, two + b"\x01"), strict=True):
        pool.commit(block, content)
    assert tables.drain() == {one: True, two: True}
    pool.commit(pool.take(1)[0], two)
    assert tables.drain() == {}
