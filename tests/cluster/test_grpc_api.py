"""kvasir.v1.Inference over a real socket, by a client that knows nothing but what reflection says."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from waiting import until

from kvasir.cluster import grpc_api
from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import OverloadedError, UnsupportedError
from kvasir.engine.request import NESTED, SamplingParams
from kvasir.proto import inference_pb2
from kvasir.proto.inference_pb2_grpc import InferenceStub

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "user", "content": "Hi"}]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Client:
    """Messages and methods come from reflection; bodies are dicts."""

    def __init__(self, address, metadata=()):
        self.channel = grpc.insecure_channel(address)
        self.pool = DescriptorPool(ProtoReflectionDescriptorDatabase(_WithMetadata(self.channel, metadata)))
        self.service = self.pool.FindServiceByName("kvasir.v1.Inference")

    def call(self, method, body, **options):
        found = self.service.methods_by_name[method]
        request = ParseDict(body, GetMessageClass(found.input_type)())
        make = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        reply = GetMessageClass(found.output_type)
        path = f"/kvasir.v1.Inference/{method}"
        rpc = make(path, type(request).SerializeToString, reply.FromString, _registered_method=False)
        return rpc(request, **{"timeout": 10, **options})

    def text(self, method, body):
        return "".join(reply.text for reply in self.call(method, body))


class _WithMetadata:
    """A channel for the reflection database, which passes none."""

    def __init__(self, channel, metadata):
        self._channel = channel
        self._metadata = metadata

    def stream_stream(self, *args, **options):
        call = self._channel.stream_stream(*args, **options)
        return lambda requests, **more: call(requests, metadata=self._metadata, **more)


@pytest.fixture(scope="module")
def client(gateway):
    client = Client(gateway.grpc_address)
    yield client
    client.channel.close()


@pytest.fixture
def connect():
    """A client for a gateway of the test's own."""
    clients = []

    def make(gateway, **options):
        clients.append(Client(gateway.grpc_address, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.channel.close()


def refused(calling, *args, **options):
    """The RpcError of a call."""

    def call():
        found = calling(*args, **options)
        return list(found) if hasattr(found, "__next__") else found

    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_generate(gateway, client):
    call = client.call("Generate", {"model": "bytes", "text": "Hi"}, metadata=(("x-request-id", "mine"),))
    replies = list(call)
    assert dict(call.initial_metadata())["x-request-id"] == "mine"
    assert {reply.request_id for reply in replies} == {"mine"}
    assert {reply.model for reply in replies} == {"bytes"}
    assert "".join(reply.text for reply in replies) == TEXT
    assert [token for reply in replies for token in reply.token_ids] == [*TEXT.encode(), 256]
    assert [reply.finish_reason for reply in replies if reply.finish_reason] == [1]
    usage = replies[-1].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (2, 2, 15)
    assert gateway.group.requests[-1].sampling.max_tokens == 16


def test_who_asks_is_told_the_route(client):
    call = client.call("Generate", {"model": "bytes", "text": "Hi"}, metadata=(("kvasir-route", "1"),))
    list(call)
    assert "why=only" in dict(call.trailing_metadata())["kvasir-route"]


def test_generate_from_ids_and_by_default_model(gateway, client):
    body = {"prompt_token_ids": {"ids": [72, 105]}, "sampling": {"max_tokens": 3}, "return_prompt_token_ids": True}
    replies = list(client.call("Generate", body))
    assert list(replies[0].prompt_token_ids) == [72, 105]
    assert [r.prompt_token_ids for r in replies[1:]] == [[]] * (len(replies) - 1)
    assert "".join(reply.text for reply in replies) == "Hel"
    assert [reply.finish_reason for reply in replies if reply.finish_reason] == [2]


@pytest.fixture
def embedder(gateway, monkeypatch):
    """The group's model can embed, and nothing else."""
    monkeypatch.setattr(gateway.group, "info", dataclasses.replace(gateway.group.info, tasks=("embed",)))
    return gateway


def test_embed(embedder, client):
    gateway = embedder
    gateway.group.vector = lambda request: [float(len(request.prompt_token_ids)), 0.25]
    inputs = [{"text": "abc"}, {"token_ids": {"ids": [5, 6]}}]
    body = {
        "model": "bytes",
        "inputs": inputs,
        "dimensions": 2,
        "normalize": False,
        "priority": 4,
        "return_timing": True,
    }
    reply = client.call("Embed", body, metadata=(("x-request-id", "mine"),))
    assert [list(one.values) for one in reply.embeddings] == [[3.0, 0.25], [2.0, 0.25]]
    assert [one.prompt_tokens for one in reply.embeddings] == [3, 2]
    assert (reply.request_id, reply.model, reply.timing.group) == ("mine", "bytes", "group-1")
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens, reply.usage.completion_tokens) == (5, 2, 0)
    request = gateway.group.requests[-1]
    assert (request.pooling.dimensions, request.pooling.normalize, request.priority) == (2, False, 4)
    assert 9 < request.deadline_s < 10.5
    reply = client.call("Embed", {"inputs": [{"text": "x" * 5000}], "truncate_prompt_tokens": -1})
    assert reply.usage.truncated_tokens == 904
    assert len(gateway.group.requests[-1].prompt_token_ids) == 4096


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ({"inputs": [{}]}, "inputs"),
        ({"inputs": [{"text": "a"}, {"token_ids": {}}]}, "inputs[1]"),
        ({"inputs": [{"text": "a"}, {"token_ids": {"ids": [9999]}}]}, "inputs[1]"),
        ({"inputs": [{"text": "a"}], "dimensions": 0}, "dimensions"),
        ({"inputs": [{"text": "a"}], "prompt_name": "query"}, "prompt_name"),
        ({"inputs": [{"text": "x" * 5000}]}, "inputs"),
    ],
)
def test_embed_refusals(embedder, client, body, param):
    error = refused(client.call, "Embed", body)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["kvasir-param"] == param


