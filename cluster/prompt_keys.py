"""A request's blocks as the directory knows them, by the hash that the engine uses. Hashed only as far as somebody asks.

Hashing 8,000 tokens takes 62 us by compiled code, and three times that without. What follows what was seen before, a
conversation's past or a system prompt, is remembered by a hash of its tokens, which takes 10 us: here by Python's, where there
is no compiler; else the directory's compiled code does both, and looks up who holds the blocks. As with keys, a false match
costs a request speed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvasir.cluster.block_tables import Key
from kvasir.engine.block_ids import hashed, words
from kvasir.engine.blocks import ID_BYTES, ContentId, chain_start
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request

BLOCKS = 64
"""A portion: blocks that are hashed and remembered together."""
MEMORY = 4096
"""Portions remembered: with blocks of 16 tokens 4 M tokens, about 5 MB."""

Known = tuple[ContentId, Sequence[Key]]
"""Of a portion: (id of the last block, keys of all)"""
Memory = OrderedDict[tuple[ContentId, int], Known]
"""(id before, hash of the tokens) -> portion"""


@dataclass(slots=True, eq=False)
class Hasher:
    """Groups with the same salt, block size and stretch_len give the same ids to the same prompts."""

    salt: ContentId
    block_size: int
    stretch_len: int | None = None
    memory: Memory = field(default_factory=OrderedDict)

    def prompt(self, request: Request) -> PromptKeys:
        """The request's full blocks; one token at least stays outside, since its row is always computed."""
        ids = request.prompt_token_ids
        if request.resume_token_ids:
            ids = [*ids, *request.resume_token_ids]
        stretched = self.stretch_len is not None and len(ids) > self.stretch_len
        start = chain_start(self.salt, request.cache_salt, request.adapter, stretched)
        return PromptKeys(self, ids, start, (len(ids) - 1) // self.block_size if self.salt else 0)

    def remember(self, probe: tuple[ContentId, int], ids: bytes) -> Known:
        """A portion. What was seen least lately is forgotten for it."""
        known = self.memory[probe] = ids[-ID_BYTES:], memoryview(ids).cast("Q")[::2]
        if len(self.memory) > MEMORY:
            self.memory.popitem(last=False)
        return known


class Hashers:
    """One for each kind of group; there are several while an update is rolling."""

    def __init__(self) -> None:
        self._known: dict[tuple[ContentId, int, int | None], Hasher] = {}

    def of(self, info: ModelInfo) -> Hasher:
        facts = (info.salt, info.block_size, info.stretch_len)
        return self._known.setdefault(facts, Hasher(*facts))


class PromptKeys:
    """Iterate, as often as you like, for the keys in portions: what nobody asks for isn't hashed."""

    def __init__(self, hasher: Hasher, token_ids: Sequence[int], start: ContentId, blocks: int) -> None:
        self._hasher, self._last = hasher, start
        self.token_ids = token_ids if isinstance(token_ids, list) else [*token_ids]
        self.start, self.blocks, self.block_size = start, blocks, hasher.block_size
        self._tokens = b""
        self._ahead, self._ahead_from = b"", 0
        """Ids that were hashed, from this block on."""
        self._portions: list[Sequence[Key]] = []

    def __iter__(self) -> Iterator[Sequence[Key]]:
        number = 0
        while number * BLOCKS < self.blocks:
            if number == len(self._portions):
                self._last, keys = self._portion(number * BLOCKS, min(self.blocks, (number + 1) * BLOCKS))
                self._portions.append(keys)
            yield self._portions[number]
            number += 1

    def _portion(self, first: int, last: int) -> Known:
        """Of the blocks from `first` on, before which all are known."""
        size, hasher = self._hasher.block_size, self._hasher
        self._tokens = self._tokens or words(self.token_ids)
        probe = self._last, hash(self._tokens[4 * size * first : 4 * size * last])
        if (found := hasher.memory.get(probe)) is not None:
            hasher.memory.move_to_end(probe)
            return found
        if first >= self._ahead_from + len(self._ahead) // ID_BYTES:
            end = self.blocks if first else last  # somebody has the beginning: the rest is hashed in one call
            self._ahead, self._ahead_from = (
                hashed(self._last, self._tokens[4 * size * first : 4 * size * end], size),
                first,
            )
        start = self._ahead_from
        return hasher.remember(probe, self._ahead[(first - start) * ID_BYTES : (last - start) * ID_BYTES])
