"""Memory that processes of one node share. It has no name that could be left behind: one makes it, the others open its
descriptor, and the system frees it with the last of them."""

from __future__ import annotations

import mmap
import os
import secrets
from typing import Any

from kvasir.engine.channels import Memory, node
from kvasir.kernels.native import library

NAME_BYTES = 16


class NodeMemory:
    """`memory` begins with a random name, then zeros. OSError where that isn't to be had."""

    def __init__(self, size: int) -> None:
        if not node() or library() is None:
            raise OSError("this needs Linux and compiled kernels")
        self._kept = Memory(size)  # its descriptor stays open for the others
        self.memory: Any = mmap.mmap(self._kept.fd, size)
        self.memory[:NAME_BYTES] = secrets.token_bytes(NAME_BYTES)
        self.where = f"{os.getpid()} {self._kept.fd} {self.memory[:NAME_BYTES].hex()}"
        """What `opened` takes."""


def opened(where: str, size: int) -> Any:
    """The memory that another process of this node made. OSError when it is on another node after all, or in a container of
    its own, where that process's number is somebody else's."""
    pid, fd, name = where.split()
    with open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < size:
            raise OSError("what the other process shares isn't to be had here")
        memory = mmap.mmap(file.fileno(), size)
    if memory[:NAME_BYTES].hex() != name:
        raise OSError("what the other process shares isn't to be had here")
    return memory