def test_chat(gateway, client):
    assert client.text("Chat", {"model": "alias/bytes", "messages": MESSAGES}) == TEXT
    request = gateway.group.requests[-1]
    assert list(request.prompt_token_ids) == [257, *b"Hi", 256, 258]
    assert request.sampling.max_tokens is None
    assert request.sampling.temperature == 0.25  # generation_config.json's
    assert 9 < request.deadline_s < 10.5  # the wire rounds it


def test_chat_with_tools_and_calls(gateway, client):
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"id": "c", "name": "weather", "arguments": "{}"}]},
        {"role": "tool", "content": "rain", "tool_call_id": "c"},
    ]
    tools = [{"name": "weather", "parameters": {"type": "object"}}]
    body = {"messages": messages, "tools": tools, "tool_choice": "none", "template_variables": {"mood": "good"}}
    assert client.text("Chat", body) == TEXT
    assert b'"weather"' in bytes(i for i in gateway.group.requests[-1].prompt_token_ids if i < 256)
    error = refused(client.call, "Chat", body | {"tool_choice": "other"})
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["kvasir-param"] == "tool_choice"


def test_what_says_how_to_think_and_call(thinker, connect):
    thinker.group.script = lambda request, index: [*b"Yes.", 256]
    client = connect(thinker)
    tools = [{"name": name, "parameters": {"type": "object"}} for name in ("weather", "time")]
    said = [*MESSAGES, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, *MESSAGES]
    body = {
        "messages": said,
        "tools": tools,
        "allowed_tools": ["time"],
        "tool_choice": "required",
        "reasoning_effort": "low",
    }
    call = client.call("Chat", body)
    list(call)
    tag = thinker.group.requests[-1].sampling.structured_outputs.structural_tag
    assert ("time" in tag, "weather" in tag) == (True, False)
    assert "reasoning_effort" in dict(call.trailing_metadata())["x-kvasir-warning"]
    for wrong, param in (
        ({"allowed_tools": ["other"]}, "tool_choice"),
        ({"allowed_tools": ["time"], "tool_choice": "none"}, "tool_choice"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
    ):
        error = refused(client.call, "Chat", {"messages": MESSAGES, "tools": tools, **wrong})
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())["kvasir-param"] == param


def test_continuations_stop_strings_and_logprobs(client):
    sampling = {"n": 2, "stop": ["wör"], "logprobs": 2, "prompt_logprobs": 1}
    replies = list(client.call("Generate", {"text": "Hi", "sampling": sampling}))
    for index in range(2):
        mine = [reply for reply in replies if reply.index == index and not reply.HasField("usage")]
        assert "".join(reply.text for reply in mine) == "Hello, "
        assert mine[-1].stop_string == "wör"
        first = mine[0].logprobs[0]
        assert (first.token_id, first.text, first.logprob, first.rank) == (72, "H", -0.5, 1)
        assert [(top.text, top.logprob) for top in first.top] == [("H", -0.5), ("A", -1.0)]
    scored = replies[0].prompt_logprobs
    assert not scored[0].HasField("logprob")
    assert scored[1].logprob == -0.5


