"""`run` in a process of its own, over fake engines: requests, traces, deaths, signals, failures of the start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import ray
import ray.serve
from kvasir_server import child_of, descendants
from ray._private import services
from waiting import until

from kvasir.cluster import app, telemetry
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.cluster.gateway_replica import Addresses
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError

SERVE = """
import dataclasses, importlib.util, json, os, sys, time
conftest, model, served, timeout = sys.argv[1:]
sys.path.append(os.path.dirname(conftest))
from kvasir.cluster import app
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
spec = importlib.util.spec_from_file_location("fakes", conftest)
sys.modules["fakes"] = fakes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)
import ray
import ray.serve
ray.cloudpickle.register_pickle_by_value(fakes)
engine = EngineConfig(model=model, served_model_name=(served,))
gateways = int(os.environ.get("GATEWAYS", "1"))
gateway = GatewayConfig(port=0, grpc_port=0, ollama_port=0, drain_timeout_s=float(timeout), num_gateways=gateways)
try:
    running = app.run(ClusterConfig(engines=(engine,), gateway=gateway), make_engine=fakes.make_engine)
except KvasirError as error:
    sys.exit(error.message)
print(json.dumps([running.http_address, running.grpc_address, running.ollama_address]), flush=True)
running.wait()
running.drain_and_stop()
"""


def start(model, served="fake", timeout=60, **environ):
    conftest = Path(__file__).with_name("conftest.py")
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(conftest), str(model), served, str(timeout)],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def body(max_tokens, **more):
    return {"model": "fake", "prompt": "hello", "max_tokens": max_tokens, **more}


def answered(client, max_tokens, **more):
    """The answer of who asks again while the group is taken for dead: it may get no processor for a while."""
    ask = lambda: client.post("/v1/completions", json=body(max_tokens), **more)  # noqa: E731
    return until(lambda: (answer := ask()).status_code != 503 and answer)


@contextlib.contextmanager
def streamed(client, max_tokens):
    """The same as a stream's lines."""
    with contextlib.ExitStack() as stack:
        ask = lambda: client.stream("POST", "/v1/completions", json=body(max_tokens, stream=True))  # noqa: E731
        reply = until(lambda: (reply := stack.enter_context(ask())).status_code != 503 and reply)
        yield (line for line in reply.iter_lines() if line)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_life(byte_model, otlp_receiver):
    process = start(byte_model, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_receiver.endpoint)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        http, grpc, ollama = json.loads(line)
        assert grpc.startswith("127.0.0.1:")
        assert ollama != http
        assert httpx.get(ollama).text == "Ollama is running"
        with httpx.Client(base_url=http, timeout=60) as client:
            _answers_with_a_trace(client, otlp_receiver)
            _survives_the_death_of_its_rank(client, process.pid)
            _drains(client, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_metrics_of_gateways_that_share_a_port(byte_model):
    process = start(byte_model, GATEWAYS="2")
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        url = json.loads(line)[0]
        until(lambda: len(_gateways(url)) == 2)
        for _ in range(12):
            with httpx.Client(base_url=url, timeout=60) as client:  # a connection of its own
                assert answered(client, 3).status_code == 200
        until(
            lambda: {_ends(url) for _ in range(4)} == {12.0}
        )  # whichever is asked; one that is held up tells it later
        assert httpx.get(url + "/metrics").text.count("\nkvasir:group_alive{") == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _ends(url):
    """Requests that ended well, at all gateways."""
    text = httpx.get(url + "/metrics").text
    ends = re.findall(r'^vllm:request_success_total\{.*?gateway="(\w+)".*\} (\S+)$', text, re.MULTILINE)
    return sum(float(count) for _, count in ends)


def _gateways(url):
    return set(re.findall(r'gateway="(\w+)"', httpx.get(url + "/metrics").text))


def _answers_with_a_trace(client, receiver):
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    answer = answered(client, 5, headers={"traceparent": f"00-{trace}-{caller}-01"}).json()
    assert answer["usage"]["completion_tokens"] == 5
    spans = receiver.trace(trace, {"text_completion fake", "queue", "prefill", "decode"})
    assert {span.trace_id.hex() for span in receiver.spans} == {trace}
    root = spans["text_completion fake"]
    assert root.parent_span_id.hex() == caller
    assert all(span.parent_span_id == root.span_id for name, span in spans.items() if name != root.name)
    usage = receiver.attributes(root)
    assert usage[telemetry.USAGE_OUTPUT_TOKENS] == answer["usage"]["completion_tokens"]
    assert usage[telemetry.USAGE_INPUT_TOKENS] == answer["usage"]["prompt_tokens"]


def _survives_the_death_of_its_rank(client, pid):
    """The stream pauses until the rank is replaced, and goes on with the token that was due."""
    rank, raylet = child_of(pid, "ray::RankActor"), child_of(pid, r"\S+/raylet ")
    with streamed(client, 300) as lines:
        first = next(lines)
        os.kill(raylet, signal.SIGSTOP)  # there is no new rank before we have looked
        try:
            os.kill(rank, signal.SIGKILL)
            until(lambda: httpx.get(client.base_url.join("/health")).status_code == 503)
        finally:
            os.kill(raylet, signal.SIGCONT)
        *events, last = [first, *lines]
    assert last == "data: [DONE]"
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
    assert text == "".join(chr(65 + i % 26) for i in range(300))
    until(lambda: client.get("/health").status_code == 200)


def _drains(client, process):
    children = descendants(process.pid)
    with streamed(client, 200) as lines:
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: _refused(client))
        assert [*lines][-1] == "data: [DONE]"
    assert process.wait(timeout=150) == 0
    until(lambda: not [child for child in children if Path(f"/proc/{child}").exists()])


