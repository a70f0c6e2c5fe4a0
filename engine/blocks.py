"""BlockPool: who holds which block of the KV cache, and which content a block has (Kwon et al. 2023, arXiv:2309.06180).

A full block's content id is a hash of (the id before it, its tokens); the chain starts from a salt. Freeing a block keeps
its content id: it can be found until it is reused, so eviction is nothing but the order of the free list.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

ContentId = bytes
"""128 bits: equal ids mean equal tokens at equal positions under the same salt."""
ID_BYTES = 16


Tier = Literal["device", "host", "disk"]
"""Where a group holds a block."""
_NO_HASH = hashlib.blake2b(digest_size=16)
Changes = Mapping[ContentId, bool]
"""What became findable in a tier (True) or went from it (False), in the order in which it was touched last."""


def content_id(before: ContentId, token_ids: Sequence[int]) -> ContentId:
    """Id of a full block whose tokens follow the block (or salt) `before`. Stable across processes and machines."""
    return content_ids(before, token_bytes(token_ids), len(token_ids))[0]


def content_ids(before: ContentId, tokens: bytes, block_size: int) -> list[ContentId]:
    """Ids of the full blocks of `token_bytes(...)`, one after the other: what `content_id` gives block by block."""
    copy, stride, found = _NO_HASH.copy, 4 * block_size, []
    for start in range(0, len(tokens) - stride + 1, stride):
        hash_ = copy()  # takes half of the time of a new one
        hash_.update(before + tokens[start : start + stride])
        before = hash_.digest()
        found.append(before)
    return found


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Four bytes a token, as they are hashed."""
    return array("I", token_ids).tobytes()


@lru_cache(maxsize=1024)
def chain_start(salt: ContentId, cache_salt: str, adapter: str | None, stretched: bool) -> ContentId:
    """What stands before a request's first block. salt: the engine's; stretched: the sequence turns by other angles."""
    return salted(salt, cache_salt, adapter or "", "stretched" if stretched else "")


def salted(*parts: str | bytes) -> ContentId:
    """The start of a chain: what must be equal, besides tokens, for blocks to be shared."""
    hash_ = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hash_.update(len(data).to_bytes(8, "little") + data)
    return hash_.digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` slots. A block is free (findable or not) or held by one sequence or more."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._holders = [0] * num_blocks
        self._content: list[ContentId | None] = [None] * num_blocks
        self._found: dict[ContentId, int] = {}
        self._changes: dict[ContentId, bool] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one holder each, the longest unused first; what they held before can't be found any more."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._holders[block] = 1
        return taken

    def match(self, ids: Iterable[ContentId]) -> list[int]:
        """Blocks of the longest known prefix of a chain of content ids. They aren't held yet: see `hold`."""
        matched = []
        for content in ids:
            block = self._found.get(content)
            if block is None:
                break
            matched.append(block)
        return matched

    def knows(self, content: ContentId) -> bool:
        """Some block has this content."""
        return content in self._found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are on the free list, so that holding them takes from it."""
        return sum(1 for block in blocks if not self._holders[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each block; a free one leaves the free list."""
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence, its tail first: heads are found by more requests, so they stay longer."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None

    def commit(self, block: int, content: ContentId) -> bool:
        """The block is full and computed: it can be found. False: a second block of equal content stays private."""
        if not self.prefix_caching or content in self._found:
            return False
        self._found[content] = block
        self._content[block] = content
        if self._changes is not None:
            self._changes[content] = True
        return True

    def listen(self) -> None:
        """Note changes from now on, for `drain`; the first are all that can be found now."""
        self._changes = dict.fromkeys(self._found, True)

    def drain(self) -> Changes:
        """What changed since the last time; nothing when nobody listens."""
        if not self._changes:
            return {}
        changes, self._changes = self._changes, {}
        return changes

    def withdraw(self, blocks: Iterable[int]) -> None:
        """What these hold isn't what it was said to be: it can't be found any more."""
        for block in blocks:
            self._forget(block)

    def reset(self) -> None:
        """Forget all contents; blocks stay with their holders."""
        for block in list(self._found.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._found[content]
            self._content[block] = None
            if self._changes is not None:
                self._changes[content] = False

    def check(self) -> list[str]:
        """Violated invariants in words; empty when all is well."""
        wrong = [f"block {b} has {n} holders" for b, n in enumerate(self._holders) if n < 0]
        wrong += [f"block {b} is free and held" for b in self._free if self._holders[b]]
        wrong += [f"block {b} is lost" for b, n in enumerate(self._holders) if not n and b not in self._free]
        wrong += [f"content of block {b} is elsewhere" for c, b in self._found.items() if self._content[b] != c]
        known = sum(content is not None for content in self._content)
        if known != len(self._found):
            wrong.append(f"{known} blocks have content, {len(self._found)} can be found")
        return wrong
