"""The HTTP application as a whole: keys on every route, errors, limits, health, draining, TLS, CORS, traces."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvasir.cluster.app import RAY_ENVIRONMENT
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import create_app
from kvasir.cluster.options import parse_spec
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.errors import ConfigError, OverloadedError

BODY = {"model": "bytes", "prompt": "Hi"}
KEYS = GatewayConfig(api_key=("secret", "other"))


def complete(gateway, headers=None, **fields):
    return httpx.post(gateway.url + "/v1/completions", json=BODY | fields, headers=headers, timeout=60)


def walk(app):
    """(method, path) of every route."""
    return [(method, route.path) for route in app.routes for method in route.methods if method != "HEAD"]


def test_every_route_needs_a_key_but_an_explicit_list(live_gateway):
    with live_gateway(KEYS) as gateway, httpx.Client(base_url=gateway.url) as client:
        routes = walk(create_app(gateway.desk, KEYS))
        assert len(routes) >= 12
        open_paths = {"/", "/-/healthz", "/health", "/health/ready", "/openapi.json", "/docs"}
        for method, path in [
            *routes,
            ("POST", "/v1/no"),
            ("GET", "/health/"),
        ]:
            place = path.replace("{name:path}", "bytes")
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                reply = client.request(method, place, headers=headers)
                if path in open_paths:
                    assert reply.status_code == 200
                else:
                    assert reply.status_code == 401, path
                    assert _says_why(path, reply.json())
                    assert reply.headers["www-authenticate"] == "Bearer"
            for key in ("secret", "other"):
                reply = client.request(method, place, headers={"Authorization": f"Bearer {key}"})
                assert reply.status_code != 401, path


def _says_why(path, body):
    """Whether it is the error of the path's dialect."""
    if path.startswith("/api/"):
        return "API key" in body["error"]
    if path.startswith("/v1/messages"):
        return body["error"]["type"] == "authentication_error"
    return body["error"]["code"] == "invalid_api_key"


def test_anthropic_clients_send_their_key_elsewhere(live_gateway):
    with live_gateway(KEYS) as gateway:
        for key, status in (("secret", 400), ("wrong", 401)):
            assert httpx.post(gateway.url + "/v1/messages", json={}, headers={"x-api-key": key}).status_code == status


def test_app_refuses_to_be_exposed(live_gateway):
    with live_gateway() as gateway, pytest.raises(ConfigError, match="--insecure"):
        create_app(gateway.desk, GatewayConfig(host="0.0.0.0"))


def test_keys_are_never_logged(live_gateway, caplog):
    caplog.set_level(logging.DEBUG)
    with live_gateway(KEYS) as gateway:
        complete(gateway, {"Authorization": "Bearer secret"})
        complete(gateway, {"Authorization": "Bearer secretive"})
    assert "secret" not in caplog.text


def test_overload_and_retry_after(live_gateway):
    with live_gateway() as gateway:
        gateway.group.refusal = OverloadedError(
            "the queue is full: 1024 requests wait (--max-queue)", retry_after_s=3.4
        )
        reply = complete(gateway)
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3"
        assert reply.json()["error"]["type"] == "rate_limit_error"
        many = complete(gateway, prompt=["a"] * 5)
        assert many.status_code == 429
        assert gateway.desk.running == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
        ("/api/generate", {"prompt": "Hi", "stream": False}),
    ],
)
def test_who_asks_is_told_the_route(live_gateway, path, body):
    with live_gateway() as gateway:
        asked = httpx.post(gateway.url + path, json={"model": "bytes", **body}, headers={"kvasir-route": "1"})
        assert asked.headers["kvasir-route"].startswith(
            "policy=cost; why=only; group=fake; candidates=1; prompt_tokens="
        )
        assert asked.headers["kvasir-route"].count("policy=") == (2 if isinstance(body.get("prompt"), list) else 1)
        assert "kvasir-route" not in httpx.post(gateway.url + path, json={"model": "bytes", **body}).headers


def test_one_refusal_of_many_aborts_the_others(live_gateway):
    with live_gateway() as gateway:
        submit = gateway.group.submit
        gateway.group.step_s = 0.01

        async def fourth_is_refused(request, placement):
            if len(gateway.group.requests) == 3:
                raise OverloadedError("full", retry_after_s=1)
            return await submit(request, placement)

        gateway.group.submit = fourth_is_refused
        assert complete(gateway, prompt=["a"] * 6).status_code == 429
        assert gateway.group.running == 0


