"""The sockets of gateways."""

from __future__ import annotations

import contextlib
import socket

import pytest

from kvasir.cluster.sockets import bound_socket
from kvasir.engine.errors import ConfigError


def test_connections_send_at_once() -> None:
    """Half an answer doesn't wait until the client has acknowledged the other half."""
    with bound_socket("127.0.0.1", 0, shared=True) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), contextlib.closing(listening.accept()[0]) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken() -> None:
    with bound_socket("127.0.0.1", 0, shared=False) as one:
        one.listen()
        with pytest.raises(ConfigError, match="can't listen"):
            bound_socket("127.0.0.1", one.getsockname()[1], shared=False).close()
