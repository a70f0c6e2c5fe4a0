"""Roles: in specs and flags, in the routes of an operator, and in Serve's user_config."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from kvasir.cluster.application import application
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway_replica import Finder
from kvasir.cluster.group import Group
from kvasir.cluster.groups_api import Groups
from kvasir.cluster.options import parse_spec
from kvasir.cluster.wire import Endpoint
from kvasir.engine.errors import ConfigError


@pytest.mark.parametrize(
    "groups",
    [
        "prefill=1,decode=3",
        {"prefill": 1, "decode": 3},
        [{"role": "prefill"}, {"role": "decode", "count": 3}],
        [{"role": "prefill", "count": "1"}, {"role": "decode", "count": 3}],
    ],
)
def test_groups_by_role(groups):
    config = parse_spec({"model": "skald", "groups": groups, "max_model_len": 512})
    assert [(name, engine.data_parallel_size, role) for name, engine, role in config.deployments] == [
        ("skald", 1, "prefill"),
        ("skald", 3, "decode"),
    ]
    assert [engine.max_model_len for engine in config.models] == [512]


def test_what_groups_run_otherwise():
    groups = [
        {"role": "prefill", "max-num-batched-tokens": "8k", "tensor_parallel_size": 2},
        {"role": "both", "count": 2},
    ]
    config = parse_spec({"models": [{"model": "skald", "groups": groups}, {"model": "skald-draft"}]})
    assert [(name, role) for name, _, role in config.deployments] == [
        ("skald", "prefill"),
        ("skald", "both"),
        ("skald-draft", "both"),
    ]
    assert [engine.tensor_parallel_size for engine in config.engines] == [2, 1, 1]
    assert config.engines[0].max_num_batched_tokens == 8000
    assert len(config.models) == 2


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"groups": "prefill"}, "prefill=1,decode=3"),
        ({"groups": "prefil=1"}, "^groups: role must be one of both, prefill, decode"),
        ({"groups": [{"role": "decode"}, {"role": "prefil"}]}, r"^groups\[1\]: role must be one of"),
        ({"groups": [{"role": "prefill", "count": 0}]}, r"^groups\[0\]: count must be"),
        ({"groups": "prefill=0"}, "^groups: count must be a whole number from 1"),
        ({"groups": "prefill=1,prefill=2"}, "names a role twice"),
        ({"groups": []}, "groups must be"),
        ({"groups": [3]}, r"groups\[0\] must be"),
        ({"groups": [{"role": "prefill", "port": 1}]}, "unknown option|belongs"),
        ({"groups": [{"role": "prefill", "max_model_lenn": 1}]}, "did you mean 'max_model_len'"),
        ({"groups": [{"role": "prefill", "model": "x"}]}, "belongs beside groups"),
        ({"groups": "prefill=1", "data_parallel_size": 2}, r"either groups \(--groups\) or data_parallel_size"),
    ],
)
def test_what_is_wrong_is_said(spec, why):
    with pytest.raises(ConfigError, match=why):
        parse_spec({"model": "skald", **spec})


@pytest.mark.ray
def test_deployments_are_named_by_role(serve_on_ray):
    app = application(parse_spec({"model": "skald", "groups": "prefill=1,decode=3"}), {})
    found = [one._bound_deployment for one in app._bound_deployment.init_args[2:]]
    assert [(one.name, one.num_replicas, one.user_config) for one in found] == [
        ("Group-skald-prefill", 1, {"role": "prefill"}),
        ("Group-skald-decode", 3, {"role": "decode"}),
    ]


def test_serves_user_config():
    told = []

    async def change_role(role):
        told.append(role)

    group = SimpleNamespace(_change_role=change_role)
    asyncio.run(Group.reconfigure(group, {"role": "decode"}))
    assert told == ["decode"]
    for wrong, why in ({"role": "x"}, "one of both"), ({"rolle": "both"}, "unknown key 'rolle'"):
        with pytest.raises(ConfigError, match=why):
            asyncio.run(Group.reconfigure(group, wrong))


def test_the_routes_need_the_key(live_gateway):
    with live_gateway(GatewayConfig(api_key=("secret",))) as gateway:
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(gateway.url + "/v1/groups").status_code == 401
        body = httpx.get(gateway.url + "/v1/groups", headers=key).json()
        assert body["data"] == [
            {"object": "group", "id": "group-1", "model": "bytes", "role": "both", "state": "alive", "running": 3,
             "waiting": 1}
        ]  # fmt: skip
        assert httpx.post(gateway.url + "/v1/groups/group-1", json={"role": "decode"}).status_code == 401


def test_a_role_is_changed_or_it_is_said_why_not(live_gateway, monkeypatch):
    asked = []

    async def set_role(self, model, name, role):
        asked.append((model, name, role))
        return role != "both"

    with live_gateway(GatewayConfig(max_body_bytes=1024)) as gateway:
        post = lambda name, **body: httpx.post(f"{gateway.url}/v1/groups/{name}", **body)  # noqa: E731
        unreachable = post("group-1", json={"role": "decode"})
        assert (unreachable.status_code, "doesn't answer" in unreachable.text) == (503, True)
        route = next(one for one in gateway.app.router.routes if getattr(one, "path", "") == "/v1/groups/{name}")
        groups = route.endpoint.__self__
        assert isinstance(groups, Groups)
        monkeypatch.setattr(groups, "_set_role", lambda *call: set_role(None, *call))
        answer = post("group-1", json={"role": "decode"})
        assert (answer.status_code, answer.json()["role"]) == (200, "decode")
        assert asked == [("bytes", "group-1", "decode")]
        assert post("group-2", json={"role": "decode"}).status_code == 404
        for body in (b"{", b'{"role": "x"}', b"{}", b'{"role": "both", "y": 1}', b"[]"):
            assert post("group-1", content=body, headers={"Content-Type": "application/json"}).status_code == 400
        plain = post("group-1", content=b'{"role": "decode"}', headers={"Content-Type": "text/plain"})
        assert (plain.status_code, "Content-Type: application/json" in plain.text) == (415, True)
        large = post("group-1", json={"role": "decode", "y": "y" * 2000})
        assert (large.status_code, "--max-body-bytes" in large.text) == (413, True)


def test_metrics_say_who_is_what(gateway):
    text = httpx.get(gateway.url + "/metrics").text
    assert 'kvasir:group_role{engine="group-1",model_name="bytes",role="both"} 1.0' in text
    assert 'kvasir:group_draining{engine="group-1",model_name="bytes"} 0.0' in text


class Replicas:
    """A deployment's handle: `answers` of its replicas."""

    def __init__(self, *answers):
        self.answers = answers

    def broadcast(self, method):
        assert method == "endpoint"
        return self

    async def results_async(self, timeout_s, return_exceptions):
        return [*self.answers]


def test_a_replica_that_does_not_answer_is_where_it_was():
    places = [Endpoint(f"127.0.0.1:{port}", f"life {port}", "token") for port in range(4)]
    one, two, three, four = ((place, None) for place in places)
    prefill, decode = Replicas(one, two), Replicas(three)
    finder = Finder([prefill, decode])
    told = lambda: asyncio.run(finder.endpoints())  # noqa: E731
    assert told() == places[:3]
    prefill.answers = (one, RuntimeError("busy"))
    assert told() == places[:3]
    prefill.answers = (RuntimeError("busy"), RuntimeError("busy"))
    assert told() == places[:3]
    prefill.answers = (one, four, RuntimeError("busy"))
    assert told() == [places[0], places[3], places[1], places[2]]
    prefill.answers = (four,)
    assert told() == [places[3], places[2]]
