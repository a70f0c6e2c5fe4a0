"""BlockJournal: the group's numbered account of the blocks that it holds, for gateways to follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from kvasir.engine.blocks import Changes, ContentId, Tier
from kvasir.proto import group_pb2 as pb

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
MAX_IDS = 65536
"""Content ids in one message: 1 MiB."""


class BlockJournal:
    """Take changes in, give messages out: those of `flush` to every gateway, those of `snapshot` behind them to one."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._number = 0
        self._held: dict[Tier, set[ContentId]] = {tier: set() for tier in TIERS}
        self._pending: dict[Tier, dict[ContentId, bool]] = {tier: {} for tier in TIERS}

    def take(self, tier: Tier, changes: Changes) -> None:
        """Note what the engine reports."""
        held, pending = self._held[tier], self._pending[tier]
        for content, findable in changes.items():
            if findable == (content in held):  # it is back before anybody heard that it went, or the other way round
                pending.pop(content, None)
            else:
                pending[content] = findable

    def flush(self) -> list[pb.Blocks]:
        """What changed since the last time, as changes with the next numbers."""
        messages = []
        for tier in TIERS:
            pending, self._pending[tier] = self._pending[tier], {}
            for part in _portions([*pending]):
                self._number += 1
                stored = [content for content in part if pending[content]]
                evicted = [content for content in part if not pending[content]]
                self._held[tier].update(stored)
                self._held[tier].difference_update(evicted)
                blocks = pb.TierBlocks(tier=tier, stored=b"".join(stored), evicted=b"".join(evicted))
                messages.append(pb.Blocks(incarnation=self._incarnation, number=self._number, tiers=[blocks]))
        return messages

    def snapshot(self) -> list[pb.Blocks]:
        """All that is held as of the last `flush`, in parts; one at least."""
        tiers = [
            pb.TierBlocks(tier=tier, stored=b"".join(part)) for tier in TIERS for part in _portions([*self._held[tier]])
        ]
        count = max(1, len(tiers))
        life, number = self._incarnation, self._number
        return [
            pb.Blocks(incarnation=life, number=number, part=i + 1, parts=count, tiers=tiers[i : i + 1])
            for i in range(count)
        ]


def _portions(ids: Sequence[ContentId]) -> Iterator[list[ContentId]]:
    source = iter(ids)
    while part := list(islice(source, MAX_IDS)):
        yield part
