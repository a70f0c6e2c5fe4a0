"""Exchange: a rank's part in fetching blocks from other groups and lending them its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvasir.engine.arrivals import Arrivals
from kvasir.engine.blocks import ContentId
from kvasir.engine.cache import KVCache
from kvasir.engine.channels import node
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.lender import Lender, OnAsk
from kvasir.engine.lends import Terms
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.parts import Form, Part
from kvasir.engine.puller import STAGED_BYTES, Puller
from kvasir.engine.share import Share, share_of
from kvasir.engine.step import Moves


class Exchange:
    """Made by every rank of a group that takes part. mark: of everything that blocks depend on besides tokens."""

    def __init__(
        self,
        config: EngineConfig,
        share: Share,
        cache: KVCache,
        mark: bytes,
        read_below: Callable[[ContentId, memoryview], bool],
    ) -> None:
        self._mark, self._cache = mark, cache
        self._parts = parts(share, config)
        self._ways = ways(config, on_gpu=cache.arena.is_cuda)
        rank = share.mesh.place.rank
        self.form = form_of(cache, self._parts[rank])
        self.lender = Lender(cache, self.form, rank, read_below)
        device = cache.arena.device
        self.puller = Puller(mark, self.form, cache.layout.groups, self._parts, rank, self._ways, device)
        self.arrivals = Arrivals(cache, self.puller, share.layers, share.mesh)

    @property
    def most_pulled(self) -> int:
        """Blocks that one fetch may bring."""
        return max(1, STAGED_BYTES // self.form.block_bytes)

    def listen(self, host: str, secret: str, on_ask: OnAsk | None = None) -> str:
        """Lend from now on -> where, HOST:PORT."""
        return self.lender.listen(host, secret, on_ask)

    def terms(self, addresses: Sequence[str]) -> Terms:
        """What rank 0 tells who asks; addresses of all ranks."""
        forms = [form_of(self._cache, part) for part in self._parts]
        return Terms(self._mark, forms, addresses, node(), self._ways)

    @torch.inference_mode()
    def apply(self, moves: Moves) -> None:
        """A step's part."""
        if moves.landing:
            self.arrivals.expect()
        for ticket in dict.fromkeys(ticket for ticket, _, _ in moves.loads):
            rows = self.puller.rows(ticket)
            if rows is None:
                continue
            mine = [(number, block) for found, number, block in moves.loads if found == ticket]
            if self.puller.is_coming(ticket):
                self.arrivals.begin(ticket, rows, mine)
            else:
                self._cache.put([block for _, block in mine], rows, [number for number, _ in mine])
        self.lender.take(moves.lends)
        for ticket in set(moves.ended) - self.arrivals.tickets:
            self.puller.end(ticket)
        for pull in moves.pulls:
            self.puller.start(pull)

    def close(self) -> None:
        """No more."""
        self.puller.close()
        self.lender.close()


def parts(share: Share, config: EngineConfig) -> list[Part]:
    """What each rank of the group keeps."""
    place, found = share.mesh.place, []
    for rank in range(place.size):
        mesh = Mesh(Place(place.tp, place.pp, rank))
        each = share_of(share.full, mesh, partition=config.pipeline_layer_partition)
        found.append(Part(each.layers, range(1) if share.full.latent else each.kv_heads))
    return found


def form_of(cache: KVCache, part: Part) -> Form:
    """How the blocks of the rank that keeps `part` lie in its memory."""
    groups = tuple(group.layers for group in cache.layout.groups)
    sizes = cache.kinds, cache.block_size, cache.slot_bytes, cache.scale_bytes
    return Form(part, groups, cache.layout.height, *sizes)


def ways(config: EngineConfig, *, on_gpu: bool) -> tuple[str, ...]:
    """By which this group sends and takes blocks, the fastest first. ConfigError when it can't by what is configured."""
    way = config.kv_transfer
    if way == "auto":
        return ("shm", "tcp") if node() else ("tcp",)
    if way == "nixl":
        from kvasir.engine.nixl_channel import agent

        agent("lend")
    if way == "shm" and not node():
        raise ConfigError(
            "--kv-transfer shm: processes can't hand over memory on this system; use tcp", param="kv_transfer"
        )
    if way == "nccl" and not on_gpu:
        raise ConfigError("--kv-transfer nccl is for GPUs; on a CPU it is gloo", param="kv_transfer")
    return (way,)
