"""Pages of other sites at a server that needs no key."""

from __future__ import annotations

import httpx
import pytest

from kvasir.cluster.auth import ApiKeys
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.origins import ForbiddenError, Origins

FORM = "multipart/form-data; boundary=x"
NONE = ApiKeys(())


def allows(origins, method="GET", **headers):
    try:
        origins.check(method, {name.replace("_", "-"): value for name, value in headers.items()})
    except ForbiddenError:
        return False
    return True


OURS = ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "192.168.1.2", "Localhost.", "me", "a.localhost", "")


@pytest.mark.parametrize("host", [*OURS, "host.docker.internal:11434"])
def test_names_that_lead_to_this_machine(host):
    assert allows(Origins(GatewayConfig(), NONE), host=host)


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "evil.example.", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_names_that_anybody_can_have_made_lead_here(host):
    assert not allows(Origins(GatewayConfig(), NONE), host=host)
    assert allows(Origins(GatewayConfig(allowed_origins=("https://" + host.rstrip("."),)), NONE), host=host)
    assert allows(Origins(GatewayConfig(allowed_origins=("*",)), NONE), host=host)
    assert allows(Origins(GatewayConfig(), ApiKeys(["a"])), host=host)
    assert allows(Origins(GatewayConfig(host="0.0.0.0", insecure=True), NONE), host=host)


def test_forms_of_other_pages():
    for config in (GatewayConfig(), GatewayConfig(host="0.0.0.0", insecure=True)):
        origins = Origins(config, NONE)
        for origin in ("https://evil.example", "null", "http://localhost:3000", "http://[x", ""):
            assert not allows(origins, "POST", host="localhost:8000", origin=origin, content_type=FORM)
            assert not allows(origins, "POST", host="localhost:8000", origin=origin)
            assert allows(origins, "POST", host="localhost:8000", origin=origin, content_type="application/json")
            assert allows(origins, "GET", host="localhost:8000", origin=origin)
        assert allows(origins, "POST", host="localhost:8000", origin="http://localhost:8000", content_type=FORM)
        assert allows(origins, "POST", host="localhost:8000", content_type=FORM)
    given = Origins(GatewayConfig(allowed_origins=("http://localhost:3000",)), NONE)
    assert allows(given, "POST", host="localhost:8000", origin="http://localhost:3000", content_type=FORM)


def test_a_page_that_was_made_to_lead_here_reads_nothing(gateway):
    reply = httpx.get(gateway.url + "/v1/files", headers={"Host": "evil.example"})
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "forbidden"
    assert "--allowed-origins" in reply.json()["error"]["message"]
    assert reply.headers["x-request-id"]
    assert httpx.get(gateway.url + "/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_page_of_another_site_uploads_nothing(gateway):
    def upload(**headers):
        form = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}")}}
        return httpx.post(gateway.url + "/v1/files", headers=headers, **form).status_code

    assert upload(Origin="https://evil.example") == 403
    assert upload() == 200
