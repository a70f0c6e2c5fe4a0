"""The Serve application, a Gateway deployment and a Group deployment per model, and `run`: a Ray around it.

`build` is the import path for `serve run`, `serve deploy` and KubeRay; their configuration needs
`proxy_location: Disabled` and `route_prefix: null`, because gateways have sockets of their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import kvasir.cluster.ray_environment  # noqa: F401  Ray reads it once, when it is imported

# isort: split
import ray
from kvasir.cluster import telemetry
from kvasir.cluster.auth import KEY_VARIABLES
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.cluster.gateway_replica import Addresses, Gateway, bound_socket
from kvasir.cluster.group import Group, StartError
from kvasir.cluster.rank_actor import MakeEngine, load_engine
from kvasir.engine.config import EngineConfig
from kvasir.engine.hub import locate
from ray import serve
from ray.serve import Application
from ray.serve.schema import ApplicationStatus

APP = "kvasir"
OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours passes through Ray's object store; this is about the least that Ray takes."""


def build(args: dict[str, Any]) -> Application:
    """The application of a deployment spec; `args` are its keys."""
    from kvasir.cluster.options import parse_spec

    return application(parse_spec(args), os.environ)


def application(
    config: ClusterConfig,
    environ: Mapping[str, str],
    *,
    make_engine: MakeEngine = load_engine,
    group_host: str | None = None,
) -> Application:
    """`group_host`: the address on which groups listen for gateways; default: their node's."""
    otel = telemetry.otel_environment(environ)
    keys = {name: environ[name] for name in KEY_VARIABLES if name in environ}
    gpus = _gpus(config)
    groups = [
        group_deployment(engine, gpus).bind(engine, model_name(engine), gpus, otel, make_engine, group_host)
        for engine in config.engines
    ]
    gateway: serve.Deployment = serve.deployment(Gateway).options(  # type: ignore[attr-defined]
        num_replicas=config.gateway.num_gateways,
        ray_actor_options={"num_cpus": 0.1},  # not 0: it mustn't land on a head node that takes no work
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5,
        **_DEPLOYMENT,
    )
    return gateway.bind(config, otel | keys, *groups)


_DEPLOYMENT: dict[str, Any] = {
    "max_constructor_retry_count": 1,
    "health_check_period_s": 2,
    "health_check_timeout_s": 5,
    "graceful_shutdown_wait_loop_s": 0.1,
    "logging_config": {"log_level": "WARNING", "enable_access_log": False},
}
"""A start that fails is told at once, not tried 20 times; health is asked often."""


def model_name(engine: EngineConfig) -> str:
    """First of the names under which a model is served."""
    return engine.served_model_name[0] if engine.served_model_name else engine.model


def group_deployment(engine: EngineConfig, gpus: float) -> serve.Deployment:
    """One group: a coordinator and, in the same placement group, its rank."""
    bundle = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
    deployment: serve.Deployment = serve.deployment(Group).options(  # type: ignore[attr-defined]
        name="Group-" + re.sub(r"[^\w.-]+", "-", model_name(engine)),
        placement_group_bundles=[bundle],
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=10,
        **_DEPLOYMENT,
    )
    return deployment


def _gpus(config: ClusterConfig) -> float:
    """GPUs per model: one each; a share when there are fewer than models; none where there are none."""
    wanting = sum(engine.device != "cpu" for engine in config.engines)
    known: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    there = known.get("GPU", 0.0)
    if any(engine.device == "cuda" for engine in config.engines):
        there = max(there, 1.0)
    return min(1.0, there / wanting) if wanting else 0.0


