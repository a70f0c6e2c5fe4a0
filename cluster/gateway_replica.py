"""Gateway as a Serve deployment: a replica that opens its own HTTP and gRPC sockets, shared with its siblings.

Serve places, watches and replaces it; requests don't come through Serve's proxies, which cost time for every chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import ray
import uvicorn
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from kvasir.cluster import telemetry
from kvasir.cluster.auth import load_keys, tenant_of
from kvasir.cluster.config import ClusterConfig
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.cluster.siblings import Siblings
from kvasir.cluster.sockets import authority, bound_socket
from kvasir.cluster.unplaced import unplaced
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import Role
from kvasir.engine.errors import UnavailableError

ASK_TIMEOUT_S = 5.0
HUB = "HF_"
"""How the variables of huggingface_hub begin: token, cache, endpoint, offline."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a gateway listens; `grpc` and `ollama` are None when they are turned off."""

    http: str
    grpc: str | None
    ollama: str | None = None
    """A second address of the HTTP server."""


def enter(environ: Mapping[str, str]) -> None:
    """Take over variables of who deployed; what this node itself has for the hub goes before, as on ranks."""
    own = {name: value for name, value in os.environ.items() if name.startswith(HUB)}
    os.environ.update({**environ, **own})


class _Server(uvicorn.Server):
    """Leaves signals alone: the process belongs to Serve."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """One gateway process. `groups`: handles of the Group deployments, in the order of `config.deployments`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, environ: Mapping[str, str], *groups: DeploymentHandle[Any]
    ) -> None:
        from kvasir.cluster.desk import Desk
        from kvasir.cluster.metrics import Metrics
        from kvasir.cluster.recordings import Recordings
        from kvasir.cluster.served_model import ServedModel

        enter(environ)
        telemetry.log_to_stderr(config.gateway.log_level)
        self._config = config.gateway
        self._tracing = telemetry.Tracing.from_environment(environ)
        models = [ServedModel.load(engine) for engine in config.models]
        names = {name: model.name for model in models for name in model.names}
        self._directory = GroupDirectory(
            names,
            max_stream_buffer=config.gateway.max_stream_buffer,
            policy=config.gateway.routing_policy,
            max_ttft_s=config.gateway.max_ttft_s,
        )
        self._groups: dict[str, list[DeploymentHandle[Any]]] = {}
        for (name, _, _), group in zip(config.deployments, groups, strict=True):
            self._groups.setdefault(name, []).append(group)
        for model in models:
            self._directory.follow(model.name, Finder(self._groups[model.name]).endpoints)
        keys = load_keys(config.gateway, os.environ)
        ttl_s, memory = config.gateway.stream_ttl_s, config.gateway.stream_memory
        self._recordings = Recordings(keys, ttl_s=ttl_s, max_bytes=memory)
        self._door: str | None = None
        self._doors, self._metrics = (
            Siblings(partial(_ask_gateways, "door")),
            Siblings(partial(_ask_gateways, "metrics")),
        )
        self._desk = Desk(
            models,
            self._directory,
            Metrics(),
            self._tracing,
            log_requests=config.gateway.enable_log_requests,
            failover_timeout_s=config.gateway.failover_timeout_s,
            recordings=self._recordings,
            tenant=tenant_of(config.gateway, keys),
        )
        http, *ollama = await self._start_http()
        self.addresses = Addresses(http, await self._start_grpc(), *ollama)
        gc.freeze()  # what is here stays: to look through all of it now and then would hold up every stream (0.26 s)

    async def state(self) -> tuple[Addresses, dict[str, str]]:
        """(where it listens, model -> why it can't be served yet)."""
        return self.addresses, self._directory.missing()

    async def door(self) -> tuple[str, str | None]:
        """(its name in the ids of streams, its own address: the public one may lead to any gateway)."""
        return self._recordings.gateway, self._door

    async def metrics(self) -> tuple[str, str]:
        """(its name, its own series)."""
        return self._recordings.gateway, self._desk.metrics.render().decode()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._http_task.done():
            raise RuntimeError("the HTTP server ended")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones finish, close the sockets, export the last spans."""
        self._desk.draining = True
        deadline = time.monotonic() + timeout_s
        while self._desk.running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._desk.abandon()
        await self._stop()

    async def __del__(self) -> None:
        """Serve ends this replica: a rolling update, or the application's end."""
        await self.drain(self._config.drain_timeout_s)

    async def _start_http(self) -> list[str]:
        """One address, or that and the one of --ollama-port."""
        from kvasir.cluster.gateway import create_app
        from kvasir.cluster.http_protocol import server_config

        config = self._config
        self._app = create_app(self._desk, config, self._doors.find, self._other_metrics, self._set_role)
        self._app.state.shelf.background.start()
        ports = [config.port, *([config.ollama_port] if config.ollama_port >= 0 else [])]
        socks = [bound_socket(config.host, port, shared=True) for port in ports]
        scheme = "https" if config.ssl_certfile else "http"
        addresses = [f"{scheme}://{authority(*sock.getsockname()[:2])}" for sock in socks]
        if config.num_gateways > 1:
            socks.append(door := bound_socket(config.host, 0, shared=False))
            self._door = f"{scheme}://{authority(_reachable(config.host), door.getsockname()[1])}"
        self._http = _Server(server_config(self._app, config, self._desk.metrics.refused))
        self._http_task = asyncio.ensure_future(self._http.serve(sockets=socks))
        while not self._http.started:
            await asyncio.sleep(0.005)
            if self._http_task.done():
                await self._http_task
        return addresses

    async def _set_role(self, model: str, name: str, role: Role) -> bool:
        """Ask all coordinators of the model: one knows that it is meant."""
        asked = [group.broadcast("set_role", name, role) for group in self._groups[model]]
        try:
            answers = await asyncio.gather(
                *(one.results_async(timeout_s=ASK_TIMEOUT_S, return_exceptions=True) for one in asked)
            )
        except (TimeoutError, RayError, RayServeException):
            return False
        return any(answer is True for some in answers for answer in some)

    async def _other_metrics(self) -> dict[str, str] | None:
        """What the other gateways measured: they share our port."""
        if self._config.num_gateways == 1:
            return None
        told = await self._metrics.told()
        told.pop(self._recordings.gateway, None)
        return told

    async def _start_grpc(self) -> str | None:
        from kvasir.cluster.gateway import create_grpc_server

        config = self._config
        self._grpc: Any = None
        if config.grpc_port < 0:
            return None
        self._grpc = create_grpc_server(self._desk, config, self._app.state.shelf, self._other_metrics)
        address = authority(config.host, config.grpc_port)
        if config.ssl_certfile and config.ssl_keyfile:
            pair = (Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes())
            port = self._grpc.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = self._grpc.add_insecure_port(address)
        await self._grpc.start()
        return authority(config.host, port)

    async def _stop(self) -> None:
        from kvasir.cluster.gateway import close_app

        self._http.should_exit = True
        await asyncio.gather(self._http_task, return_exceptions=True)
        await close_app(self._app)
        if self._grpc is not None:
            await self._grpc.stop(grace=0.5)
        await self._directory.close()
        await asyncio.to_thread(self._tracing.shutdown)


