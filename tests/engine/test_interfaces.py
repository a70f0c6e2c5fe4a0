"""Which of this node's addresses the ranks of a group use."""

from __future__ import annotations

import socket
import sys

import pytest

from kvasir.engine import interfaces
from kvasir.engine.errors import ConfigError
from kvasir.engine.interfaces import named_address

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the node's own address elsewhere")
HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "eth1": "10.1.0.7", "ib0": None, "eth10": "10.2.0.7"}


@pytest.mark.parametrize(
    ("gloo", "nccl", "found"),
    [
        ("", "", None),
        ("eth1", "", "10.1.0.7"),
        (" eth1 , eth0", "", "10.1.0.7"),
        ("eth0", "eth1", "10.0.0.7"),
        ("", "eth1", "10.1.0.7"),
        ("", "=eth10", "10.2.0.7"),
        ("", "=eth", None),
        ("", "ib,eth1", "10.1.0.7"),  # the first has no address of IPv4
        ("", "^lo,docker", None),
        ("", "wlan", None),
    ],
)
def test_the_first_that_is_named(monkeypatch: pytest.MonkeyPatch, gloo: str, nccl: str, found: str | None) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(HERE)))
    monkeypatch.setattr(interfaces, "_address", HERE.get)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    assert named_address() == found


@pytest.mark.parametrize(("variable", "named"), [("GLOO_SOCKET_IFNAME", "ib0"), ("NCCL_SOCKET_IFNAME", "ib")])
def test_one_that_has_no_ipv4_address_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, named: str
) -> None:
    """It was left for the node's own address without a word."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(HERE)))
    monkeypatch.setattr(interfaces, "_address", HERE.get)
    monkeypatch.setenv(variable, named)
    with pytest.raises(ConfigError, match=f"^{variable}: ib0 has no IPv4 address here"):
        named_address()


def test_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert named_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME: there is no nosuch0 here, only "):
        named_address()