class Running:
    """A served application, as `kvasir serve` holds it."""

    def __init__(
        self, config: GatewayConfig, addresses: Addresses, *, own_ray: bool, reserved: contextlib.ExitStack
    ) -> None:
        self.http_address = addresses.http
        """Such as http://127.0.0.1:8000."""
        self.grpc_address = addresses.grpc
        """Such as 127.0.0.1:9000; None when gRPC is off."""
        self._config = config
        self._own_ray = own_ray
        self._reserved = reserved
        self._stopping = threading.Event()

    def wait(self) -> None:
        """Until SIGTERM or SIGINT; a second one ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while not self._stopping.wait(0.5):  # a wait without a limit isn't interrupted by a signal everywhere
            pass

    def _on_signal(self, number: int, _: object) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        self._stopping.set()

    def drain_and_stop(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, let running ones finish for `timeout_s` (default: --drain-timeout), end everything."""
        limit = self._config.drain_timeout_s if timeout_s is None else timeout_s
        with contextlib.suppress(TimeoutError):
            gateways = serve.get_app_handle(APP)
            gateways.broadcast("drain", limit).results(timeout_s=limit + 5, return_exceptions=True)
        if self._own_ray:
            ray.shutdown()
        else:
            serve.delete(APP)
            ray.shutdown()
        self._reserved.close()


def run(config: ClusterConfig, *, address: str | None = None, make_engine: MakeEngine = load_engine) -> Running:
    """Serve `config` and return when every model answers. Raises ConfigError, or StartError with a text for the user.

    `address` (default: RAY_ADDRESS) is that of a Ray cluster; without one a Ray is started here, for as long as we run.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    reserved = contextlib.ExitStack()
    try:
        if address is None:
            config = _prepare_locally(config, reserved)
        _start_ray(config, address)
        app = application(config, os.environ, make_engine=make_engine, group_host=None if address else "127.0.0.1")
        target = serve.RunTarget(app, name=APP, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        addresses = _wait_until_ready()
    except BaseException:
        ray.shutdown()
        reserved.close()
        raise
    return Running(config.gateway, addresses, own_ray=address is None, reserved=reserved)


def _prepare_locally(config: ClusterConfig, reserved: contextlib.ExitStack) -> ClusterConfig:
    """Find what is wrong before anything is started, fetch models that have to be fetched, and hold the ports."""
    for engine in config.engines:
        locate(engine.model, engine.revision)
    gateway = config.gateway
    port = _reserve(gateway.host, gateway.port, reserved)
    grpc_port = _reserve(gateway.host, gateway.grpc_port, reserved) if gateway.grpc_port >= 0 else -1
    return replace(config, gateway=replace(gateway, port=port, grpc_port=grpc_port))


def _reserve(host: str, port: int, reserved: contextlib.ExitStack) -> int:
    """Hold a port that nobody has: gateways share ports, so they wouldn't notice somebody else's server on it."""
    with contextlib.closing(bound_socket(host, port, shared=False)) as probe:
        port = probe.getsockname()[1]
    reserved.enter_context(contextlib.closing(bound_socket(host, port, shared=True)))
    return port


def _start_ray(config: ClusterConfig, address: str | None) -> None:
    """Ray with Serve in it, from a neutral folder: Ray puts ours on every worker's sys.path, and there our `kernels` and
    `proto` mustn't lie."""
    os.chdir(tempfile.mkdtemp(prefix="kvasir-"))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address is None:
        cpus = max(os.cpu_count() or 1, len(config.engines) + config.gateway.num_gateways)
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **_QUIET)
    else:
        ray.init(address, **_QUIET)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}


def _wait_until_ready() -> Addresses:
    """Returns when a gateway has every model. Raises StartError when a deployment failed for good."""
    while (status := serve.status().applications[APP]).status != ApplicationStatus.RUNNING:
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise StartError(failure_text(status))
        time.sleep(0.1)
    gateways = serve.get_app_handle(APP)
    while True:
        states: list[tuple[Addresses, dict[str, str]]] = gateways.broadcast("state").results(timeout_s=10.0)
        if states and not any(missing for _, missing in states):
            return states[0][0]
        time.sleep(0.05)


def failure_text(status: Any) -> str:
    """The block that a replica's StartError or ConfigError carries; whatever Serve says, when it is something else."""
    messages: list[str] = [deployment.message for deployment in status.deployments.values()] + [status.message]
    for message in messages:
        if found := re.search(r"(?:StartError|ConfigError): (.*)", message, re.DOTALL):
            return found[1].strip()
    return max(messages, key=len)
