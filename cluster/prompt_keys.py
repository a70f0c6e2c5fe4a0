"""A request's blocks as the directory knows them, by the hash that the engine uses. Hashed only as far as somebody asks.

Hashing 8,000 tokens takes 0.3 ms. What follows what was seen before, a conversation's past or a system prompt, is
remembered by Python's hash of its tokens, which takes a sixth of that. As with keys, a false match costs a request speed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvasir.cluster.directory import Key, key_list
from kvasir.engine.blocks import ContentId, chain_start, content_ids, token_bytes
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request

BLOCKS = 64
"""A portion: blocks that are hashed and remembered together."""
MEMORY = 4096
"""Portions remembered: with blocks of 16 tokens 4 M tokens, about 12 MB."""

Memory = OrderedDict[tuple[ContentId, int], tuple[ContentId, list[Key]]]
"""(id before, hash of the tokens) -> (id of the last block, keys of all)"""


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

    def portion(self, before: ContentId, token_ids: Sequence[int]) -> tuple[ContentId, list[Key]]:
        """(id of the last block, keys) of at most BLOCKS full blocks."""
        probe = before, hash(tuple(token_ids))
        if (found := self.memory.get(probe)) is not None:
            self.memory.move_to_end(probe)
            return found
        ids = content_ids(before, token_bytes(token_ids), self.block_size)
        found = self.memory[probe] = ids[-1], key_list(ids)
        if len(self.memory) > MEMORY:
            self.memory.popitem(last=False)
        return found


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
        self._hasher, self._token_ids, self._last = hasher, token_ids, start
        self._blocks = blocks
        self._portions: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        size, number = self._hasher.block_size, 0
        while number * BLOCKS < self._blocks:
            if number == len(self._portions):
                first, last = number * BLOCKS, min(self._blocks, (number + 1) * BLOCKS)
                self._last, keys = self._hasher.portion(self._last, self._token_ids[first * size : last * size])
                self._portions.append(keys)
            yield self._portions[number]
            number += 1
