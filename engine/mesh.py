"""Mesh: a rank's place among the ranks that hold one model, and how it exchanges tensors with them.

Ranks are numbered stage by stage: rank = stage * tp + tp_rank. Tensor-parallel ranks hold slices of the same layers and
add up their partial results (Shoeybi et al. 2019, arXiv:1909.08053); stages hold consecutive layers and hand on the
hidden states (Huang et al. 2018, arXiv:1811.06965).
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from kvasir.engine.agreement import agreed
from kvasir.engine.hand_over import HandOver, hand_over
from kvasir.engine.interfaces import gloo_interfaces
from kvasir.engine.links import Links
from kvasir.engine.node_links import NodeLinks
from kvasir.engine.outcome import Copy, Patience
from kvasir.engine.symmetric import shared_sum
from kvasir.kernels.node_sums import Meeting


@dataclass(frozen=True)
class Place:
    """Which rank of how many."""

    tp: int = 1
    pp: int = 1
    rank: int = 0
    local_ranks: int = 1
    """Ranks on this node, which share its cores and memory."""
    device_index: int = 0
    """Of the GPU that is this rank's."""

    @property
    def size(self) -> int:
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def first(self) -> bool:
        """It embeds tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """It knows the last hidden states."""
        return self.stage == self.pp - 1

    @property
    def samples(self) -> bool:
        """It is the one rank that has all logits."""
        return self.rank == (self.pp - 1) * self.tp


log = logging.getLogger(__name__)
ALONE = Place()
c10d: Any = torch.distributed  # most of what is used of it has no types
SENDING = 4
"""Tensors on their way to another stage, of which it may not have taken the first: then this one waits, or memory would fill
up."""
LAGGING = ("cuda",)
"""Types of devices on which what is sampled lies until the next step begins; on a CPU the host has it at once."""


@dataclass
class Traffic:
    """What a rank has exchanged: calls, and the bytes that it sent in them."""

    calls: int = 0
    bytes: float = 0

    def note(self, tensor: Tensor, times: float = 1, calls: int = 1) -> None:
        """It was sent so many times in each of so many calls."""
        self.calls += calls
        self.bytes += tensor.nbytes * times * calls


class Nobody:
    """In the place of a process group: exchanges are over at once, and zeros are what other ranks have."""

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> Nobody:
        return self

    def broadcast(self, tensor: Tensor, root: int) -> Nobody:
        return self

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Nobody:
        return self

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Nobody:
        tensors[0].zero_()
        return self

    def _filled(self, into: Tensor, given: Tensor) -> Nobody:
        into.zero_()
        return self

    _allgather_base = _reduce_scatter_base = _filled

    def wait(self) -> None:
        """There is nothing to wait for."""


class OneShot(Protocol):
    """Sums in which every rank reads what every other one has, at once: fewest messages, most bytes. `takes`: whether that
    is faster for x than the process group's; the same on all ranks."""

    def takes(self, x: Tensor) -> bool: ...
    def sum(self, x: Tensor) -> Tensor: ...


