"""Interfaces: those by which ranks exchange tensors, as GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

from kvasir.engine.errors import ConfigError

SIOCGIFADDR = 0x8915  # of Linux's <linux/sockios.h>


def gloo_interfaces() -> list[str]:
    """GLOO_SOCKET_IFNAME's, as torch's own start of gloo reads it. ConfigError names one that isn't here."""
    named = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    known = [name for _, name in socket.if_nameindex()]
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(f"GLOO_SOCKET_IFNAME: there is no {unknown[0]} here, only {', '.join(known)}")
    return named


def named_address() -> str | None:
    """This node's IPv4 address on the first interface that either variable names: rank 0 listens there, so the others' ways to it,
    and to each other, are of that network. None: neither names one. ConfigError when those that are named have no such address."""
    if sys.platform != "linux":
        return None
    named = {"GLOO_SOCKET_IFNAME": gloo_interfaces(), "NCCL_SOCKET_IFNAME": _nccl_interfaces()}
    every = [name for names in named.values() for name in names]
    address = next((address for address in map(_address, every) if address is not None), None)
    if every and address is None:
        variable, names = next((variable, names) for variable, names in named.items() if names)
        text = f"{variable}: {', '.join(names)} has no IPv4 address here, and ranks meet over IPv4; name an interface that has"
        raise ConfigError(text)
    return address


def _nccl_interfaces() -> list[str]:
    """NCCL's grammar: beginnings of names, "=" names themselves; "^" those that are not to be taken, which names none."""
    said = os.environ.get("NCCL_SOCKET_IFNAME", "").strip()
    if said.startswith("^"):
        return []
    words = [word.strip() for word in said.removeprefix("=").split(",") if word.strip()]
    known = [name for _, name in socket.if_nameindex()]
    return [name for word in words for name in known if name == word or (said[0] != "=" and name.startswith(word))]


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])
