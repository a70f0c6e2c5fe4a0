"""The sockets of gateways."""

from __future__ import annotations

import socket

from kvasir.engine.errors import ConfigError


def bound_socket(host: str, port: int, *, shared: bool) -> socket.socket:
    """A TCP socket on host:port (0: a free one), not yet listening. `shared`: other gateways may have the port too.

    Raises ConfigError when it can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. asyncio sets it only where the protocol is named; without it the second write of an answer
    # waits for the client's acknowledgement of the first, up to 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror or error}", param="port") from error
    return sock


def authority(host: str, port: int) -> str:
    """host:port, as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