def test_every_sampling_field_is_reachable(gateway, client):
    """The message has a field for each of SamplingParams, and each arrives, set to what isn't its default."""
    message = client.pool.FindMessageTypeByName("kvasir.v1.Sampling")
    assert set(message.fields_by_name) == set(SamplingParams.__dataclass_fields__)
    given = {
        "n": 2, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "presence_penalty": 1.0, "frequency_penalty": 0.5,
        "repetition_penalty": 1.5, "logit_bias": {"5": -2.0}, "seed": -7, "stop_token_ids": [9], "min_tokens": 1,
        "include_stop_str_in_output": True, "max_tokens": 2, "ignore_eos": True, "logprobs": 0,
        "prompt_logprobs": 0, "prompt_logprob_start": 1,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "detokenize": False,
        "structured_outputs": {"regex": "a+"}, "thoughts": {"begin": [4], "end": [5, 6], "budget": 7},
        "repeat_last_n": 5, "penalize_newline": False, "typical_p": 0.5,
        "tfs_z": 0.75, "mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.25, "bad_words": ["x", "é"],
        "allowed_token_ids": [7, 8], "truncate_prompt_tokens": 1, "truncation_side": "right", "num_keep": 1, "best_of": 3,
        "use_beam_search": True, "length_penalty": -0.5, "early_stopping": "never",
        "logits_processors": {"x": '{"a": 1}'},
        "deterministic": True,
    }  # fmt: skip
    assert set(given) == set(message.fields_by_name) - {"stop"}
    assert client.text("Generate", {"text": "a", "sampling": given, "priority": -3, "cache_salt": "s"}) == ""
    request = gateway.group.requests[-1]
    for name, value in given.items():
        found = getattr(request.sampling, name)
        expected = {int(key): bias for key, bias in value.items()} if name == "logit_bias" else value
        expected = NESTED[name](**value) if name in NESTED else expected
        assert (list(found) if isinstance(value, list) else found) == expected
    assert (request.priority, request.cache_salt) == (-3, "s")


def test_what_was_cut_off_is_told(client):
    sampling = {"truncate_prompt_tokens": 3, "num_keep": 1}
    replies = [*client.call("Generate", {"text": "abcdefgh", "sampling": sampling, "return_prompt_token_ids": True})]
    assert bytes(replies[0].prompt_token_ids) == b"agh"
    assert (replies[-1].usage.prompt_tokens, replies[-1].usage.truncated_tokens) == (3, 5)


def test_tokenize_and_detokenize(client):
    reply = client.call("Tokenize", {"text": "Hi"})
    assert (list(reply.token_ids), reply.max_model_len) == ([72, 105], 4096)
    chat = client.call("Tokenize", {"messages": MESSAGES, "add_generation_prompt": False})
    assert list(chat.token_ids) == [257, *b"Hi", 256]
    assert client.call("Detokenize", {"token_ids": [72, 256]}).text == "H<|end|>"
    assert client.call("Detokenize", {"token_ids": [72, 256], "skip_special_tokens": True}).text == "H"
    assert refused(client.call, "Detokenize", {"token_ids": [261]}).code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (
        refused(client.call, "Tokenize", {"text": "a", "messages": MESSAGES}).code() == grpc.StatusCode.INVALID_ARGUMENT
    )


def test_tokenize_what_chats_hold(client):
    reply = client.call("Tokenize", {"messages": MESSAGES, "tools": [{"name": "f"}], "return_token_texts": True})
    assert list(reply.token_texts[:3]) == ["<|user|>", "H", "i"]
    assert '"name": "f"' in "".join(reply.token_texts)
    opened = {"messages": [*MESSAGES, {"role": "assistant", "content": "Yes"}], "add_generation_prompt": False}
    reply = client.call("Tokenize", {**opened, "continue_final_message": True, "return_token_texts": True})
    assert "".join(reply.token_texts).endswith("Yes")
    for field, value in (
        ("tools", [{"name": "f"}]),
        ("template_variables", {"a": 1}),
        ("continue_final_message", True),
    ):
        error = refused(client.call, "Tokenize", {"text": "a", field: value})
        assert dict(error.trailing_metadata())["kvasir-param"] == field


def test_fields_of_a_newer_client_are_told(gateway, client):
    request = inference_pb2.GenerateRequest(text="Hi")
    request.sampling.MergeFromString(b"\xf8\x7f\x01")  # field 2047
    call = InferenceStub(client.channel).Generate(request, timeout=60)
    list(call)
    assert dict(call.trailing_metadata())["x-kvasir-warning"] == "ignored: sampling.field 2047"


