"""The Serve application of a configuration: a Gateway deployment, and a Group deployment per model."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment

from kvasir.cluster import telemetry
from kvasir.cluster.auth import KEY_VARIABLES, is_local
from kvasir.cluster.config import ClusterConfig
from kvasir.cluster.gateway_replica import HUB, Gateway
from kvasir.cluster.group import Group
from kvasir.cluster.placement import bundles, shares
from kvasir.cluster.rank_actor import MakeEngine, RankSetup, load_engine
from kvasir.cluster.unplaced import GATEWAY_CPUS
from kvasir.engine.config import EngineConfig, Role
from kvasir.engine.errors import ConfigError

log = logging.getLogger(__name__)

COMMON: dict[str, Any] = {
    "max_constructor_retry_count": 1,
    "health_check_period_s": 2,
    "health_check_timeout_s": 5,
    "graceful_shutdown_wait_loop_s": 0.1,
}
"""A start that fails is told at once, not tried 20 times; health is asked often."""
NETWORK = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "GLOO_", "UCX_", "FI_")
"""How the variables begin of libraries that move tensors between ranks."""
HEAD = "node:__internal_head__"
"""Ray's resource of the head node."""


def serve_logging(level: str) -> dict[str, Any]:
    """Serve's own logs, unless debugging, say with tracebacks what ours say in a line."""
    return {"log_level": "INFO" if level == "debug" else "CRITICAL", "enable_access_log": False}


def application(
    config: ClusterConfig,
    environ: Mapping[str, str],
    *,
    make_engine: MakeEngine = load_engine,
    own_ray: bool = False,
    home: str = HEAD,
) -> Application:
    """`own_ray`: Ray is ours alone, on this machine. `home`: resource of the node on which gateways that only their own
    node can reach belong."""
    kinds = [(name, role) for name, _, role in config.deployments]
    if len(set(kinds)) < len(kinds):
        names = ", ".join(name for name, _ in kinds)
        raise ConfigError(f"two models have the same name: {names}", param="served_model_name")
    otel = telemetry.otel_environment(environ)
    keys = {name: environ[name] for name in KEY_VARIABLES if name in environ}
    hub = {name: value for name, value in environ.items() if name.startswith(HUB)}
    level, drain_s = config.gateway.log_level, config.gateway.drain_timeout_s
    group_host = "127.0.0.1" if own_ray else None
    setup = RankSetup(make_engine, otel, level, group_host, drain_s, network_variables(environ) | hub)
    groups = []
    asked = [(engine, gpus_per_rank(engine, config, own_ray)) for _, engine, _ in config.deployments]
    parts = [1] * len(asked) if own_ray else shares(asked)
    for (name, engine, role), (_, gpus), share in zip(config.deployments, asked, parts, strict=True):
        if not own_ray and engine.device == "auto" and not gpus:  # a rank that lands beside a GPU would take it, though
            log.warning("%s: this cluster has no GPU now, so it runs on CPUs; --device cuda waits for GPUs", name)
            engine = replace(engine, device="cpu")
        group = group_deployment(name, engine, gpus, level, role=role, drain_s=drain_s, share=share)
        groups.append(group.bind(with_disk(engine), name, gpus, setup))
    actor: dict[str, Any] = {"num_cpus": GATEWAY_CPUS}
    if is_local(config.gateway.host) and not own_ray:
        actor = {"num_cpus": 0, "resources": {home: 0.001}}
    gateway: Deployment = serve.deployment(Gateway).options(  # type: ignore[attr-defined]
        num_replicas=config.gateway.num_gateways,
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5,
        logging_config=serve_logging(level),
        **COMMON,
    )
    return gateway.bind(config, hub | otel | keys, *groups)


def network_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What steers exchanges between ranks (NCCL_SOCKET_IFNAME, NCCL_DEBUG...): Ray starts ranks in environments of its own."""
    return {name: value for name, value in environ.items() if name.startswith(NETWORK)}


def with_disk(engine: EngineConfig) -> EngineConfig:
    """What is served keeps its KV blocks on the disk, unless it was told where, or not to (--kv-disk-size 0)."""
    return engine if engine.kv_disk_path else replace(engine, kv_disk_path="auto")


def group_deployment(
    name: str,
    engine: EngineConfig,
    gpus: float,
    log_level: str,
    *,
    role: Role = "both",
    drain_s: float = 0.0,
    share: int = 1,
) -> Deployment:
    """Groups of one model and role: in each a coordinator and, in the same placement group, its ranks; `gpus` per rank, `share`
    of which are in one bundle.
    Their role can be changed in Serve's user_config, and without Serve."""
    suffix = "" if role == "both" else f"-{role}"
    deployment: Deployment = serve.deployment(Group).options(  # type: ignore[attr-defined]
        name="Group-" + re.sub(r"[^\w.-]+", "-", name) + suffix,
        user_config={"role": role},
        num_replicas=engine.data_parallel_size,
        placement_group_bundles=bundles(engine, gpus, share),
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain_s + 10,
        logging_config=serve_logging(log_level),
        **COMMON,
    )
    return deployment


def room(config: ClusterConfig, *, own_ray: bool) -> Counter[str]:
    """What all groups ask of the cluster together."""
    asked = Counter[str]()
    for engine in config.engines:
        for bundle in bundles(engine, gpus_per_rank(engine, config, own_ray)) * engine.data_parallel_size:
            asked.update(bundle)  # shares of a GPU add up, too
    return asked


def gpus_per_rank(engine: EngineConfig, config: ClusterConfig, own_ray: bool) -> float:
    """A GPU for each rank; alone on a machine a share when there are fewer than ranks. None for the CPU, and for `auto` where
    there are none. A cluster may be no more than its head yet: `cuda` doesn't ask what is there."""
    if engine.device == "cpu":
        return 0.0
    known: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    there = known.get("GPU", 0.0)
    if not own_ray:
        return 1.0 if there or engine.device == "cuda" else 0.0
    if any(engine.device == "cuda" for engine in config.engines):
        there = max(there, 1.0)
    if there and any(engine.ranks > 1 for engine in config.engines):
        return 1.0  # ranks that exchange tensors by NCCL can't share a GPU
    return min(1.0, there / sum(one.ranks * one.data_parallel_size for one in config.engines if one.device != "cpu"))
