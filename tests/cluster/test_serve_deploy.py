"""One spec by every way to start it: `serve deploy` and what KubeRay sends, to a Ray of their own (`kvasir serve --config` is
tests/test_deploy.py's)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCRIPT = """
import http.client, json, subprocess, sys, time, urllib.request
from pathlib import Path
import ray, yaml
from ray import serve
from kvasir.cluster.sockets import bound_socket

def asked(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()

def until(condition):
    limit = time.monotonic() + 200
    while True:
        try:
            return condition()
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < limit, "it didn't happen"
            time.sleep(0.1)

def said(port, model):
    body = {"model": model, "prompt": "Once", "max_tokens": 4, "temperature": 0}
    answer = until(lambda: asked(f"http://127.0.0.1:{port}/v1/completions", body))
    return json.loads(answer)["choices"][0]["text"]

specs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
held = [bound_socket("127.0.0.1", 0, shared=True) for _ in specs]  # nobody takes them before gateways do
ports = [one.getsockname()[1] for one in held]
for spec, port in zip(specs, ports):
    spec["applications"][0]["args"] |= {"port": port, "grpc_port": 0}
context = ray.init("local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1",
                   object_store_memory=80 * 2**20, log_to_driver=False, logging_level="ERROR")
api = "http://" + context.dashboard_url
written = folder / "spec.yaml"
written.write_text(yaml.safe_dump(specs[0]))
command = [str(Path(sys.executable).with_name("serve")), "deploy", str(written), "--address", api]
until(lambda: asked(api + "/api/version"))
subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
found = [said(ports[0], "skald")]
until(lambda: asked(api + "/api/serve/applications/", specs[1], "PUT"))
found.append(said(ports[1], "stories"))
print(json.dumps(found), flush=True)
serve.shutdown()
ray.shutdown()
"""


def test_serve_deploy_and_kuberay(tmp_path, data):
    """deploy/specs/skald.yaml by the command line; then the resource's serveConfigV2, put where KubeRay puts it, of a model that is
    here and on CPUs."""
    first = yaml.safe_load((DEPLOY / "specs/skald.yaml").read_text())
    resource = next(yaml.safe_load_all((DEPLOY / "kubernetes/rayservice.yaml").read_text()))
    second = yaml.safe_load(resource["spec"]["serveConfigV2"])
    here = {
        "model": str(data("model-stories260k/hf")), "served_model_name": ["stories"], "device": "cpu", "num_threads": 1,
        "tensor_parallel_size": 2, "max_model_len": 256, "kv_disk_size": 0, "host": "127.0.0.1",
    }  # fmt: skip
    arguments = second["applications"][0]["args"]
    assert here.keys() - arguments.keys() == {"num_threads"}
    arguments |= here
    for name in ("api_key_file", "insecure", "kv_disk_path"):
        del arguments[name]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([first, second]), str(tmp_path)],
        capture_output=True, text=True, timeout=500, cwd=tmp_path, check=False,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    texts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('["')))
    assert len(texts) == 2
    assert all(texts)
