"""BlockJournal: the group's numbered account of the blocks that it holds, for gateways to follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from kvasir.engine.blocks import Changes, ContentId, Tier
from kvasir.proto import group_pb2 as pb

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
MAX_IDS = 2048
"""Content ids in one message, 32 KiB. More aren't looked at in one go, which takes a few milliseconds."""
SETS = 1024
"""In so many what a tier holds is dealt out, so that a snapshot can be made little by little."""


class BlockJournal:
    """Take changes in, give messages out: those of `flush` to every gateway, those of `snapshot` to one before any later ones.
    Both are made as they are asked for, and what happens between two of them is no matter."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._number = 0
        self._held: dict[Tier, list[set[ContentId]]] = {tier: [set() for _ in range(SETS)] for tier in TIERS}
        self._told: deque[tuple[Tier, Iterator[tuple[ContentId, bool]]]] = deque()

    def take(self, tier: Tier, changes: Changes) -> None:
        """Note what the engine reports."""
        self._told.append((tier, iter(changes.items())))

    def flush(self) -> Iterator[pb.Blocks]:
        """What changed since the last time, as changes with the next numbers."""
        while self._told:
            pending = self._pending()
            yield from [self._change(tier, changes) for tier, changes in pending.items() if changes]

    def _pending(self) -> dict[Tier, dict[ContentId, bool]]:
        """Of the next MAX_IDS that were told what others have to hear."""
        pending: dict[Tier, dict[ContentId, bool]] = {tier: {} for tier in TIERS}
        left = MAX_IDS
        while self._told and left:
            tier, changes = self._told[0]
            held, news = self._held[tier], pending[tier]
            for content, findable in islice(changes, left):
                left -= 1
                if findable == (content in held[hash(content) % SETS]):
                    news.pop(content, None)  # it is back before anybody heard that it went, or the other way round
                else:
                    news[content] = findable
            if left:
                self._told.popleft()
        return pending

    def _change(self, tier: Tier, changes: dict[ContentId, bool]) -> pb.Blocks:
        self._number += 1
        held = self._held[tier]
        for content, findable in changes.items():
            if findable:
                held[hash(content) % SETS].add(content)
            else:
                held[hash(content) % SETS].discard(content)
        stored = b"".join(content for content, findable in changes.items() if findable)
        evicted = b"".join(content for content, findable in changes.items() if not findable)
        blocks = pb.TierBlocks(tier=tier, stored=stored, evicted=evicted)
        return pb.Blocks(incarnation=self._incarnation, number=self._number, tiers=[blocks])

    def snapshot(self) -> Iterator[pb.Blocks]:
        """All that is held, in parts; one at least. Its number is that of the last change before the first part: whoever takes
        in those that follow has what is held then, whichever of them a part has seen already."""
        count = sum(len(one) for held in self._held.values() for one in held)
        life, number, parts = self._incarnation, self._number, min(SETS, max(1, -(-count // MAX_IDS)))
        for part in range(parts):
            mine = slice(SETS * part // parts, SETS * (part + 1) // parts)
            tiers = [pb.TierBlocks(tier=tier, stored=_joined(self._held[tier][mine])) for tier in TIERS]
            tiers = [blocks for blocks in tiers if blocks.stored]
            yield pb.Blocks(incarnation=life, number=number, part=part + 1, parts=parts, tiers=tiers)


def _joined(sets: Iterable[set[ContentId]]) -> bytes:
    return b"".join(chain.from_iterable(sets))
