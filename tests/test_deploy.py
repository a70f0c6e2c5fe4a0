"""What is shipped to start clusters with is what Ray, Serve and our own options take."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from kvasir.cluster.app import build
from kvasir.cluster.cli import _cluster_config, _parser
from kvasir.cluster.config import ClusterConfig
from kvasir.cluster.options import BUILD, parse_spec, read_yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CLUSTERS = sorted((DEPLOY / "ray").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Any:
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text())


SDKS = {"aws": "boto3", "gcp": "google-api-python-client"}
"""What Ray's autoscaler, which runs in .venv on the head, makes nodes with."""


def applications(text: str) -> list[dict[str, Any]]:
    config = yaml.safe_load(text)
    ServeDeploySchema.model_validate(config)
    found: list[dict[str, Any]] = config["applications"]
    return found


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_clusters_are_what_ray_up_takes(path: Path, schema: Any) -> None:
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)  # with Ray's own commands where ours say nothing
    validate_config(prepared)
    kinds = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    for line in (line for kind in kinds for line in prepared[f"{kind}_commands"]):
        assert not re.search(r"(?<!\.venv/bin/)\bpip3? install", line), f"the system's pip may refuse: {line}"
        assert "FI_PROVIDER=efa" not in line or "InterfaceType: efa" in path.read_text()
    setup = [*prepared["head_setup_commands"]]
    venv = next(i for i, line in enumerate(setup) if "python3 -m venv .venv" in line)
    if sdk := SDKS.get(path.stem):
        assert any(sdk in line and ".venv/bin/pip install -c constraints.txt" in line for line in setup[venv + 1 :])
        assert any("apt-get install" in line and "python3-venv" in line for line in setup[:venv])
        assert any("python3-venv" in line for line in prepared["worker_setup_commands"])
    assert config["file_mounts"], "nodes get Kvasir from this checkout"
    if "available_node_types" in config:
        assert config["head_node_type"] in config["available_node_types"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any(
            "ray start" in command and "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1" in command for command in commands
        )
    named = [word for line in path.read_text().splitlines() for word in line.split() if word.startswith("deploy/")]
    assert all((DEPLOY.parent / word.rstrip("'")).exists() for word in named), named


@pytest.mark.parametrize("name", ["specs/skald.yaml", "specs/cluster.yaml", "specs/roles.yaml"])
def test_specs_are_what_serve_and_our_options_take(name: str) -> None:
    (application,) = applications((DEPLOY / name).read_text())
    config = parse_spec(application["args"])
    assert config.engines
    assert application["import_path"] == f"{build.__module__}:{build.__name__}" == BUILD
    assert all(engine.device == "cuda" for engine in config.engines) or name == "specs/skald.yaml"
    assert by_command_line(DEPLOY / name) == config


def by_command_line(path: Path) -> ClusterConfig:
    """What `kvasir serve --config` makes of it."""
    return _cluster_config(_parser().parse_args(["serve", "--config", str(path)]))


def test_the_cluster_s_models() -> None:
    (application,) = applications((DEPLOY / "specs/cluster.yaml").read_text())
    first, second = parse_spec(application["args"]).engines
    assert (first.ranks, first.data_parallel_size, first.max_model_len) == (8, 2, 32000)
    assert second.ranks == 1


def test_kubernetes_says_the_same(tmp_path: Path) -> None:
    resource, service = yaml.safe_load_all((DEPLOY / "kubernetes/rayservice.yaml").read_text())
    assert (resource["kind"], resource["apiVersion"]) == ("RayService", "ray.io/v1")
    (application,) = applications(resource["spec"]["serveConfigV2"])
    arguments = application["args"]
    keys = arguments.pop("api_key_file")
    head, (workers,) = (resource["spec"]["rayClusterConfig"][name] for name in ("headGroupSpec", "workerGroupSpecs"))
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert os.path.dirname(keys) in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {(port["name"], port["containerPort"]) for port in container["ports"]} >= {
            ("serve", 8000),
            ("grpc", 9000),
        }
        assert "readinessProbe" not in container, (
            "KubeRay's own asks for a gateway: without one a pod must get no traffic"
        )
        labels = group["template"]["metadata"]["labels"]
        assert service["spec"]["selector"] == labels | {"ray.io/serve": "true"}
    config = parse_spec(arguments | {"api_key": "k"})
    spec = tmp_path / "spec.yaml"
    spec.write_text(resource["spec"]["serveConfigV2"].replace(f"api_key_file: {keys}", "api_key: k"))
    assert by_command_line(spec) == config
    (engine,) = config.engines
    assert engine.device == "cuda"
    assert (
        {port["port"] for port in service["spec"]["ports"]}
        == {arguments["port"], arguments["grpc_port"]}
        == {8000, 9000}
    )
    assert engine.ranks == int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])


def test_the_example_of_config() -> None:
    config = parse_spec(read_yaml(DEPLOY / "specs/serve.yaml"))
    first, second = config.engines
    assert (first.model, first.served_model_name, first.max_model_len) == ("skald", ("skald", "default"), 1000)
    assert (second.model, second.max_num_seqs) == ("skald-draft", 16)
    assert config.gateway.drain_timeout_s == 30
