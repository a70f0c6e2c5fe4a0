"""Tables: the blocks of sequences, one table per layer group, out of one pool.

Blocks that no later row of a sequence can see are given back as it advances. A hit in the prefix cache needs all blocks
of groups that see everything, and of the others those that the rows behind it will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from kvasir.engine.blocks import ID_BYTES, BlockPool, Changes, ContentId, chain_start, content_ids, token_bytes
from kvasir.engine.layout import Layout, Room
from kvasir.engine.request import Request
from kvasir.engine.sequence import GONE, Sequence

Grown = list[tuple[int, list[int]]]
"""(layer group, blocks appended to its table)"""
HASHED = 64
"""Blocks of a prompt that are hashed together, in half the time: the next ones will be asked for, too."""


class Tables:
    """Keeps `Sequence.blocks` and the pool in step. Not thread-safe, like the scheduler."""

    def __init__(self, pool: BlockPool, layout: Layout, budget: int, salt: bytes) -> None:
        self.pool, self.layout = pool, layout
        self._salt = salt
        self.fresh: list[tuple[int, ContentId]] | None = None
        """Blocks that can be found since it was emptied last; None: nobody wants to know."""
        self.room = Room(layout, pool.block_size, budget)
        self._near = [i for i, group in enumerate(layout.groups) if group.reach is not None]
        self._far = [i for i, group in enumerate(layout.groups) if group.reach is None]

    def match(self, sequence: Sequence, most: int) -> tuple[int, list[list[int]]]:
        """(blocks, tables) of the longest cached prefix, up to `most` blocks; the tables' blocks aren't held yet."""
        count, far = most, {}
        for group in self._far:
            far[group] = self.pool.match(self._key(sequence, i, group) for i in range(count))
            count = len(far[group])
        count = self._match_near(sequence, count, self.pool.knows)
        near = {group: self._seen(sequence, group, count) for group in self._near}
        return count, [far[g][:count] if g in far else near[g] for g in range(len(self.layout.groups))]

    def reach(self, sequence: Sequence, most: int, knows: Callable[[ContentId], bool]) -> int:
        """Blocks of the longest prefix, up to `most`, of which `knows` has all that `keys` lists."""
        count = most
        for group in self._far:
            count = next((i for i in range(count) if not knows(self._key(sequence, i, group))), count)
        return self._match_near(sequence, count, knows)

    def keys(self, sequence: Sequence, count: int) -> list[ContentId]:
        """What the pool knows the blocks by that the rows behind `count` cached blocks see, its head first."""
        return [self._key(sequence, i, group) for i, group in self._places(count)]

    def numbered(self, sequence: Sequence, first: int, count: int) -> list[tuple[int, ContentId]]:
        """Those of `keys` from block `first` on, each with (block - first) * groups + its group."""
        groups = len(self.layout.groups)
        return [((i - first) * groups + g, self._key(sequence, i, g)) for i, g in self._places(count) if i >= first]

    def filled(self, sequence: Sequence) -> list[tuple[int, ContentId]]:
        """(block, what the pool knows it by) of its full, computed blocks in all groups, its head first; GONE ones too."""
        count = sequence.computed // self.pool.block_size
        tables = [*enumerate(sequence.blocks)]
        return [(table[i], self._key(sequence, i, group)) for i in range(count) for group, table in tables]

    def _places(self, count: int) -> Iterator[tuple[int, int]]:
        """(number in the table, group) of these blocks."""
        last = max(0, count * self.pool.block_size - 1)
        firsts = [group.first_seen(last) // self.pool.block_size for group in self.layout.groups]
        return ((i, group) for i in range(count) for group, first in enumerate(firsts) if i >= first)

    def need(self, sequence: Sequence, matched: int) -> int:
        """Blocks that it will take besides `matched` ones per table, before its present tokens are computed."""
        return self.room.blocks(len(sequence.tokens) - matched * self.pool.block_size)

    def due(self, sequence: Sequence) -> int:
        """Blocks that a running sequence will want before it gives any back."""
        if not self._near:
            return len(self._far)
        return max(0, self.room.blocks(len(sequence.tokens) + 1) - len(all_blocks(sequence)))

    def begin(self, sequence: Sequence, tables: list[list[int]]) -> Grown:
        """It starts with these blocks, and takes those of its present tokens in the groups that see everything."""
        for table in tables:
            self.pool.hold(_held(table))
        sequence.blocks = tables
        sequence.near_from = [_holes(table) for table in tables]
        grown = [(group, list(table)) for group, table in enumerate(tables) if table]
        return grown + self._take(sequence, len(sequence.tokens), self._far)

    def lacking(self, sequence: Sequence, tokens: int) -> int:
        """Free blocks that `grow` would take."""
        count, lacking = self._count(tokens), 0
        for table in sequence.blocks:
            if count > len(table):
                lacking += count - len(table)
        return lacking

    def grow(self, sequence: Sequence, tokens: int) -> Grown:
        """Slots for its first `tokens` tokens, in all groups."""
        return self._take(sequence, tokens, range(len(sequence.blocks)))

    def advance(self, sequence: Sequence, before: int) -> None:
        """It has computed more than `before` tokens: full blocks can be found from now on, and what no later row sees
        goes back. The row before the next one counts as later: continuations branch off there."""
        size = self.pool.block_size
        if self.pool.prefix_caching:
            for i in range(before // size, sequence.computed // size):
                for group, table in enumerate(sequence.blocks):
                    key = self._key(sequence, i, group)
                    if self.pool.commit(table[i], key) and self.fresh is not None:
                        self.fresh.append((table[i], key))
        for group in self._near:
            seen = self.layout.groups[group].first_seen(max(0, sequence.computed - 1)) // size
            table, first = sequence.blocks[group], sequence.near_from[group]
            if seen > first:
                self.pool.free(table[first:seen])
                table[first:seen] = [GONE] * (seen - first)
                sequence.near_from[group] = seen

    def fork(self, parent: Sequence, child: Sequence) -> tuple[Grown, list[tuple[int, int]]]:
        """The child shares the parent's full blocks before its last prompt token; (its tables, blocks to copy)."""
        full, inside = divmod(parent.prompt_len - 1, self.pool.block_size)
        own = self.pool.take(len(parent.blocks))
        child.blocks = [table[:full] for table in parent.blocks]
        child.near_from = [min(first, full) for first in parent.near_from]
        for table in child.blocks:
            self.pool.hold(_held(table))
        copies = [(table[full], block) for table, block in zip(parent.blocks, own, strict=True)] if inside else []
        for table, block in zip(child.blocks, own, strict=True):
            table.append(block)
        return [(group, list(table)) for group, table in enumerate(child.blocks)], copies

    def branch(self, parent: Sequence, child: Sequence) -> tuple[Grown, list[tuple[int, int]]]:
        """The child shares what the parent has computed: its full blocks, and a copy of the last one. (Its tables, blocks to
        copy)"""
        full, inside = divmod(parent.computed, self.pool.block_size)
        child.blocks = [table[:full] for table in parent.blocks]
        child.near_from = [min(first, full) for first in parent.near_from]
        for table in child.blocks:
            self.pool.hold(_held(table))
        copies: list[tuple[int, int]] = []
        if inside:
            own = self.pool.take(len(parent.blocks))
            copies = [(table[full], block) for table, block in zip(parent.blocks, own, strict=True)]
            for table, block in zip(child.blocks, own, strict=True):
                table.append(block)
        return self.whole(child), copies

    def inherit(self, parent: Sequence, child: Sequence) -> Grown:
        """The child takes all that the parent has."""
        child.blocks, child.near_from = parent.blocks, parent.near_from
        parent.blocks, parent.near_from = [], []
        return self.whole(child)

    def whole(self, sequence: Sequence) -> Grown:
        """Its tables, for ranks that know nothing of it."""
        return [(group, list(table)) for group, table in enumerate(sequence.blocks)]

    def release(self, sequence: Sequence) -> None:
        """All blocks go back."""
        for table in sequence.blocks:
            self.pool.free(_held(table))
        sequence.blocks, sequence.near_from = [], []

    def drain(self) -> Changes:
        """The pool's `decisive` changes."""
        return self.decisive(self.pool.drain())

    def decisive(self, changes: Changes) -> Changes:
        """Those of the blocks that decide how long a hit is: of one group that sees everything. The near groups' blocks come
        and go behind it."""
        if len(self.layout.groups) == 1 or not changes:
            return changes
        group = self._far[0] if self._far else 0
        end = group.to_bytes(1, "little") if group else b""
        size = ID_BYTES + len(end)
        return {c[:ID_BYTES]: found for c, found in changes.items() if len(c) == size and c.endswith(end)}

    def _take(self, sequence: Sequence, tokens: int, groups: Iterable[int]) -> Grown:
        count, grown = self._count(tokens), []
        for group in groups:
            table = sequence.blocks[group]
            if count > len(table):
                blocks = self.pool.take(count - len(table))
                table += blocks
                grown.append((group, blocks))
        return grown

    def _match_near(self, sequence: Sequence, count: int, knows: Callable[[ContentId], bool]) -> int:
        """The longest prefix of at most `count` blocks of which the near groups have what later rows see."""
        while count and self._near:
            missing = [self._missing(sequence, group, count, knows) for group in self._near]
            worst = min((i for i in missing if i is not None), default=None)
            if worst is None:
                break
            count = worst
        return count

    def _missing(self, sequence: Sequence, group: int, count: int, knows: Callable[[ContentId], bool]) -> int | None:
        """The last block before `count` that the next row sees but that nobody `knows`."""
        size = self.pool.block_size
        first = self.layout.groups[group].first_seen(max(0, count * size - 1)) // size
        for i in range(count - 1, first - 1, -1):
            if not knows(self._key(sequence, i, group)):
                return i
        return None

    def _seen(self, sequence: Sequence, group: int, count: int) -> list[int]:
        """A near group's table when `count` blocks are cached: those that later rows don't see are left out."""
        size = self.pool.block_size
        first = self.layout.groups[group].first_seen(max(0, count * size - 1)) // size if count else 0
        return [GONE] * first + self.pool.match(self._key(sequence, i, group) for i in range(first, count))

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _key(self, sequence: Sequence, block: int, group: int) -> ContentId:
        """What the pool knows a full block of the sequence by; its tokens are hashed once for all groups."""
        size, contents = self.pool.block_size, sequence.contents
        while len(contents) <= block:
            first = len(contents)
            stop = max(block + 1, min(first + HASHED, sequence.prompt_len // size))
            before = contents[-1] if contents else self.chain(sequence)
            contents += content_ids(before, token_bytes(sequence.tokens[first * size : stop * size]), size)
        return self.name(contents[block], group)

    @staticmethod
    def name(content: ContentId, group: int) -> ContentId:
        """What the pool knows the block of a layer group by."""
        return content if not group else content + group.to_bytes(1, "little")

    def chain(self, sequence: Sequence) -> ContentId:
        """What stands before its first block."""
        request: Request = sequence.request
        return chain_start(self._salt, request.cache_salt, request.adapter, sequence.stretched)


def all_blocks(sequence: Sequence) -> set[int]:
    """Every block it holds."""
    return set(_held(chain.from_iterable(sequence.blocks)))


def _held(table: Iterable[int]) -> list[int]:
    return [block for block in table if block != GONE]


def _holes(table: list[int]) -> int:
    return sum(block == GONE for block in table)