def test_models(client):
    models = client.call("ListModels", {}).models
    assert [(m.id, m.root, m.max_model_len, m.vocab_size, m.ready) for m in models] == [
        ("bytes", "bytes", 4096, 261, True), ("alias/bytes", "bytes", 4096, 261, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "body", "code", "param"),
    [
        ("Generate", {"text": "a", "sampling": {"temperature": -1}}, "INVALID_ARGUMENT", "temperature"),
        ("Generate", {"text": "a", "sampling": {"max_tokens": 9999}}, "INVALID_ARGUMENT", "max_tokens"),
        ("Generate", {"model": "bytes"}, "INVALID_ARGUMENT", "prompt"),
        ("Generate", {"prompt_token_ids": {"ids": [300]}}, "INVALID_ARGUMENT", "prompt"),
        ("Generate", {"text": "a", "model": "other"}, "NOT_FOUND", "model"),
        ("Chat", {"model": "bytes"}, "INVALID_ARGUMENT", "messages"),
        ("Chat", {"messages": MESSAGES, "template_variables": {"tools": 1}}, "INVALID_ARGUMENT", "template_variables"),
        ("Tokenize", {"text": "a", "model": "other"}, "NOT_FOUND", "model"),
    ],
)
def test_refusals(client, method, body, code, param):
    error = refused(client.call, method, body)
    assert error.code() == grpc.StatusCode[code]
    assert dict(error.trailing_metadata())["kvasir-param"] == param


def test_errors_with_long_texts(live_gateway, connect):
    """Their status arrives: what is too long for clients' metadata, they take for another error."""
    with live_gateway() as gateway:
        for letter in "aö語🙂":
            gateway.group.refusal = UnsupportedError(letter * 10_000)
            error = refused(connect(gateway).call, "Generate", {"text": "a"})
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == letter * (2000 // len(letter.encode()))
        unknown = refused(connect(gateway).call, "Generate", {"text": "a", "model": "ö" * 10_000})
        assert unknown.details().endswith("isn't served here; there is: bytes, alias/bytes")


def test_bad_request_id(client):
    error = refused(client.call, "Generate", {"text": "a"}, metadata=(("x-request-id", "a b"),))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_overload_unavailable_and_failure(live_gateway, connect):
    with live_gateway() as gateway:
        client = connect(gateway)
        gateway.group.refusal = OverloadedError("the queue is full", retry_after_s=2.0)
        error = refused(client.call, "Generate", {"text": "a"})
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "2"
        gateway.group.refusal, gateway.group.dies_after = None, 2
        error = refused(client.call, "Chat", {"messages": MESSAGES})
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the group died")
        gateway.desk.draining = True
        assert refused(client.call, "Generate", {"text": "a"}).code() == grpc.StatusCode.UNAVAILABLE


def test_cancellation_and_deadline_free_the_blocks(live_gateway, connect):
    with live_gateway() as gateway:
        client = connect(gateway)
        gateway.group.step_s = 0.05  # longer than anybody waits for an end
        gateway.group.script = lambda request, index: [65] * 2000
        body = {"text": "a", "sampling": {"n": 2, "max_tokens": 2000}}
        call = client.call("Generate", body)
        next(call)
        assert gateway.group.running == 1
        call.cancel()
        until(lambda: not gateway.group.running)
        error = refused(client.call, "Generate", body, timeout=1.5)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: not gateway.group.running)
        until(lambda: not gateway.desk.running)
        assert gateway.group.requests[-1].deadline_s < 1.6