def _refused(client):
    try:
        return client.post("/v1/completions", json=body(1)).status_code == 503
    except httpx.TransportError:
        return True


@pytest.mark.ray
def test_a_start_that_fails_ends_with_a_plain_block(byte_model):
    process = start(byte_model, served="wrong")
    out, err = process.communicate(timeout=150)
    assert process.returncode == 1
    assert out == ""
    assert err.strip().splitlines() == [
        "model 'wrong' could not be started",
        "  why:    max_model_len is 9 and the model allows 8 (see --max-model-len)",
        "  change: correct that, then start again",
    ]


def config(model, **gateway):
    return ClusterConfig(engines=(EngineConfig(model=str(model)),), gateway=GatewayConfig(**gateway))


def test_a_port_in_use_is_told_before_anything_starts(byte_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, ports in (("port", {"port": port}), ("grpc-port", {"port": 0, "grpc_port": port})):
            with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}: .*see --host and --{flag}"):
                app.run(config(byte_model, **ports))


def test_a_layout_that_a_model_cannot_have_is_told_before_ray_starts(monkeypatch):
    monkeypatch.setattr(app, "_start_ray", lambda *_: pytest.fail("Ray was started"))
    engine = EngineConfig(model="skald", pipeline_parallel_size=99)
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 99: this model has"):
        app.run(ClusterConfig(engines=(engine,), gateway=GatewayConfig(port=0, grpc_port=0)))


@pytest.fixture
def running(monkeypatch):
    monkeypatch.setattr(app, "SAME_SIGNAL_S", 60.0)  # whatever holds up who sends them
    reserved = contextlib.ExitStack()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield app.Running(GatewayConfig(), Addresses("", None), own_ray=True, reserved=reserved)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_before_it_waits_ends_it_too(running):
    running.catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    running.wait()


def test_one_wish_may_come_as_several_signals(running, monkeypatch):
    """A process group's and make's; only a later one ends the process at once."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    running.catch_signals()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    running.wait()
    assert codes == []
    monkeypatch.setattr(app, "SAME_SIGNAL_S", -1.0)
    signal.raise_signal(signal.SIGINT)
    assert codes == [130]


def test_a_signal_in_the_middle_of_another(running):
    """At every line of the handler: an Event's lock was held by the one and waited for by the other."""
    running.catch_signals()
    lines = []

    def again(frame, *_):
        if len(lines) < 100:
            lines.append(frame.f_lineno)
            signal.raise_signal(signal.SIGTERM)
        return again

    sys.settrace(again)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        sys.settrace(None)
    assert lines
    running.wait()


def test_a_signal_while_ray_is_imported(byte_model, monkeypatch):
    """What was imported of it is gone, and can't be imported again."""

    def interrupted(*_):
        monkeypatch.setitem(sys.modules, "ray", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "_start_ray", interrupted)
    with pytest.raises(KeyboardInterrupt):
        app.run(config(byte_model, port=0, grpc_port=-1))


@pytest.fixture
def serve_by_hand(byte_model, monkeypatch):
    """run(error, applications, address): what was done when the start ended with the error. `gateway`: its state then."""

    def run(error, applications, address=None, gateway="STARTING"):
        done = []

        def deploy(*_, **__):
            applications.setdefault(app.APP, application(gateway))

        def failed(*_):
            raise error

        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications=applications))
        monkeypatch.setattr(ray.serve, "delete", lambda name: done.append(f"delete {name}"))
        monkeypatch.setattr(app, "wait_until_ready", failed)
        monkeypatch.setattr(app, "_ask_gateways", lambda _, method, *__, **___: done.append(method))
        monkeypatch.setattr(app, "_stop_ray", lambda: done.append("stop"))
        monkeypatch.setattr(app, "_deploy", deploy)
        for name in ("_start_ray", "_check_room"):
            monkeypatch.setattr(app, name, lambda *_, **__: None)
        with pytest.raises(type(error)):
            app.run(config(byte_model, port=0, grpc_port=-1), address=address)
        return done

    return run


def application(state):
    return SimpleNamespace(deployments={"Gateway": SimpleNamespace(replica_states={state: 1})})


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), SystemExit()])
def test_a_signal_before_all_models_are_served_drains(serve_by_hand, signalled):
    """A gateway that is there may answer for some. Where there is none, asking it would take as long as draining."""
    assert serve_by_hand(signalled, {}) == ["stop"]
    assert serve_by_hand(signalled, {}, gateway="RUNNING") == ["drain", "stop"]


