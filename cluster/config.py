"""ClusterConfig: everything `kvasir serve` can be told. Standard library only; flags and YAML keys come from the fields.

The string under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvasir.engine.config import EngineConfig, Role


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """What clients connect to."""

    host: str = "127.0.0.1"
    """Address to listen on, HTTP and gRPC. More than localhost needs --api-key or --insecure."""
    port: int = 8000
    """HTTP port; 0: any free one, printed."""
    grpc_port: int = 9000
    """gRPC port; 0: any free one, printed; -1: no gRPC."""
    ollama_port: int = -1
    """Second HTTP port, for clients that look for Ollama at 11434; 0: any free one, printed; -1: none."""
    api_key: tuple[str, ...] = ()
    """Keys that clients must send (Authorization: Bearer ...), also from KVASIR_API_KEY or VLLM_API_KEY (comma-separated)."""
    api_key_file: str | None = None
    """File with one key per line."""
    isolate_keys: bool = False
    """Share no cached blocks between API keys, so that nobody learns from the time to a first token what others asked. Within
    a key, cache_salt tells tenants apart."""
    insecure: bool = False
    """Serve beyond localhost without a key."""
    ssl_keyfile: str | None = None
    """TLS private key (PEM), for HTTP and gRPC."""
    ssl_certfile: str | None = None
    """TLS certificate chain (PEM)."""
    allowed_origins: tuple[str, ...] = ()
    """Origins that browsers may call from (CORS); default: none. A server that needs no key answers to their names, too: on
    localhost it refuses others that anybody could have made lead to it."""
    max_body_bytes: int = 32 * 2**20
    """Largest request body; a larger one is refused with 413."""
    receive_timeout_s: float = 60.0
    """Seconds in which a request must be here, head and body; and one more for each 64 KiB of it. A client that takes
    nothing of what it is sent for so long is gone, and its request ends. Flag: --receive-timeout."""
    max_stream_buffer: int = 4096
    """Events held for one client that reads slowly; beyond it its request is cancelled."""
    state_path: str | None = None
    """SQLite file for stored responses, chats, files and batches; gateways of one machine share it; ":memory:" keeps them
    in this process. Default: kvasir/state.sqlite3 in $XDG_STATE_HOME or ~/.local/state."""
    response_ttl_s: float = 30 * 86400.0
    """Seconds that stored responses and chats live; files, too, unless their sender says otherwise. Flag: --response-ttl."""
    max_state_bytes: int = 4 * 2**30
    """Largest size of what is stored: the oldest responses and chats make room, files are refused."""
    num_gateways: int = 1
    """Gateway processes; they share the ports."""
    routing_policy: Literal["round-robin", "least-load", "prefix", "cost"] = "cost"
    """Which group gets a request: in turn; the one with fewest requests; with the longest cached prefix; or where queue,
    uncached prompt and decoding together cost least."""
    max_ttft_s: float = 0.0
    """Refuse a request at once (429) when its first token is predicted later than so many seconds on every group; 0: never.
    Flag: --max-ttft."""
    drain_timeout_s: float = 30.0
    """After SIGTERM: seconds that running requests may take to finish. Flag: --drain-timeout."""
    failover_timeout_s: float = 30.0
    """Seconds that a request whose group died waits for another one to go on with it; 0: it fails. Flag: --failover-timeout."""
    stream_ttl_s: float = 60.0
    """Seconds that a streamed answer which may be resumed is kept without a reader. Flag: --stream-ttl."""
    stream_memory: int = 64 * 2**20
    """Bytes of such answers that a gateway keeps."""
    enable_docs: bool = True
    """Describe the API on /openapi.json and /docs."""
    response_role: str = "assistant"
    """Role of chat answers."""
    enable_log_requests: bool = False
    """Log one line per request (no prompts, no keys)."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Models to serve and how clients reach them."""

    engines: tuple[EngineConfig, ...] = field(default_factory=lambda: (EngineConfig(),))
    """One group deployment each; several of one name are groups of one model."""
    roles: tuple[Role, ...] = ()
    """What the groups of each are for; empty: all do both."""
    gateway: GatewayConfig = field(default_factory=GatewayConfig)

    @property
    def deployments(self) -> list[tuple[str, EngineConfig, Role]]:
        """(first name of the model, what its groups run, what they are for)"""
        both: Role = "both"
        roles = self.roles or (both,) * len(self.engines)
        return [(model_name(engine), engine, role) for engine, role in zip(self.engines, roles, strict=True)]

    @property
    def models(self) -> list[EngineConfig]:
        """The first of each name."""
        return [*{name: engine for name, engine, _ in reversed(self.deployments)}.values()][::-1]


def model_name(engine: EngineConfig) -> str:
    """First of the names under which a model is served."""
    return engine.served_model_name[0] if engine.served_model_name else engine.model
