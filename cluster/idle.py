"""Idle: lets work through that nobody waits for, as far as a model's seats aren't wanted by others."""

from __future__ import annotations

import asyncio
from collections import Counter

from kvasir.cluster.desk import Desk
from kvasir.cluster.service_fields import of_batch
from kvasir.engine.scheduler import Stats

RESERVE = 8
"""One seat in so many stays free: whoever comes next doesn't wait for a line of a batch to end."""
LOOK_S = 0.02


class Idle:
    """Counts what it let through to each model."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._inside: Counter[str] = Counter()
        self._told: dict[str, list[Stats]] = {}
        self._theirs: dict[str, int] = {}
        """Requests of other gateways when their groups last reported."""

    async def enter(self, model: str) -> None:
        """Wait until `model` has room, and take some of it until `leave`."""
        while self._inside[model] >= max(
            1, self._room(model)
        ):  # one at least: a model that is always busy is no excuse
            await asyncio.sleep(LOOK_S)
        self._inside[model] += 1

    def leave(self, model: str) -> None:
        self._inside[model] -= 1

    def _room(self, model: str) -> int:
        """Seats that others leave, in all groups."""
        ours = self._desk.priorities(self._desk.model(model))
        seats, told = 0, []
        for client in self._desk.directory.clients(model):
            if client.info is not None and client.stats is not None:
                seats += client.info.max_num_seqs - client.info.max_num_seqs // RESERVE
                told.append(client.stats)
        if self._told.get(model) != told:  # reports are older than what we have begun since
            self._told[model] = told
            self._theirs[model] = max(0, sum(stats.running + stats.waiting for stats in told) - len(ours))
        return seats - self._theirs[model] - sum(not of_batch(priority) for priority in ours)