def test_health(live_gateway):
    with live_gateway() as gateway:
        assert httpx.get(gateway.url + "/health").json() == {"status": "ok"}
        assert httpx.get(gateway.url + "/health/ready").json() == {"status": "ok"}
        assert httpx.get(gateway.url + "/-/healthz").text == "success"
        probes = len(gateway.group.requests)
        assert probes == 1
        assert httpx.get(gateway.url + "/health/ready").status_code == 200
        assert len(gateway.group.requests) == probes  # proven once
        gateway.group.alive, gateway.group.last_error = False, "rank 0 ended with signal 9"
        for path in ("/health", "/health/ready"):
            reply = httpx.get(gateway.url + path)
            assert reply.status_code == 503
            assert "rank 0 ended with signal 9" in reply.json()["models"]["bytes"]
            assert reply.json()["error"]["code"] == "unavailable"
        refused = complete(gateway)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2"


def test_alive_but_not_able_to_decode(live_gateway):
    with live_gateway() as gateway:
        gateway.group.dies_after = 0
        assert httpx.get(gateway.url + "/health").status_code == 200
        reply = httpx.get(gateway.url + "/health/ready")
        assert reply.status_code == 503
        assert "the group died" in reply.text


def test_draining(live_gateway):
    with live_gateway() as gateway:
        gateway.group.step_s = 0.5
        with httpx.stream("POST", gateway.url + "/v1/completions", json=BODY | {"stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            gateway.desk.draining = True
            refused = complete(gateway)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "5"
            assert httpx.get(gateway.url + "/health/ready").status_code == 503
            assert httpx.get(gateway.url + "/health").status_code == 200
            assert httpx.get(gateway.url + "/-/healthz").status_code == 503
            assert gateway.desk.running == 1
            gateway.group.step_s = 0.001
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_abandoned_streams_say_so(live_gateway):
    with live_gateway() as gateway:
        gateway.group.script = lambda request, index: [65] * 1000
        gateway.group.step_s = 0.01
        body = BODY | {"stream": True, "max_tokens": 1000}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            gateway.call(gateway.desk.abandon)
            last = [line for line in lines if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "unavailable"
        assert gateway.group.running == 0


def test_cors(live_gateway):
    config = GatewayConfig(api_key=("k",), allowed_origins=("https://chat.example",))
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    with live_gateway(config) as gateway:
        preflight = httpx.options(gateway.url + "/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        reply = complete(gateway, {"Origin": "https://chat.example", "Authorization": "Bearer k"})
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        other = httpx.options(gateway.url + "/v1/chat/completions", headers=asked | {"Origin": "https://evil.example"})
        assert other.status_code == 400


def test_no_cors_unless_asked_for(gateway):
    assert "access-control-allow-origin" not in complete(gateway, {"Origin": "https://chat.example"}).headers


def test_certificates_and_keys_that_are_none(certificate, tmp_path):
    """They are named at once: the server's own errors name no file, and come when all else has started."""
    key, chain = certificate
    other, locked, text = tmp_path / "other.pem", tmp_path / "locked.pem", tmp_path / "text.pem"
    subprocess.run(["openssl", "genrsa", "-out", other, "2048"], check=True, capture_output=True)
    lock = ["openssl", "pkey", "-aes128", "-passout", "pass:secret", "-in", key, "-out", locked]
    subprocess.run(lock, check=True, capture_output=True)
    text.write_text("a certificate")
    wrong = {
        (text, key): f"--ssl-certfile {text} holds no certificate in PEM",
        (chain, other): f"--ssl-keyfile {other} isn't the key of --ssl-certfile {chain}",
        (chain, text): f"--ssl-keyfile {text} holds no private key",
        (chain, locked): f"--ssl-keyfile {locked} holds no private key without a password",
    }
    parse_spec({"ssl_certfile": str(chain), "ssl_keyfile": str(key)})
    for (cert, private), text in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(text)):
            parse_spec({"ssl_certfile": str(cert), "ssl_keyfile": str(private)})


def test_who_speaks_no_tls_fills_no_log(certificate):
    """As gateways are started: gRPC's core writes by itself, and looks at the environment when it is loaded."""
    script = """
import socket, sys, grpc
from concurrent.futures import ThreadPoolExecutor
key, chain = (open(name, "rb").read() for name in sys.argv[1:])
server = grpc.server(ThreadPoolExecutor(1))
port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
server.start()
with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
    sock.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
    assert sock.recv(1) == b""
server.stop(None).wait()
"""
    command, environ = [sys.executable, "-c", script, *map(str, certificate)], {**RAY_ENVIRONMENT, **os.environ}
    assert subprocess.run(command, check=True, capture_output=True, env=environ).stderr == b""


def test_tls_on_both_servers(live_gateway, certificate):
    import ssl

    import grpc

    from kvasir.proto import inference_pb2 as pb
    from kvasir.proto.inference_pb2_grpc import InferenceStub

    key, chain = certificate
    with live_gateway(GatewayConfig(ssl_keyfile=str(key), ssl_certfile=str(chain))) as gateway:
        context = ssl.create_default_context(cafile=str(chain))
        assert httpx.get(gateway.url + "/health", verify=context).status_code == 200
        with grpc.secure_channel(gateway.grpc_address, grpc.ssl_channel_credentials(chain.read_bytes())) as channel:
            assert InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=60).models[0].id == "bytes"


def test_version(gateway):
    assert httpx.get(gateway.url + "/version").json()["version"]


def test_request_log(live_gateway, caplog):
    caplog.set_level(logging.INFO, logger="kvasir.cluster.desk")
    with live_gateway(GatewayConfig(enable_log_requests=True)) as gateway:
        complete(gateway, {"X-Request-ID": "mine-7"}, prompt="do not tell")
    assert "mine-7 bytes: 11 + 15 tokens, 2 cached" in caplog.text
    assert "do not tell" not in caplog.text


def test_trace(live_gateway):
    """One tree: the caller's span, ours, and the stages under it; the group is told whose child it is."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with live_gateway(tracing=Tracing(provider)) as gateway:
        caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        reply = complete(gateway, {"traceparent": caller}, temperature=0.5)
        assert reply.status_code == 200
        given = gateway.group.requests[-1].trace_context["traceparent"]
    spans = {span.name: span for span in exporter.get_finished_spans()}
    server = spans["text_completion bytes"]
    assert f"{server.context.trace_id:032x}" == caller.split("-")[1]
    assert f"{server.parent.span_id:016x}" == caller.split("-")[2]
    assert given.split("-")[2] == f"{server.context.span_id:016x}"
    assert {spans[name].parent.span_id for name in ("admit", "route")} == {server.context.span_id}
    usage = reply.json()["usage"]
    assert server.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert server.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert server.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert server.attributes["gen_ai.request.temperature"] == 0.5


def test_one_write_per_step(live_gateway):
    """Four continuations of one step come in one HTTP chunk."""
    with live_gateway() as gateway:
        gateway.group.step_s = 0.02
        body = json.dumps(BODY | {"stream": True, "n": 4}).encode()
        host, port = gateway.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
            raw = b""
            while data := sock.recv(65536):
                raw += data
    chunks = [part for part in raw.split(b"\r\n\r\n", 1)[1].split(b"\r\n") if part.startswith(b"data: ")]
    texts = [chunk for chunk in chunks if chunk.count(b'"finish_reason":null') == 4]
    assert len(texts) >= 10


def test_many_streams_at_once(live_gateway):
    """100 clients, each gets its own text."""
    with live_gateway() as gateway:
        gateway.group.step_s = 0.001
        gateway.group.script = lambda request, index: list(request.prompt_token_ids) * 3
        found = {}

        def one(number):
            found[number] = complete(gateway, prompt=f"n{number}", max_tokens=100).json()["choices"][0]["text"]

        threads = [threading.Thread(target=one, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: f"n{number}" * 3 for number in range(100)}


def test_a_bug_is_a_plain_500(live_gateway, caplog):
    with live_gateway() as gateway:
        gateway.desk.directory = None
        reply = complete(gateway, {"X-Request-ID": "mine"})
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "internal error; the server's log says more"
        assert reply.headers["x-request-id"] == "mine"
    assert "AttributeError" in caplog.text