def test_slow_client_is_cut_off(live_gateway, connect):
    with live_gateway(GatewayConfig(max_stream_buffer=50)) as gateway:
        gateway.group.script = lambda request, index: [65] * 4000
        body = {"text": "a", "sampling": {"n": 20, "max_tokens": 4000, "ignore_eos": True, "logprobs": 20}}
        call = connect(gateway).call("Generate", body, timeout=60)
        until(lambda: gateway.group.aborted and not gateway.group.running, limit_s=60)
        error = refused(lambda: call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "reads too slowly" in error.details()


def test_a_client_that_takes_nothing_is_left(live_gateway, monkeypatch):
    """Its request ends, though its answer isn't long enough to be more than is held for it; it is told when it reads again."""
    monkeypatch.setattr(grpc_api, "_gone_after", lambda limit_s: [])  # it is there, but may be held up
    little = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    with (
        live_gateway(GatewayConfig(receive_timeout_s=0.3)) as gateway,
        grpc.insecure_channel(gateway.grpc_address, little) as channel,
    ):
        gateway.group.script = lambda request, index: [65] * 2000
        sampling = inference_pb2.Sampling(max_tokens=2000, logprobs=20)
        call = InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="a", sampling=sampling))
        until(lambda: gateway.group.requests and not gateway.desk.running)
        error = refused(lambda: call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "took no message for 0.3 s (--receive-timeout)" in error.details()


def test_a_client_that_vanished_holds_no_connection(live_gateway):
    """Nor its request: a machine that is gone says no goodbye, and nothing may be there to be sent to it for long."""
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and it never answers a ping
    with live_gateway(GatewayConfig(receive_timeout_s=0.4)) as gateway:
        host, port = gateway.grpc_address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            sock.sendall(begin)
            while sock.recv(4096):
                pass


def test_keys(live_gateway, connect):
    with live_gateway(GatewayConfig(api_key=("secret",))) as gateway:
        with_key = (("authorization", "Bearer secret"),)
        client = connect(gateway, metadata=with_key)
        for method in client.service.methods_by_name:
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                error = refused(client.call, method, {}, metadata=metadata)
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED, method
                assert error.details().endswith("send the metadata authorization: Bearer KEY")
        assert len(client.call("ListModels", {}, metadata=with_key).models) == 2
        assert refused(Client, gateway.grpc_address).code() == grpc.StatusCode.UNAUTHENTICATED  # reflection
        unknown = client.channel.unary_unary("/kvasir.v1.Inference/Nothing", _registered_method=False)
        assert refused(unknown, b"").code() == grpc.StatusCode.UNAUTHENTICATED
        assert refused(unknown, b"", metadata=with_key).code() == grpc.StatusCode.UNIMPLEMENTED
        health = health_pb2_grpc.HealthStub(client.channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING


def test_health(live_gateway, connect):
    with live_gateway() as gateway:
        stub = health_pb2_grpc.HealthStub(connect(gateway).channel)
        for service in ("", "kvasir.v1.Inference", "bytes", "alias/bytes"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status == SERVING
        listed = stub.List(health_pb2.HealthListRequest(), timeout=60).statuses
        assert {"", "kvasir.v1.Responses", "alias/bytes"} < set(listed)
        assert {one.status for one in listed.values()} == {SERVING}
        unknown = health_pb2.HealthCheckRequest(service="other")
        assert refused(stub.Check, unknown, timeout=60).code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="bytes"), timeout=60)
        assert next(watch).status == SERVING
        gateway.group.alive = False
        assert next(watch).status == NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status == NOT_SERVING
        gateway.group.alive = True
        assert next(watch).status == SERVING
        watch.cancel()


def test_streams_that_watch_health_are_few_and_look_together(live_gateway, connect, monkeypatch):
    monkeypatch.setattr(grpc_api, "MAX_WATCHES", 3)
    look, looks, twice = grpc_api.HealthService._look, [], []

    async def noted(self, facts):
        twice.extend([facts] if facts in looks else [])
        looks.append(facts)
        await look(self, facts)
        looks.remove(facts)

    monkeypatch.setattr(grpc_api.HealthService, "_look", noted)
    with live_gateway() as gateway:
        stub = health_pb2_grpc.HealthStub(connect(gateway).channel)

        def watch():
            return stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)

        watches = [watch() for _ in range(3)]
        assert [next(one).status for one in watches] == [SERVING] * 3
        assert refused(next, watch()).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        gateway.group.alive = False
        assert [next(one).status for one in watches] == [NOT_SERVING] * 3
        until(lambda: looks)  # a stream is told before it looks again
        assert not twice, "one look for all three"
        watches.pop().cancel()

        def again():
            with contextlib.suppress(grpc.RpcError):
                return next(watch()).status == NOT_SERVING

        until(again)


def test_large_messages_are_refused(live_gateway, connect):
    with live_gateway(GatewayConfig(max_body_bytes=1000)) as gateway:
        error = refused(connect(gateway).call, "Tokenize", {"text": "a" * 2000})
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_every_field_is_commented():
    """Reflection has no comments, but the source, which people read, has one on each field and method."""
    from pathlib import Path

    import kvasir.proto

    sources = [path for path in Path(kvasir.proto.__path__[0], "kvasir", "v1").glob("*.proto") if path.stem != "group"]
    assert len(sources) == 4
    bare = [
        line
        for source in sources
        for before, line in itertools.pairwise(source.read_text().splitlines())
        if line.startswith("  ") and line.rstrip().endswith((";", "{")) and not before.strip().startswith("//")
    ]
    assert bare == []


def test_a_bug_is_internal(live_gateway, connect, caplog):
    with live_gateway() as gateway:
        client = connect(gateway)
        gateway.desk.directory = None
        error = refused(client.call, "Generate", {"text": "a"})
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "AttributeError" not in error.details()
    assert "AttributeError" in caplog.text