def _reachable(host: str) -> str:
    """An address that leads to what listens on `host`."""
    found: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return found if host in ("0.0.0.0", "::", "") else host


async def _ask_gateways(method: str) -> list[Any]:
    """What the gateways that live answer, this one too, or the exceptions that came instead. Raises TimeoutError."""
    context = serve.get_replica_context()
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        return await handle.broadcast(method).results_async(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException) as error:
        raise TimeoutError("the gateways don't answer") from error


class Finder:
    """Where the living groups of one model are: its Group deployments are asked, one for each role."""

    def __init__(self, groups: Sequence[DeploymentHandle[Any]]) -> None:
        self._groups = groups
        self._last: dict[int, list[Endpoint]] = {}

    async def endpoints(self) -> Sequence[Endpoint]:
        """Raises UnavailableError when there are none; what doesn't answer, a deployment or a replica of it, is taken
        to be where it was."""
        told = await asyncio.gather(*map(_endpoints, self._groups), return_exceptions=True)
        whys = [answer for answer in told if isinstance(answer, BaseException)]
        for number, answer in enumerate(told):
            if not isinstance(answer, BaseException):
                found, all_said = answer
                self._last[number] = found if all_said else [*dict.fromkeys([*found, *self._last.get(number, [])])]
        if len(whys) == len(told):
            raise whys[0]
        return [endpoint for number in sorted(self._last) for endpoint in self._last[number]]


async def _endpoints(group: DeploymentHandle[Any]) -> tuple[list[Endpoint], bool]:
    """(where the living replicas of a Group deployment are, whether all of them said it)."""
    try:
        answers = await group.broadcast("endpoint").results_async(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException) as error:  # it isn't placed yet, or is being replaced
        waits: list[str] = []
        with contextlib.suppress(Exception):  # whatever keeps Ray from saying it: it is asked again
            waits = await asyncio.to_thread(unplaced, group.app_name, group.deployment_name, named=False)
        raise UnavailableError(waits[0] if waits else f"its group doesn't answer: {type(error).__name__}") from error
    told = [answer for answer in answers if not isinstance(answer, BaseException)]
    if not (found := [endpoint for endpoint, _ in told if endpoint is not None]):
        raise UnavailableError(next((why for _, why in told), "the model is loading"))
    return found, len(told) == len(answers)