@pytest.mark.parametrize("error", [app.StartError("no"), KeyboardInterrupt()])
def test_a_start_that_fails_leaves_a_cluster_as_it_was(serve_by_hand, caplog, error):
    others = {"theirs": application("RUNNING")}
    assert serve_by_hand(error, {**others}, "auto") == ["delete kvasir", "stop"]
    assert not caplog.text
    assert serve_by_hand(error, {**others, app.APP: application("RUNNING")}, "auto") == ["stop"]
    assert "this cluster serves Kvasir already" in caplog.text


def test_why_a_start_failed_is_told_though_the_cluster_is_gone(serve_by_hand, monkeypatch, caplog):
    def gone(*_, **__):
        raise ConnectionError("no controller")

    monkeypatch.setattr(app, "_end_application", gone)
    assert serve_by_hand(app.StartError("no"), {}, "auto") == ["stop"]
    assert "`serve delete kvasir`): no controller" in caplog.text


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError):
        app.run(config(tmp_path / "nothing", port=0, grpc_port=0))


def test_ready_is_said_when_every_gateway_has_every_model(monkeypatch):
    """Be it that one died since Serve called them all running, or is held up, or hasn't found a group yet."""
    here, there = Addresses("http://here", None), Addresses("http://there", None)
    whole = [(here, {}), (there, {})]
    told = [TimeoutError(), [(there, {})], [(there, {}), (here, {"skald": "loading"})], whole]

    def ask(*_, **__):
        if isinstance(answer := told.pop(0), Exception):
            raise answer
        return answer

    statuses = iter(["DEPLOYING", "RUNNING", "UNHEALTHY", "RUNNING", "RUNNING", "RUNNING"])
    status = lambda: SimpleNamespace(applications={app.APP: SimpleNamespace(status=next(statuses))})  # noqa: E731
    monkeypatch.setattr(ray.serve, "status", status)
    monkeypatch.setattr(app, "_ask_gateways", ask)
    assert app.wait_until_ready(app.APP, 2) == here
    assert not told
    monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(app.StartError, match="'kvasir' was deleted while it started"):
        app.wait_until_ready(app.APP, 2)


TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture
def token_file(byte_model, monkeypatch, tmp_path):
    """start(**environment): as far as Ray; returns where Ray looks for its token."""

    def start(**environment):
        for name in TOKEN_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ray, "init", lambda *_, **__: (_ for _ in ()).throw(Exception("not now")))
        with pytest.raises(app.StartError):
            app.run(config(byte_model, port=0, grpc_port=-1))
        return tmp_path / ".ray" / "auth_token"

    return start


def test_the_token_of_our_own_ray_is_ours_alone(token_file):
    path = token_file()
    token = path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)  # as Ray itself writes it
    assert token_file().read_text() == token
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written(token_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # to have it taken back
    (tmp_path / "file").touch()
    token_file(HOME=str(tmp_path / "file"))
    assert re.fullmatch("[0-9a-f]{64}", os.environ["RAY_AUTH_TOKEN"])


@pytest.mark.parametrize("variable", TOKEN_VARIABLES)
def test_a_token_or_a_mode_of_the_user_stays(token_file, variable):
    assert not token_file(**{variable: "disabled"}).exists()


def test_where_nothing_listens_ray_is_not_asked(byte_model, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("it tries for minutes"))
    with socket.socket() as held:  # so that nobody else listens there either
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(app.StartError, match=f"no Ray cluster could be joined at {address}\n  why: .*refused"):
            app.run(config(byte_model, port=0, grpc_port=-1), address=address)


@pytest.mark.parametrize(
    ("engine", "change"), [({"device": "cuda"}, "--device cpu"), ({}, "lower --tensor-parallel-size")]
)
def test_ranks_for_which_there_is_no_room(monkeypatch, engine, change):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    engine = EngineConfig(**{"model": "skald", "tensor_parallel_size": 2, **engine})
    with pytest.raises(app.StartError, match=change):
        app._check_room(ClusterConfig(engines=(engine,)), own=True)


def test_ray_s_servers_have_sessions_of_their_own():
    """A signal to our process group isn't one to them."""
    with app._apart(), services.ConsolePopen(["sleep", "60"], creationflags=0) as process:
        try:
            assert os.getsid(process.pid) == process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("address", "what"),
    [(None, "Ray could not be started here"), ("auto", "no Ray cluster could be joined at auto")],
)
def test_a_ray_that_is_late_is_told_plainly(byte_model, monkeypatch, address, what):
    def late(*_, **__):
        raise Exception("The current node timed out during startup.\nIt may be busy.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(app.StartError) as caught:
        app.run(config(byte_model, port=0, grpc_port=-1), address=address)
    first, why, change = caught.value.message.splitlines()
    assert first.startswith(what)
    assert why == "  why:    The current node timed out during startup. It may be busy."
    assert change.startswith("  change: ")