class Mesh:
    """`place`, and the process groups that belong to it; without any, every operation is the identity."""

    def __init__(
        self,
        place: Place = ALONE,
        world: Any = None,
        tensor: Any = None,
        links: Links | NodeLinks | None = None,
        device: torch.device = torch.device("cpu"),
        one_shot: OneShot | None = None,
        inward: HandOver | None = None,
        onward: HandOver | None = None,
        store: Any = None,
        patience: Patience | None = None,
        back: Any = None,
    ) -> None:
        self.place, self.links, self.device, self.one_shot = place, links, device, one_shot
        self.patience = patience
        """With this rank's device, whose kernels wait for other ranks'; None: there are none."""
        self.inward, self.onward = inward, onward
        """From the stage before and to the next one, on this node."""
        self.world, self.tensor, self.back = world, tensor, back
        """torch's ProcessGroups of all ranks, of those of this stage, and of those of the first one with the rank that samples."""
        self.invariant = False
        """Whatever it costs, a row's sums and products have the same bits whatever rows are beside it (--deterministic)."""
        self.assemble: Callable[[], None] = lambda: None
        """Waits until every rank calls it, for as long as that takes: the limit of an exchange behind it is for the exchange."""
        self.traffic = Traffic()
        self._store = c10d.HashStore() if store is None else store
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of the stage's partial results x[T, M]; every rank gets the same bits."""
        if self.tensor is None or not x.numel():
            return x
        x = x.contiguous()
        others = self.place.tp - 1
        ordered = self.invariant and self.links is not None  # the ranks' order, however large x is
        if self.invariant and self.place.tp > 2 and (self.one_shot is None or not ordered):
            return self._added_in_order(x)
        if self.one_shot is not None and (ordered or self.one_shot.takes(x)):
            self.traffic.note(x, others)
            return self.one_shot.sum(x)
        self.traffic.note(x, 2 * others / self.place.tp)
        self.tensor.allreduce([x]).wait()
        return x

    def _added_in_order(self, x: Tensor) -> Tensor:
        """The sum as its ranks are numbered, whatever its size: a process group cuts and turns the order by that."""
        whole = x.new_empty(self.place.tp * len(x), *x.shape[1:])
        self.traffic.note(x, self.place.tp - 1)
        self.tensor._allgather_base(whole, x).wait()
        parts: Tensor = whole.view(self.place.tp, *x.shape)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x[tp * R, M] of every rank of the stage -> [R, M], this rank's rows of the sum: half of what `reduce` does."""
        x = x.contiguous()
        own = x.new_empty(len(x) // self.place.tp, *x.shape[1:])
        self.traffic.note(own, self.place.tp - 1)
        if self._direct is not None:
            return self._direct.scatter_sum(x)
        self.tensor._reduce_scatter_base(own, x).wait()
        return own

    def gather_rows(self, x: Tensor) -> Tensor:
        """x[R, M] -> [tp * R, M], the rows of all ranks of the stage in their order: the other half."""
        x = x.contiguous()
        self.traffic.note(x, self.place.tp - 1)
        if self._direct is not None:
            return self._direct.gather_rows(x)
        whole = x.new_empty(len(x) * self.place.tp, *x.shape[1:])
        self.tensor._allgather_base(whole, x).wait()
        return whole

    @property
    def meeting(self) -> Meeting | None:
        """Where this rank meets the others of its stage for every sum; None: they aren't all on one node, or this is off."""
        return self._direct.meeting if isinstance(self._direct, NodeLinks) else None

    @property
    def _direct(self) -> Links | NodeLinks | None:
        """Links that may stand in for the process group."""
        return self.links if self.one_shot is self.links else None

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x[R, W] of every rank of the stage, widths[r] columns of rank r -> [R, sum(widths)] side by side on its first
        rank; what the others get means nothing."""
        if self.tensor is None or not len(x):
            return x.new_empty(len(x), sum(widths)) if self.tensor is not None else x
        own = F.pad(x, (0, max(widths) - x.shape[1])).contiguous()  # equal shapes: that is what collectives take
        self.traffic.note(own, self.place.tp_rank > 0)
        parts = self.links.gather(own) if self.links is not None else self._gather(own, len(widths))
        if self.place.tp_rank:
            return x.new_empty(len(x), sum(widths))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def _gather(self, x: Tensor, size: int) -> Sequence[Tensor]:
        if self.place.tp_rank:
            self.tensor.send([x], 0, 0).wait()
            return []
        parts = [x, *(torch.empty_like(x) for _ in range(1, size))]
        for work in [self.tensor.recv([part], rank, 0) for rank, part in enumerate(parts) if rank]:
            work.wait()
        return parts

    def tell(self, x: Tensor) -> Tensor:
        """x of the stage's first rank, on every rank in the place of what it has."""
        if self.tensor is not None:
            self.traffic.note(x, self.place.tp_rank == 0)
            self.tensor.broadcast(x, 0).wait()
        return x

    def send(self, x: Tensor) -> None:
        """x[T, M] to this rank's like in the next stage, which takes it while this one goes on."""
        x = x.contiguous()
        self.traffic.note(x)
        if self.onward is not None and self.onward.takes(x):
            self.onward.give(x)
            return
        self._make_room()
        self._sending.append((self.world.send([x], self.place.rank + self.place.tp, 0), x))

    def _make_room(self) -> None:
        while len(self._sending) >= SENDING:
            self._sending.popleft()[0].wait()

    def bring_back(self, x: Tensor) -> Any:
        """What was sampled, x[R], from where that is into x on every rank of the first stage, while all go on: whoever reads it
        `wait`s for what this gives. A group of its own, so that it waits for no hidden states."""
        self.traffic.note(x, self.place.samples)
        self._make_room()
        work = self.back.broadcast(x, self.place.tp)
        if self.place.samples:
            self._sending.append((work, x))
        return work

    def receive(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """x[T, M] that the stage before sent."""
        x = torch.empty(rows, width, dtype=dtype, device=device)
        if self.inward is not None and self.inward.takes(x):
            self.inward.take(x)
        else:
            self.world.recv([x], self.place.rank - self.place.tp, 0).wait()
        return x

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Meanwhile this rank computes without the others: what its exchanges give means nothing, and is finite."""
        kept = self.world, self.tensor, self.back, self.links, self.one_shot, self.inward, self.onward
        if self.place.size > 1:
            self.world = self.tensor = self.back = Nobody()
            self.links = self.one_shot = self.inward = self.onward = None
        try:
            yield
        finally:
            self.world, self.tensor, self.back, self.links, self.one_shot, self.inward, self.onward = kept

    def least(self, *values: int) -> list[int]:
        """The least that any rank says, value by value."""
        return self._least(self.world, *values)

    def stage_agrees(self, yes: bool) -> bool:
        """Whether every rank of this stage says so."""
        return self._least(self.tensor, yes) == [1]

    def _least(self, group: Any, *values: int) -> list[int]:
        found = torch.tensor(values, dtype=torch.int64)
        if group is not None:
            options = c10d.AllreduceOptions()
            options.reduceOp = c10d.ReduceOp.MIN
            found = found.to(self.device)
            group.allreduce([found], options).wait()
        return Copy(found, self.patience).values

    def tally(self, name: str, more: int = 0) -> int:
        """What ranks have added to this number, `more` by this one now. Nobody has to take part."""
        count: int = self._store.add(name, more)
        return count

    def forget(self, name: str) -> None:
        """The tally is begun anew."""
        self._store.delete_key(name)

    def abort(self) -> None:
        """Any thread: whatever waits for another rank gets an error, but for kernels that look at nothing but its memory. What
        waits for those does."""
        if self.patience is not None:
            self.patience.end()
        for group in (self.inward, self.onward, self.links, self.tensor, self.back, self.world):
            if group is not None:
                group.abort()

    def close(self) -> None:
        """This rank is done."""
        self.abort()
        if self.links is not None:
            self.links.close()


def join(
    place: Place,
    store: Any,
    device: torch.device,
    host: str,
    timeout_s: float,
    secret: str = "",
    *,
    one_shot: bool = True,
) -> Mesh:
    """Meet the other ranks at `store`, listening on this node's address `host` alone. RuntimeError when they don't come
    within `timeout_s`; an exchange that hangs for so long raises it, too. `secret` is what ranks know each other by.
    Without `one_shot` every sum goes over NCCL or gloo.
    """
    if place.size == 1:
        return Mesh(place)
    tensor = links = None
    direct: OneShot | None = None
    if place.tp > 1:
        stage = c10d.PrefixStore(f"stage {place.stage}", store)
        tensor = process_group(stage, place.tp_rank, place.tp, device, host, timeout_s)
    if place.tp > 1 and device.type == "cpu":
        direct = links = cpu_links(c10d.PrefixStore(f"links {place.stage}", store), place, host, timeout_s, secret)
    elif place.tp > 1 and one_shot:
        shared = c10d.PrefixStore(f"shared {place.stage}", store)
        direct = shared_sum(tensor, shared, place.tp_rank, place.tp, device, host, timeout_s)
    world = process_group(c10d.PrefixStore("world", store), place.rank, place.size, device, host, timeout_s)
    cpu, ends = device.type == "cpu", partial(neighbour, store, place, host, timeout_s)
    inward = ends(gives=False) if cpu and not place.first else None
    onward = ends(gives=True) if cpu and not place.last else None
    back = None
    if place.pp > 1 and device.type in LAGGING and (place.first or place.samples):
        number = place.rank if place.first else place.tp
        back = process_group(c10d.PrefixStore("back", store), number, place.tp + 1, device, host, timeout_s)
        # NCCL connects them at the first exchange, in which all would have to be at once
        back.broadcast(torch.zeros(1, device=device), place.tp).wait()
    return Mesh(
        place,
        world,
        tensor,
        links,
        device,
        direct if one_shot else None,
        inward,
        onward,
        store,
        Patience(timeout_s),
        back,
    )


def neighbour(store: Any, place: Place, host: str, timeout_s: float, *, gives: bool) -> HandOver | None:
    """To this rank's like in the next stage, or from the one before."""
    giver = place.rank if gives else place.rank - place.tp
    return hand_over(c10d.PrefixStore(f"from {giver}", store), host, timeout_s, gives=gives)


def cpu_links(store: Any, place: Place, host: str, timeout_s: float, secret: str) -> Links | NodeLinks:
    """Through shared memory where all ranks of the stage are on one node, else connections."""
    own, size = place.tp_rank, place.tp

    def shared() -> NodeLinks:
        return NodeLinks(store, own, size, timeout_s, place.local_ranks)

    found, why = agreed(shared, store, own, size, host, timeout_s)
    if found is None:
        log.info("sums between ranks go over connections, not through shared memory: %s", why)
    return found or Links(store, own, size, host, timeout_s, secret)


def process_group(store: Any, rank: int, size: int, device: torch.device, host: str, timeout_s: float) -> Any:
    """NCCL's on a GPU, else gloo's. A mesh has its own groups, not torch's default ones, so that a process may hold several
    models."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        nccl = c10d.ProcessGroupNCCL.Options()
        nccl._timeout = 2 * timeout  # then torch ends this process: by that time who waits has been told (`Patience`)
        return c10d.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = c10d.ProcessGroupGloo._Options()
    gloo._timeout = timeout
    gloo._threads = 1  # more of them wait for each other on a busy machine: 4 ms instead of 0.3 for one sum in ten
    gloo._devices = gloo_devices(host)
    return c10d.ProcessGroupGloo(store, rank, size, gloo)


def gloo_devices(host: str) -> list[Any]:
    """By default the interface of this node's address."""
    create = c10d.ProcessGroupGloo.create_device
    return [create(interface=name) for name in gloo_interfaces()] or [create(hostname=host)]


def host_store(host: str, size: int, timeout_s: float) -> tuple[Any, int]:
    """(a store where ranks find each other, its port), listening on `host` alone."""
    listener = socket.create_server((host, 0), backlog=size)
    port: int = listener.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    store = c10d.TCPStore(host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def reach_store(host: str, port: int, size: int, timeout_s: float) -> Any:
    """The same from another rank."""
    return c10d.TCPStore(host, port, size, False, timedelta(seconds=timeout_s), wait_for_workers=False)
