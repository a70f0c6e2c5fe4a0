"""The Serve application of a configuration: GPUs, variables and places, without a cluster."""

from __future__ import annotations

import logging
import os
from collections import Counter

import pytest
import ray

from kvasir.cluster import app, gateway_replica, placement
from kvasir.cluster.application import application, room
from kvasir.cluster.options import parse_spec
from kvasir.engine.config import EngineConfig

HEAD_ALONE = {"CPU": 2.0, "node:__internal_head__": 1.0}


@pytest.fixture
def cluster(monkeypatch):
    def has(*nodes):
        """Its nodes' resources, all free."""
        resources = sum(map(Counter, nodes), Counter())
        known = {str(number): node for number, node in enumerate(nodes)}
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        monkeypatch.setattr(
            ray, "nodes", lambda: [{"NodeID": name, "Alive": True, "Resources": node} for name, node in known.items()]
        )
        monkeypatch.setattr(placement, "available_resources_per_node", lambda: known)

    return has


def groups(spec, **how):
    """(bundles, engine, setup) of each Group deployment."""
    made = application(parse_spec(spec), {}, **how)._bound_deployment
    found = [one._bound_deployment for one in made.init_args[2:]]
    return [(one._replica_config.placement_group_bundles, one.init_args[0], one.init_args[3]) for one in found]


@pytest.mark.parametrize("there", [HEAD_ALONE, HEAD_ALONE | {"GPU": 1.0}, {"CPU": 64.0, "GPU": 16.0}])
@pytest.mark.parametrize(("spec", "ranks"), [({"data_parallel_size": 4}, 1), ({"tensor_parallel_size": 2}, 2)])
def test_cuda_is_a_whole_gpu_per_rank_whatever_has_joined_yet(spec, ranks, there, cluster):
    cluster(there)
    ((bundles, engine, _),) = groups({"device": "cuda", **spec})
    together = ranks if there.get("GPU", 0) >= ranks else 1
    assert bundles == [{"CPU": 1.0 * together, "GPU": 1.0 * together}] * (ranks // together)
    assert engine.device == "cuda"
    assert room(parse_spec({"device": "cuda", **spec}), own_ray=False)["GPU"] == ranks * engine.data_parallel_size


def test_auto_takes_gpus_where_the_cluster_has_some(cluster, caplog):
    cluster({"CPU": 8.0, "GPU": 1.0})
    models = [
        {"model": "skald"},
        {"model": "skald-draft"},
        {"model": "skald", "device": "cpu", "served_model_name": "c"},
    ]
    found = groups({"models": models})
    assert [bundles for bundles, _, _ in found] == [[{"CPU": 1.0, "GPU": 1.0}]] * 2 + [[{"CPU": 1.0}]]
    assert not caplog.records


def test_auto_says_that_it_stays_on_cpus(cluster, caplog):
    """Ray hides no GPU from who asked for none: a rank on a node that joins later would take the first one."""
    cluster(HEAD_ALONE)
    with caplog.at_level(logging.WARNING):
        ((bundles, engine, _),) = groups({"model": "skald"})
    assert (bundles, engine.device) == ([{"CPU": 1.0}], "cpu")
    assert "skald: this cluster has no GPU now, so it runs on CPUs; --device cuda waits for GPUs" in caplog.text


def test_our_own_ray_shares_the_gpus_of_this_machine(cluster, caplog):
    for there, gpus in (({"GPU": 1.0}, 0.25), ({}, 0.0), ({"GPU": 8.0}, 1.0)):
        cluster({"CPU": 8.0, **there})
        ((bundles, engine, _),) = groups({"data_parallel_size": 4}, own_ray=True)
        assert bundles == [{"CPU": 1.0} | ({"GPU": gpus} if gpus else {})]
        assert engine.device == "auto"
    assert not caplog.records


def test_what_the_shell_says_of_the_hub_reaches_ranks_and_gateways():
    environ = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://hub", "KVASIR_API_KEY": "k", "HOME": "/x"}
    made = application(parse_spec({"model": "skald"}), environ)._bound_deployment
    (group,) = made.init_args[2:]
    assert group._bound_deployment.init_args[3].network == {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://hub"}
    assert made.init_args[1] == {key: environ[key] for key in ("HF_TOKEN", "HF_ENDPOINT", "KVASIR_API_KEY")}


def test_what_a_node_has_for_the_hub_goes_before_the_shell_s(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HF_HOME": "/node", "KVASIR_API_KEY": "old"})
    gateway_replica.enter({"HF_HOME": "/shell", "HF_TOKEN": "hf_secret", "KVASIR_API_KEY": "k"})
    assert os.environ == {"HF_HOME": "/node", "HF_TOKEN": "hf_secret", "KVASIR_API_KEY": "k"}


@pytest.mark.parametrize(
    ("host", "how", "options"),
    [
        ("127.0.0.1", {"home": "node:10.0.0.7"}, {"num_cpus": 0, "resources": {"node:10.0.0.7": 0.001}}),
        ("localhost", {}, {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}),
        ("0.0.0.0", {"home": "node:10.0.0.7"}, {"num_cpus": 0.1}),
        ("127.0.0.1", {"own_ray": True}, {"num_cpus": 0.1}),
    ],
)
def test_gateways_that_only_their_node_reaches_are_on_a_known_node(host, how, options):
    made = application(parse_spec({"model": "skald", "host": host}), {}, **how)._bound_deployment
    assert made.ray_actor_options.items() >= options.items()
    assert made.ray_actor_options.get("resources") == options.get("resources")


def test_paths_are_absolute_in_a_cluster_that_was_joined(tmp_path, monkeypatch):
    """Its processes work in another folder."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(config, address):
        seen.append((config.engines[0].model, address))
        raise app.StartError("enough")

    monkeypatch.setattr(app, "_start_ray", stop)
    with pytest.raises(app.StartError, match="enough"):
        app.run(parse_spec({"model": "model"}), address="10.0.0.1:6379")
    assert seen == [(str(tmp_path / "model"), "10.0.0.1:6379")]


@pytest.mark.parametrize(
    ("given", "kept"),
    [({}, ("auto", None)), ({"kv_disk_path": "/nvme/kv"}, ("/nvme/kv", None)), ({"kv_disk_size": 0}, ("auto", 0))],
)
def test_what_is_served_keeps_blocks_on_the_disk_and_an_llm_does_not(given, kept, cluster):
    cluster(HEAD_ALONE)
    ((_, engine, _),) = groups({"model": "skald", **given})
    assert (engine.kv_disk_path, engine.kv_disk_size) == kept
    assert EngineConfig(model="skald").kv_disk_path is None
