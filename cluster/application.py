"""The Serve application of a configuration: a Gateway deployment, and a Group deployment per model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment

from kvasir.cluster import telemetry
from kvasir.cluster.auth import KEY_VARIABLES
from kvasir.cluster.config import ClusterConfig
from kvasir.cluster.gateway_replica import Gateway
from kvasir.cluster.group import Group, bundles
from kvasir.cluster.rank_actor import MakeEngine, RankSetup, load_engine
from kvasir.engine.config import EngineConfig, Role
from kvasir.engine.errors import ConfigError

COMMON: dict[str, Any] = {
    "max_constructor_retry_count": 1,
    "health_check_period_s": 2,
    "health_check_timeout_s": 5,
    "graceful_shutdown_wait_loop_s": 0.1,
}
"""A start that fails is told at once, not tried 20 times; health is asked often."""
NETWORK = ("NCCL_", "TORCH_NCCL_", "TORCH_SYMM_MEM_", "GLOO_", "UCX_", "FI_")
"""How the variables begin of libraries that move tensors between ranks."""


def serve_logging(level: str) -> dict[str, Any]:
    """Serve's own logs, unless debugging, say with tracebacks what ours say in a line."""
    return {"log_level": "INFO" if level == "debug" else "CRITICAL", "enable_access_log": False}


def application(
    config: ClusterConfig,
    environ: Mapping[str, str],
    *,
    make_engine: MakeEngine = load_engine,
    group_host: str | None = None,
) -> Application:
    """`group_host`: the address on which groups listen for gateways; default: their node's."""
    kinds = [(name, role) for name, _, role in config.deployments]
    if len(set(kinds)) < len(kinds):
        names = ", ".join(name for name, _ in kinds)
        raise ConfigError(f"two models have the same name: {names}", param="served_model_name")
    otel = telemetry.otel_environment(environ)
    keys = {name: environ[name] for name in KEY_VARIABLES if name in environ}
    gpus, level = _gpus(config), config.gateway.log_level
    drain_s = config.gateway.drain_timeout_s
    setup = RankSetup(make_engine, otel, level, group_host, drain_s, network_variables(environ))
    groups = [
        group_deployment(name, engine, gpus, level, role=role, drain_s=drain_s).bind(
            with_disk(engine), name, gpus, setup
        )
        for name, engine, role in config.deployments
    ]
    gateway: Deployment = serve.deployment(Gateway).options(  # type: ignore[attr-defined]
        num_replicas=config.gateway.num_gateways,
        ray_actor_options={"num_cpus": 0.1},  # not 0: it mustn't land on a head node that takes no work
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5,
        logging_config=serve_logging(level),
        **COMMON,
    )
    return gateway.bind(config, otel | keys, *groups)


def network_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What steers exchanges between ranks (NCCL_SOCKET_IFNAME, NCCL_DEBUG...): Ray starts ranks in environments of its own."""
    return {name: value for name, value in environ.items() if name.startswith(NETWORK)}


def with_disk(engine: EngineConfig) -> EngineConfig:
    """What is served keeps its KV blocks on the disk, unless it was told where, or not to (--kv-disk-size 0)."""
    return engine if engine.kv_disk_path else replace(engine, kv_disk_path="auto")


def group_deployment(
    name: str, engine: EngineConfig, gpus: float, log_level: str, *, role: Role = "both", drain_s: float = 0.0
) -> Deployment:
    """Groups of one model and role: in each a coordinator and, in the same placement group, its ranks; `gpus` per rank.
    Their role can be changed in Serve's user_config, and without Serve."""
    suffix = "" if role == "both" else f"-{role}"
    deployment: Deployment = serve.deployment(Group).options(  # type: ignore[attr-defined]
        name="Group-" + re.sub(r"[^\w.-]+", "-", name) + suffix,
        user_config={"role": role},
        num_replicas=engine.data_parallel_size,
        placement_group_bundles=bundles(engine, gpus),
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain_s + 10,
        logging_config=serve_logging(log_level),
        **COMMON,
    )
    return deployment


def room(config: ClusterConfig) -> Counter[str]:
    """What all groups ask of the cluster together."""
    gpus, asked = _gpus(config), Counter[str]()
    for engine in config.engines:
        for bundle in bundles(engine, gpus) * engine.data_parallel_size:
            asked.update(bundle)  # shares of a GPU add up, too
    return asked


def _gpus(config: ClusterConfig) -> float:
    """GPUs per rank: one each; a share when there are fewer than ranks; none where there are none."""
    wanting = sum(engine.ranks * engine.data_parallel_size for engine in config.engines if engine.device != "cpu")
    known: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    there = known.get("GPU", 0.0)
    if any(engine.device == "cuda" for engine in config.engines):
        there = max(there, 1.0)
    if there and any(engine.ranks > 1 for engine in config.engines):
        return 1.0  # ranks that exchange tensors by NCCL can't share a GPU
    return min(1.0, there / wanting) if wanting else 0.0
