"""The sockets of gateways."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from typing import Any

from kvasir.engine.errors import ConfigError

MAX_IDLE_S = 32767
"""Linux takes no more."""


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


def gone_after(limit_s: float) -> dict[str, int]:
    """Options of a TCP socket whose connection breaks when the other end has acknowledged nothing for so long, be it that it reads
    nothing of what is sent to it, or that its machine vanished, which says no goodbye."""
    idle_s = min(max(1, int(limit_s / 2)), MAX_IDLE_S)
    probes = {"TCP_KEEPIDLE": idle_s, "TCP_KEEPINTVL": max(1, idle_s // 4), "TCP_KEEPCNT": 3}
    return {**probes, "TCP_USER_TIMEOUT": max(1, int(limit_s * 1000))}  # in ms; 0 would be for ever


def set_options(sock: Any, options: Mapping[str, int]) -> None:
    """TCP's, by their names, and that the other end is asked now and then whether it is there."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # not all systems have all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def check_certificate(certfile: str, keyfile: str) -> None:
    """Raises ConfigError unless the two, PEM files, are a certificate and its key, which nobody has to be asked a password for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, file in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        flag = f"--{name.replace('_', '-')} {file}"
        try:
            if name == "ssl_certfile":
                context.load_verify_locations(file)
            else:
                context.load_cert_chain(certfile, file, password=lambda: b"")
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise ConfigError(f"{flag} isn't the key of --ssl-certfile {certfile}", param=name) from error
            wanted = "certificate" if name == "ssl_certfile" else "private key without a password"
            raise ConfigError(f"{flag} holds no {wanted} in PEM ({error.reason})", param=name) from error
        except OSError as error:
            raise ConfigError(f"{flag} can't be read: {error.strerror}", param=name) from error


def authority(host: str, port: int) -> str:
    """host:port, as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
