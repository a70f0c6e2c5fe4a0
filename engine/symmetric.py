"""Sums of a stage's GPUs through memory that all of them see (torch's symmetric memory): one kernel in which each rank reads
what every other one has, instead of NCCL's ring of messages. A decode's sum of 100 kB is all waiting, and waits once here.

Every rank gets the same bits: the kernel adds in the order of the ranks, and where a switch adds (multimem) each row is
added once and told to all.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from kvasir.engine.agreement import agreed, told
from kvasir.kernels.measured import measured

log = logging.getLogger(__name__)
c10d: Any = torch.distributed  # most of what is used of it has no types
inner: Any = torch._C._distributed_c10d

BUFFER = 8 << 20
"""Bytes that each rank shows the others: the largest sum that comes here."""
SETTLE_S, LINK = 5e-6, 450e9
"""Of GPUs behind NVLink: how long they take to wait for each other, and bytes per second, one way."""
TYPES = (torch.bfloat16, torch.float32)
"""What torch's kernels add."""
ALIGNED = 16
SIZES = (2, 4, 8)
"""Ranks for which torch has a one-shot kernel."""


class Memory(Protocol):
    """What one rank shows to all others of its stage; this is all that is used of it."""

    multicast: bool
    """The switch between the GPUs can add."""

    def one_shot(self, x: Tensor) -> Tensor: ...
    def multimem(self, x: Tensor) -> Tensor: ...


class SharedSum:
    """A `mesh.OneShot` of GPUs."""

    def __init__(self, memory: Memory, size: int) -> None:
        default = BUFFER if memory.multicast else one_shot_bytes(size)
        self.most = min(BUFFER, measured_bytes(size, default))
        self._sum = memory.multimem if memory.multicast else memory.one_shot

    def takes(self, x: Tensor) -> bool:
        """Small enough, and of a shape and type that the kernels take."""
        return x.nbytes <= self.most and x.nbytes % ALIGNED == 0 and x.dtype in TYPES

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in the stream of this device."""
        return self._sum(x)


def one_shot_bytes(size: int) -> int:
    """Up to here it is faster to read (size - 1) tensors at once than 2 (size - 1) / size of one in two turns, of which each
    has to be waited for: (size - 1) b / LINK < SETTLE_S + 2 (size - 1) / size * b / LINK."""
    if size <= 2:
        return BUFFER
    return min(BUFFER, int(SETTLE_S * LINK * size / ((size - 1) * (size - 2))))


def measured_bytes(size: int, default: int) -> int:
    """The largest sum over so many GPUs that isn't NCCL's, if it was measured on the very same GPUs: others may be of the same
    capability, but have other links."""
    found = measured()
    if found is None or found.gpu != torch.cuda.get_device_name():
        return default
    return found.sums.get(str(size), default)


def border(size: int) -> str:
    """Up to where sums over so many of this machine's GPUs go through shared memory, and how that is known."""
    most = measured_bytes(size, -1)
    if most < 0:
        return "shared memory up to what the GPUs' links are expected to be good for: not measured on these GPUs"
    return f"shared memory up to {most} bytes, NCCL beyond: measured"


def shared_sum(
    group: Any, store: Any, rank: int, size: int, device: torch.device, host: str, timeout_s: float
) -> SharedSum | None:
    """All ranks of a stage call it. None on all of them where one can't: NCCL does everything then, and the log says why."""
    return agreed_sum(lambda: TorchMemory(group, store, rank, size, device), store, rank, size, host, timeout_s)


def agreed_sum(
    make: Callable[[], Memory], store: Any, rank: int, size: int, host: str, timeout_s: float
) -> SharedSum | None:
    """Over what all ranks can `make`."""
    memory, why = agreed(make, store, rank, size, host, timeout_s)
    if memory is None and rank == 0:
        log.warning("sums between GPUs go over NCCL alone, not through shared memory: %s", why)
    if memory is None:
        return None
    found = SharedSum(memory, size)
    found.most = min(map(int, told(store, "most", rank, size, str(found.most), timeout_s)))  # GPUs may differ
    return found


class TorchMemory:
    """torch's symmetric memory. RuntimeError where these GPUs have no access to each other's memory, or only over the bus:
    more than two of them are slower there than NCCL."""

    def __init__(self, group: Any, store: Any, rank: int, size: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        if size > 2 and torch.cuda.device_count() >= size and not _nvlinks(device.index or 0):
            raise RuntimeError("these GPUs have no NVLink between them")
        # each rank of Ray's sees one GPU, as number 0: torch takes that for one GPU that all of them share
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self._group = registered(group, store, rank, size, device)
        self._name: str = self._group.group_name
        self._buffer = symmetric.empty(BUFFER, dtype=torch.uint8, device=device)
        handle: Any = symmetric.rendezvous(self._buffer, self._name)
        self.multicast = bool(handle.multicast_ptr)
        if not self.multicast and size not in SIZES:
            raise RuntimeError(f"torch has a kernel for 2, 4 or 8 GPUs, not for {size}")

    def one_shot(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(self._view(x), x, "sum", self._name)
        return found

    def multimem(self, x: Tensor) -> Tensor:
        shared = self._view(x).copy_(x)
        torch.ops.symm_mem.multimem_all_reduce_(shared, "sum", self._name)
        return shared.clone()

    def _view(self, x: Tensor) -> Tensor:
        return self._buffer[: x.nbytes].view(x.dtype).view(x.shape)


def registered(group: Any, store: Any, rank: int, size: int, device: torch.device) -> Any:
    """This process group so that torch's operators find it by its `group_name`, as long as somebody holds it."""
    kind = c10d.ProcessGroup.BackendType.NCCL if device.type == "cuda" else c10d.ProcessGroup.BackendType.GLOO
    whole = c10d.ProcessGroup(store, rank, size)
    whole._set_default_backend(kind)
    whole._register_backend(device, kind, group)
    if rank == 0:
        store.set("shared name", f"kvasir {secrets.token_hex(8)}")
    name: str = store.get("shared name").decode()
    whole._set_group_name(name)
    inner._register_process_group(name, whole)
    return whole


def _nvlinks(index: int) -> int:
    """NVLinks between this GPU and the others that this process sees."""
    from torch._C._autograd import DeviceType

    found: Any = inner._detect_dma_connectivity(DeviceType.CUDA, "nvlink")
    return sum(bool(links) for links in found.matrix[index])
