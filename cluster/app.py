"""`build`, the import path for `serve run`, `serve deploy` and KubeRay; and `run`, what `kvasir serve` does.

A spec that names `kvasir.cluster.app:build` needs `proxy_location: Disabled` and `route_prefix: null`, because gateways
have sockets of their own. Ray is imported late: it reads its environment once, and `--help` needn't wait for it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kvasir.cluster import ray_token
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.cluster.sockets import bound_socket
from kvasir.cluster.state_file import MEMORY
from kvasir.engine.errors import ConfigError, UnavailableError
from kvasir.engine.model_files import ModelFiles

if TYPE_CHECKING:
    from ray.serve import Application

    from kvasir.cluster.gateway_replica import Addresses
    from kvasir.cluster.rank_actor import MakeEngine

log = logging.getLogger(__name__)

APP = "kvasir"
OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours passes through Ray's object store; this is about the least that Ray takes."""
PROCESSES = 4
"""Serve's controller, a gateway, a group's coordinator and its rank: Ray starts that many workers ahead."""
NOTE_S = 15.0
"""How often the log says what isn't placed."""
CONNECT_TIMEOUT_S = 10.0
SAME_SIGNAL_S = 0.5
"""Who ends a process group sends two at once: `timeout 60 make serve`, as make hands on what it gets."""
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # our processes' lines reach the terminal as they are
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # a SIGTERM is no failure: no stack dump
    "RAY_DEDUP_LOGS": "0",
    "GRPC_VERBOSITY": "ERROR",  # its core writes a line whenever anybody who speaks no TLS connects; it looks before Python can
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # nothing is gained by draining a group that hangs
}
"""What the user has set stays."""


class StartError(UnavailableError):
    """The application could not be started. The message is a block of text for the user."""


def build(args: dict[str, Any]) -> Application:
    """The application of a deployment spec; `args` are its keys."""
    from kvasir.cluster.application import application
    from kvasir.cluster.options import parse_spec

    return application(parse_spec(args), os.environ)


