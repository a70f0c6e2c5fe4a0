"""The sockets of gateways."""

from __future__ import annotations

import contextlib
import socket

import pytest

from kvasir.cluster.sockets import bound_socket, gone_after, set_options
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


def test_who_vanished_is_asked_for() -> None:
    """Before the limit, so that it is over then; both of these can't be tried without a network to cut."""
    with socket.socket() as sock:
        set_options(sock, gone_after(60.0))
        found = [
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) for name in ("USER_TIMEOUT", "KEEPIDLE")
        ]
        assert found == [60000, 30]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        set_options(sock, gone_after(86400.0))  # the longest --receive-timeout
