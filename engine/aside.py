"""Aside: copies from a device into host memory, behind what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


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
