"""Who may call: API keys, compared in constant time, and which address may be bound without one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import ClientError, ConfigError

KEY_VARIABLES = ("KVASIR_API_KEY", "VLLM_API_KEY")
"""Each may hold several keys, separated by commas."""
HTTP_KEY = "the header Authorization: Bearer KEY, or x-api-key: KEY"
GRPC_KEY = "the metadata authorization: Bearer KEY"
PRINCIPAL_HEADER = "kvasir-principal"
"""Whose work it is, where work of ours has no caller's headers (batches, the background). What a client sends under this
name counts for nothing: its key does."""


class UnauthenticatedError(ClientError):
    """No key, or a wrong one."""

    code = "invalid_api_key"
    status = 401


class ApiKeys:
    """The keys that are let in; none at all: everybody is. Only hashes are kept, so that no log can show a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None, x_api_key: str | None = None, hint: str = HTTP_KEY) -> str:
        """Raise UnauthenticatedError unless the header's value is `Bearer KEY` with one of the keys, or that of
        `x-api-key` (Anthropic's clients) is one where there is no other. Returns the principal: who called, as a name
        that doesn't give the key away; everybody is the same one where no key is needed. hint: how to send one."""
        if not self._digests:
            return ""
        authorization = _header(authorization, x_api_key)
        if not authorization:
            raise UnauthenticatedError(f"no API key; send {hint}")
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them: no early way out
        if not any(matches) or scheme.lower() != "bearer":
            # in OpenAI's words, by which some clients tell this from other errors of the same type
            raise UnauthenticatedError(f"Incorrect API key provided; send {hint}")
        return hmac.digest(given, b"principal", "sha256").hex()

    def principal(self, headers: Mapping[str, str]) -> str:
        """Whose work a call with these headers is, by the name that `check` gives."""
        given = headers.get("authorization"), headers.get("x-api-key")
        return self.check(*given) if any(given) else headers.get(PRINCIPAL_HEADER, "")

    def owner(self, authorization: str | None, x_api_key: str | None = None) -> bytes:
        """Tells clients apart by the keys that they sent; where none is needed all are the same."""
        if not self._digests:
            return b""
        return _digest(_header(authorization, x_api_key).partition(" ")[2].strip())


def load_keys(config: GatewayConfig, environ: Mapping[str, str]) -> ApiKeys:
    """Keys of flags, file and environment together. ConfigError when the file can't be read or holds none."""
    keys = [*config.api_key]
    for variable in KEY_VARIABLES:
        keys += environ.get(variable, "").split(",")
    if config.api_key_file is not None:
        keys += _read(Path(config.api_key_file).expanduser())
    found = ApiKeys(stripped for key in keys if (stripped := key.strip()))
    if config.isolate_keys and not found:
        raise ConfigError("--isolate-keys needs API keys: set --api-key or --api-key-file", param="isolate_keys")
    return found


def tenant_of(config: GatewayConfig, keys: ApiKeys) -> Callable[[Mapping[str, str]], str]:
    """A call's headers -> with whom it shares cached blocks: everybody, unless --isolate-keys."""
    return keys.principal if config.isolate_keys else lambda headers: ""


def check_exposure(config: GatewayConfig, environ: Mapping[str, str]) -> None:
    """ConfigError unless only this machine can connect, a key is needed, or --insecure says that none is."""
    keys = load_keys(config, environ)
    if config.insecure or is_local(config.host) or keys:
        return
    text = f"--host {config.host} lets other machines connect, and there is no API key"
    raise ConfigError(f"{text}; set --api-key (or KVASIR_API_KEY), or --insecure to serve everybody", param="host")


def is_local(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} can't be read: {error}", param="api_key_file") from error
    keys = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one per line", param="api_key_file")
    return keys


def _header(authorization: str | None, x_api_key: str | None) -> str:
    return authorization or (f"Bearer {x_api_key}" if x_api_key else "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
