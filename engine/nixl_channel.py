"""NIXL's way from one rank to another of another group: the reader reads the lender's memory itself, over whatever UCX finds
(RDMA, NVLink, TCP). Needs the package nixl (`pip install kvasir[nixl]`)."""

from __future__ import annotations

import base64
import importlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from kvasir.engine.channels import SLOW_S, BadPieceError, Portion, Wanted, take_row, total
from kvasir.engine.errors import ConfigError
from kvasir.engine.parts import Part
from kvasir.engine.peer_wire import exactly, receive, send

POLL_S = 0.0005
Role = Literal["lend", "borrow"]


class Nixl:
    """Portion by portion: where it lies is told on the connection, and there the reader says when it has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lend(self, connection: socket.socket, portions: Iterator[Portion], part: Part) -> int:
        count = 0
        for portion in portions:
            rows = portion.rows[: portion.good]
            said = {"count": len(portion.groups), "sums": total(rows)}
            if len(rows):
                with _Registered(rows, "lend") as where:
                    send(connection, said | where.told())
                    exactly(connection, 1)
            else:
                send(connection, said)
            count += portion.good
            if portion.good < len(portion.groups):
                break
        return count

    def borrow(self, connection: socket.socket, wanted: Wanted) -> int:
        done = 0
        while done < len(wanted.groups):
            said, _ = receive(connection, 0)
            sums, count = said["sums"], said["count"]
            if not 0 <= len(sums) <= count <= len(wanted.groups) - done:
                raise BadPieceError(f"{count} items came where {len(wanted.groups) - done} are left")
            if sums:
                rows = torch.empty(len(sums), wanted.form(done).block_bytes, dtype=torch.uint8, device=self._device)
                with _Registered(rows, "borrow") as where:
                    where.read(said)
                connection.sendall(b"1")
                if total(rows) != sums:
                    raise BadPieceError(f"the checksum of an item from {done} on is wrong")
                for place, row in enumerate(rows.cpu()):
                    take_row(wanted, done + place, row, None)
            done += len(sums)
            if len(sums) < count:
                break
        return done


class _Registered:
    """rows[n, bytes] while NIXL knows their memory."""

    def __init__(self, rows: Tensor, role: Role) -> None:
        self._rows, self._role = rows.view(-1), role

    def __enter__(self) -> _Registered:
        with LOCK:
            self._agent = agent(self._role)
            self._known = self._agent.register_memory(self._rows)
        return self

    def __exit__(self, *_: object) -> None:
        with LOCK:
            self._agent.deregister_memory(self._known)

    def told(self) -> dict[str, str]:
        """What a reader needs to know."""
        with LOCK:
            parts = {
                "agent": self._agent.get_agent_metadata(),
                "memory": self._agent.get_serialized_descs(self._known.trim()),
            }
        return {name: base64.b64encode(part).decode() for name, part in parts.items()}

    def read(self, said: dict[str, Any]) -> None:
        """Fill the rows from the memory that `told` says. BadPieceError when that fails, TimeoutError when it takes too long."""
        known, memory = (base64.b64decode(said[name]) for name in ("agent", "memory"))
        with LOCK:
            peer = self._agent.add_remote_agent(known)
            remote = self._agent.deserialize_descs(memory)
            transfer = self._agent.initialize_xfer("READ", self._known.trim(), remote, peer)
            state = self._agent.transfer(transfer)
        until = time.monotonic() + SLOW_S
        try:
            while state == "PROC":
                if time.monotonic() > until:
                    raise TimeoutError("NIXL read nothing in time")
                time.sleep(POLL_S)
                with LOCK:
                    state = self._agent.check_xfer_state(transfer)
        finally:
            with LOCK:
                self._agent.release_xfer_handle(transfer)
                self._agent.remove_remote_agent(peer)
        if state != "DONE":
            raise BadPieceError(f"NIXL's transfer ended as {state}")


LOCK = threading.Lock()
"""One thread at a time talks to the agent."""


@cache
def agent(role: Role) -> Any:
    """This process's, one for each role: agents don't talk to themselves. ConfigError when the package isn't there."""
    try:
        api = importlib.import_module("nixl._api")
    except ImportError as error:
        raise ConfigError(
            "--kv-transfer nixl needs the package nixl: pip install 'kvasir[nixl]'", param="kv_transfer"
        ) from error
    return api.nixl_agent(uuid.uuid4().hex, api.nixl_agent_config(backends=["UCX"]))
