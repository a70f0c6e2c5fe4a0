"""What is shipped to start clusters with is what Ray, Serve and our own options take."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from kvasir.cluster.options import parse_spec, read_yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CLUSTERS = sorted((DEPLOY / "ray").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Any:
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return json.loads(path.read_text())


def applications(text: str) -> list[dict[str, Any]]:
    config = yaml.safe_load(text)
    ServeDeploySchema.model_validate(config)
    found: list[dict[str, Any]] = config["applications"]
    return found


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_clusters_are_what_ray_up_takes(path: Path, schema: Any) -> None:
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
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
    assert application["import_path"] == "kvasir.cluster.app:build"


def test_the_cluster_s_models() -> None:
    (application,) = applications((DEPLOY / "specs/cluster.yaml").read_text())
    first, second = parse_spec(application["args"]).engines
    assert (first.ranks, first.data_parallel_size, first.max_model_len) == (8, 2, 32000)
    assert second.ranks == 1


def test_kubernetes_says_the_same() -> None:
    resource = yaml.safe_load((DEPLOY / "kubernetes/rayservice.yaml").read_text())
    assert (resource["kind"], resource["apiVersion"]) == ("RayService", "ray.io/v1")
    (application,) = applications(resource["spec"]["serveConfigV2"])
    arguments = application["args"]
    keys = arguments.pop("api_key_file")
    head, (workers,) = (resource["spec"]["rayClusterConfig"][name] for name in ("headGroupSpec", "workerGroupSpecs"))
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert os.path.dirname(keys) in {mount["mountPath"] for mount in container["volumeMounts"]}
    (engine,) = parse_spec(arguments | {"api_key": "k"}).engines
    assert engine.ranks == int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])


def test_the_example_of_config() -> None:
    config = parse_spec(read_yaml(DEPLOY / "specs/serve.yaml"))
    first, second = config.engines
    assert (first.model, first.served_model_name, first.max_model_len) == ("skald", ("skald", "default"), 1000)
    assert (second.model, second.max_num_seqs) == ("skald-draft", 16)
    assert config.gateway.drain_timeout_s == 30