def run(config: ClusterConfig, *, address: str | None = None, make_engine: MakeEngine | None = None) -> Running:
    """Serve `config`; returns when every model answers. Raises ConfigError, or StartError with a text for the user.

    `address` (default: RAY_ADDRESS) is that of a Ray cluster; without one a Ray is started here, for as long as we run.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    reserved = contextlib.ExitStack()
    config = with_absolute_paths(config)
    if address is None:
        if make_engine is None:
            _check_models(config)
        config = _prepare(config, reserved)
    try:
        reserved.enter_context(_neutral_folder())
        _start_ray(config, address)
        _check_room(config, own=address is None)
        others = address is not None and _is_there()
        if others:
            log.warning(
                "this cluster serves Kvasir already: it changes to what is asked for here, and ends with this process"
            )
        try:
            _deploy(config, make_engine, own_ray=address is None)
            addresses = wait_until_ready(APP, config.gateway.num_gateways)
        except BaseException as error:
            if not others:
                _take_back(error, config.gateway.drain_timeout_s, own_ray=address is None)
            raise
    except BaseException:
        reserved.close()
        _stop_ray()
        raise
    return Running(config.gateway, addresses, own_ray=address is None, reserved=reserved)


class Running:
    """A served application, as `kvasir serve` holds it."""

    def __init__(
        self, config: GatewayConfig, addresses: Addresses, *, own_ray: bool, reserved: contextlib.ExitStack
    ) -> None:
        self.http_address = addresses.http
        """Such as http://127.0.0.1:8000."""
        self.grpc_address = addresses.grpc
        """Such as 127.0.0.1:9000; None when gRPC is off."""
        self.ollama_address = addresses.ollama
        """Such as http://127.0.0.1:11434; None without --ollama-port."""
        self._drain_timeout_s = config.drain_timeout_s
        self._own_ray = own_ray
        self._reserved = reserved
        self._stopping_since: float | None = None

    def catch_signals(self) -> None:
        """From now on SIGTERM and SIGINT end `wait`, though it is called later; a second one ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Until SIGTERM or SIGINT."""
        self.catch_signals()
        while self._stopping_since is None:
            time.sleep(0.1)

    def drain_and_stop(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, let running ones finish for `timeout_s` (default: --drain-timeout), end everything."""
        _end_application(self._drain_timeout_s if timeout_s is None else timeout_s, own_ray=self._own_ray)
        _stop_ray()
        self._reserved.close()

    def _on_signal(self, number: int, _: object) -> None:
        """Takes no lock, not even an Event's: a second signal comes in the middle of the first one's call."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
        elif time.monotonic() - self._stopping_since > SAME_SIGNAL_S:
            os._exit(128 + number)  # Ray's processes end with their parent


def _is_there() -> bool:
    """Whether the cluster has an application of our name."""
    from ray import serve

    return APP in serve.status().applications


def _take_back(error: BaseException, drain_s: float, *, own_ray: bool) -> None:
    """End what was deployed and didn't become ready."""
    if not isinstance(error, Exception):  # SIGTERM's, or Ctrl-C's; a model may be served before the others are
        _end_application(drain_s, own_ray=own_ray)
    elif not own_ray:
        try:
            _end_application(0.0, own_ray=False)
        except Exception as late:  # why the start failed is what has to be told
            log.warning("what was deployed may still be there (`serve delete %s`): %s", APP, late)


def _end_application(drain_s: float, *, own_ray: bool) -> None:
    """Let what runs at gateways finish for `drain_s`. A Ray of our own ends with us; another one has to be told."""
    from ray import serve

    there = serve.status().applications.get(APP)
    if there is None:  # it was never begun
        return
    gateway = there.deployments.get("Gateway")
    if gateway and gateway.replica_states.get("RUNNING"):  # type: ignore[call-overload]  # without one Serve waits
        with contextlib.suppress(TimeoutError):
            _ask_gateways(APP, "drain", drain_s, timeout_s=drain_s + 5)
    if not own_ray:
        try:
            serve.delete(APP)
        except TimeoutError:
            log.warning("the application didn't end within a minute; `serve status` knows more")


def wait_until_ready(app: str, gateways: int = 1) -> Addresses:
    """Returns when so many gateways listen and have every model. Raises StartError when a deployment failed for good."""
    from ray import serve

    noted = time.monotonic()
    while True:
        if (status := serve.status().applications.get(app)) is None:
            raise StartError(f"application '{app}' was deleted while it started")
        if status.status == "DEPLOY_FAILED":
            raise StartError(failure_text(status))
        if status.status == "RUNNING":
            with contextlib.suppress(TimeoutError):  # who died or hangs is being replaced
                states: list[tuple[Addresses, dict[str, str]]] = _ask_gateways(app, "state", timeout_s=10.0)
                if len(states) >= gateways and not any(missing for _, missing in states):
                    return states[0][0]
        if time.monotonic() - noted > NOTE_S:
            noted = time.monotonic()
            _note_unplaced(app, status)
        time.sleep(0.1)


def _note_unplaced(app: str, status: Any) -> None:
    """Say what of the application waits for room, which may never come."""
    from kvasir.cluster.unplaced import living, no_gateway, unplaced

    texts = unplaced(app)
    gateway = status.deployments.get("Gateway")
    if gateway and "to be scheduled" in gateway.message:  # Serve's note, after half a minute
        texts.append(no_gateway(living()) or gateway.message)
    for text in texts:
        log.warning("%s", text)


def _ask_gateways(app: str, method: str, *args: object, timeout_s: float) -> list[Any]:
    """What the living gateways answer. Raises TimeoutError, also when for so long there are none."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            response: Any = serve.get_app_handle(app).broadcast(method, *args)
            answers = response.results(timeout_s=timeout_s, return_exceptions=True)
            return [answer for answer in answers if not isinstance(answer, BaseException)]
        except RayServeException as error:  # the last one died, the next isn't there yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"no gateway is running: {error}") from error
            time.sleep(0.1)


def failure_text(status: Any) -> str:
    """What a replica's error says; whatever Serve says, when it is none of ours."""
    messages: list[str] = [deployment.message for deployment in status.deployments.values()] + [status.message]
    for message in messages:
        if found := re.search(r"(?:GroupError|ConfigError): (.*)", message, re.DOTALL):
            return found[1].strip()
    return max(messages, key=len)


def _prepare(config: ClusterConfig, reserved: contextlib.ExitStack) -> ClusterConfig:
    """Find what is wrong before anything is started, fetch models that have to be fetched, and hold the ports."""
    for engine in config.models:
        ModelFiles(engine)
    gateway = config.gateway
    with contextlib.ExitStack() as mine:
        held: dict[str, Any] = {name: _reserve(gateway, name, mine) for name in ("port", "grpc_port", "ollama_port")}
        reserved.push(mine.pop_all())
    return replace(config, gateway=replace(gateway, **held))


def _check_models(config: ClusterConfig) -> None:
    """Raise ConfigError for ranks or a length that a model can't have, before Ray takes its time to start them."""
    for engine in config.engines:
        if engine.ranks > 1:
            from kvasir.engine.load import check_ranks  # torch takes a second

            check_ranks(engine)
        if engine.max_model_len is not None:
            from kvasir.engine.arch import load_spec, module_name, supported
            from kvasir.engine.config import served_len

            files = ModelFiles(engine)
            if module_name(files.config) in supported():  # what transformers' code runs tells later
                served_len(engine, load_spec(files.config).max_len)


def with_absolute_paths(config: ClusterConfig) -> ClusterConfig:
    """Files and folders as seen from here: the processes that open them run elsewhere. Names stay as they were typed."""
    engines = tuple(
        replace(
            engine,
            model=_absolute(engine.model),
            tokenizer=_absolute(engine.tokenizer),
            chat_template=_absolute(engine.chat_template),
            download_dir=engine.download_dir and str(Path(engine.download_dir).expanduser().absolute()),
            kv_disk_path=_absolute_folder(engine.kv_disk_path),
            served_model_name=engine.served_model_name or (engine.model,),
        )
        for engine in config.engines
    )
    gateway = config.gateway
    files = {name: _absolute(getattr(gateway, name)) for name in ("api_key_file", "ssl_keyfile", "ssl_certfile")}
    state = gateway.state_path
    if state not in (None, MEMORY):  # it needn't exist yet
        files["state_path"] = str(Path(state).expanduser().absolute())
    return replace(config, engines=engines, gateway=replace(gateway, **files))


def _absolute_folder(name: str | None) -> str | None:
    """One that may not be there yet; "auto" is each node's own."""
    return name if name in (None, "auto") else str(Path(name).expanduser().absolute())


@overload
def _absolute(name: str) -> str: ...
@overload
def _absolute(name: None) -> None: ...
@overload
def _absolute(name: str | None) -> str | None: ...
def _absolute(name: str | None) -> str | None:
    """`name` as an absolute path if there is such a file or folder; a hub id, a template or a bundled name stays."""
    if not name or len(name) > 1024 or "\n" in name:
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _reserve(gateway: GatewayConfig, name: str, reserved: contextlib.ExitStack) -> int:
    """Hold a port that nobody has: gateways share ports, so they wouldn't notice somebody else's server on it."""
    host, port = gateway.host, int(getattr(gateway, name))
    if port < 0:
        return -1
    try:
        if port:
            bound_socket(host, port, shared=False).close()
        held = bound_socket(host, port, shared=True)  # instead of 0 the system gives one that nobody has, shared or not
    except ConfigError as error:
        raise ConfigError(f"{error.message} (see --host and --{name.replace('_', '-')})", param=name) from error
    reserved.enter_context(contextlib.closing(held))
    return int(held.getsockname()[1])


def _start_ray(config: ClusterConfig, address: str | None) -> None:
    """Ray, and what we need of its modules, at the same time."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    importer = threading.Thread(target=_import_ahead, args=("kvasir.cluster.application",))
    importer.start()
    if address is None:
        ray_token.keep_private()
        ranks = sum(engine.ranks * engine.data_parallel_size for engine in config.engines)
        cpus = max(os.cpu_count() or 1, PROCESSES, ranks + config.gateway.num_gateways)
        local: dict[str, Any] = {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        where, change = "Ray could not be started here", "see what else this machine does, then start again"
    else:
        local = {}
        where = f"no Ray cluster could be joined at {address}"
        change = "check --address, that the cluster runs, and if it asks for a token, that RAY_AUTH_MODE is token here"
    try:
        if address is not None:
            _knock(address)
        with contextlib.ExitStack() as stack:
            if address is None:
                stack.enter_context(_lean_ray())
                stack.enter_context(_apart())
            ray.init(address or "local", logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray's has no class of its own for a node that is late
        raise StartError(
            "\n".join((where, f"  why:    {' '.join(str(error).split())}", f"  change: {change}"))
        ) from error
    finally:
        importer.join()


def _import_ahead(name: str) -> None:
    """What fails here fails again where it is needed; or a signal ended the other thread's import of the same."""
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextlib.contextmanager
def _neutral_folder() -> Iterator[None]:
    """Work in an empty folder: Ray puts ours on every worker's sys.path, where our `kernels` and `proto` mustn't lie bare."""
    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        os.chdir(_lasting_folder() or stack.enter_context(_temporary_folder()))
        try:
            yield
        finally:
            os.chdir(before)


def _lasting_folder() -> Path | None:
    """One for every start: whoever is killed leaves none behind. None where there is no place that is ours alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvasir" / "empty"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid()
        return folder if mine and not folder.is_symlink() and not any(folder.iterdir()) else None
    except OSError:
        return None


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvasir-", ignore_cleanup_errors=True)


def _check_room(config: ClusterConfig, *, own: bool) -> None:
    """Say so when the ranks' bundles can't be placed now. A Ray of our own won't grow: StartError."""
    import ray

    from kvasir.cluster.application import room

    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    asked = room(config, own_ray=own)
    lacking = {kind: count for kind, count in asked.items() if count > has.get(kind, 0)}
    if not lacking:
        return
    wanted = ", ".join(f"{count:g} {kind}" for kind, count in lacking.items())
    there = ", ".join(f"{has.get(kind, 0):g} {kind}" for kind in lacking)
    text = f"the models' ranks ask for {wanted}, the cluster has {there}"
    if own and "GPU" in lacking and not has.get("GPU"):
        raise StartError(f"--device cuda: {text}; --device cpu does without")
    if own:
        raise StartError(f"{text}; lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size")
    log.warning("%s: waiting for more nodes", text)


@contextlib.contextmanager
def _lean_ray() -> Iterator[None]:
    """Ray's own start without two processes that one machine has no use for: the API server of a dashboard that is off,
    and the autoscaler's monitor. Two cores: ray.init takes 2.4 s instead of 4.1, and 200 MiB are saved. There is no
    public switch; should Ray rename these methods, the processes start again.
    """
    from ray._private.node import Node

    kept = {name: vars(Node)[name] for name in ("start_api_server", "start_monitor") if name in vars(Node)}
    for name in kept:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Ray's servers are started in sessions of their own: a signal to our process group (of `kill %1`, of `timeout`) would end
    them before us, and what runs could neither finish nor be told. Nor is there a public switch for this.
    """
    from ray._private import services

    name = "ConsolePopen"
    kept = getattr(services, name)
    setattr(services, name, partial(kept, start_new_session=True))
    try:
        yield
    finally:
        setattr(services, name, kept)


def _deploy(config: ClusterConfig, make_engine: MakeEngine | None, *, own_ray: bool) -> None:
    import ray
    from ray import serve

    from kvasir.cluster.application import application, serve_logging
    from kvasir.cluster.rank_actor import load_engine

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=serve_logging(config.gateway.log_level))
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # what 127.0.0.1 means to who typed it
    make_engine = make_engine or load_engine
    app = application(config, os.environ, make_engine=make_engine, own_ray=own_ray, home=f"node:{here}")
    target = serve.RunTarget(app, name=APP, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _stop_ray() -> None:
    if ray := sys.modules.get("ray"):  # not where a signal came while it was imported
        ray.shutdown()
