"""Aside: copies from a device into host memory, behind what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def room_for(rows: int, width: int, device: torch.device) -> Tensor:
    """[rows, width] uint8 of host memory from which copies to this device make nobody wait. Pinning takes long, and waits for the
    device: this is for threads that no step waits for. torch keeps what was pinned for the next who asks for as much."""
    return torch.empty(rows, width, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Aside:
    """Copies on a stream of their own, where there are streams."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, held: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """(held in host memory, when it will be there; None: it is)"""
        if self._stream is None:
            return held, None
        self._stream.wait_stream(torch.cuda.current_stream(held.device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(held.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(held, non_blocking=True)
            held.record_stream(self._stream)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return host, arrived
