"""What web pages may do at a server that needs no key, where a browser is all that stands between a page and what is kept.

A page's own name may be made to lead to this machine after it was loaded (DNS rebinding): its scripts are of one origin with
us then, and read everything. And a page may send a form anywhere, without being allowed to: it doesn't see the answer.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

from kvasir.cluster.auth import ApiKeys, is_local
from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import ClientError, ConfigError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@*]*")


class ForbiddenError(ClientError):
    """The call is a page's that wasn't allowed to make it."""

    code = "forbidden"
    status = 403


class Origins:
    """Those that are allowed. Where a key is needed, pages have none to send: all are let through."""

    def __init__(self, config: GatewayConfig, keys: ApiKeys) -> None:
        self._origins = config.allowed_origins
        self._free = bool(keys) or "*" in self._origins
        self._known_by_name = not (self._free or config.insecure) and is_local(config.host)
        """Whoever calls says a name that leads here for certain."""
        self._names = {_name(_authority(origin)) for origin in self._origins}

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise ForbiddenError unless a call with these headers (lower case) may be answered."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._known_by_name and not (_leads_here(name := _name(host)) or name in self._names):
            text = (
                f"this server answers on this machine alone, and is called {name!r:.80}; if that name is yours, name it"
            )
            raise ForbiddenError(f"{text} in --allowed-origins, as http://NAME, or set an API key", param="Host")
        if self._free or origin is None or method != "POST" or _asks_first(headers):
            return
        if origin not in self._origins and _authority(origin) != host:
            text = f"pages of {origin!r:.80} may not send this here; --allowed-origins names those that may"
            raise ForbiddenError(text, param="Origin")


def check_origins(given: Iterable[str]) -> None:
    """ConfigError for one that no browser would send: it would allow nothing."""
    for origin in given:
        if not _ORIGIN.fullmatch(origin):
            text = "origins as browsers send them, such as https://chat.example or http://localhost:3000, or * for all"
            raise ConfigError(f"--allowed-origins must be {text}; got {origin!r:.80}", param="allowed_origins")


def _asks_first(headers: Mapping[str, str]) -> bool:
    """A browser sends such a body only where CORS allowed it, and other programs may name any origin."""
    return headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json")


def _authority(origin: str) -> str:
    """Host and port."""
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """Without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower().rstrip(".")


def _leads_here(name: str) -> bool:
    """An address, or a name that nobody can register: without a dot, or below one that is reserved (RFC 6761, ICANN)."""
    if ("." not in name and ":" not in name) or name.endswith((".localhost", ".internal")):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
