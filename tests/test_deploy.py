"""Every file that users are told to start from must load."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvasir.cluster.options import parse_spec, read_yaml

SPECS = Path(__file__).resolve().parents[1] / "deploy" / "specs"


def test_the_serve_config_is_one() -> None:
    from ray.serve.schema import ServeDeploySchema

    spec = yaml.safe_load((SPECS / "skald.yaml").read_text())
    parsed = ServeDeploySchema.model_validate(spec)
    (application,) = parsed.applications
    assert application.import_path == "kvasir.cluster.app:build"
    config = parse_spec(application.args)
    assert config.engines[0].model == "skald"
    assert config.gateway.port == 8000


def test_the_example_of_config() -> None:
    config = parse_spec(read_yaml(SPECS / "serve.yaml"))
    first, second = config.engines
    assert (first.model, first.served_model_name, first.max_model_len) == ("skald", ("skald", "default"), 1000)
    assert (second.model, second.max_num_seqs) == ("skald-draft", 16)
    assert config.gateway.drain_timeout_s == 30
