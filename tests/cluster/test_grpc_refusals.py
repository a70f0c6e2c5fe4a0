"""What kvasir.v1 refuses about stored things, by name; that it has every field of HTTP; that every method needs a key."""

from __future__ import annotations

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_stubs import HI, WEATHER, Stubs, ask, named, refused

from kvasir.cluster import decisions_schema, responses_schema
from kvasir.cluster.config import GatewayConfig
from kvasir.proto import files_pb2, inference_pb2, responses_pb2


@pytest.fixture
def stubs(gateway):
    with Stubs(gateway) as found:
        yield found


# -- refusals


def part(**fields):
    return responses_pb2.Item(role="user", content=[responses_pb2.ContentPart(**fields)])


@pytest.mark.parametrize(("fields", "param", "says"), [
    ({"input": [HI]}, "input", "send input or input_text, not both"),
    ({"input_text": None}, "input", "input must be"),
    ({"input_text": None, "input": [responses_pb2.Item(role="user", text="a", content=part().content)]}, "input", "not both"),
    ({"input_text": None, "input": [responses_pb2.Item(type="image")]}, "input", "'image'"),
    ({"input_text": None, "input": [part(type="input_image")]}, "input", "'input_image'"),
    ({"model": "other"}, "model", "'other'"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
    ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens is 5000, 5005 together; the context is 4096"),
    ({"background": True, "store": False}, "background", "store"),
    ({"conversation": "a", "previous_response_id": "b"}, "conversation", "exclude"),
    ({"conversation": "a"}, "conversation", "'a'"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [inference_pb2.Tool(name="f", parameters_json="{")]}, "tools", "parameters_json"),
    ({"tools": [inference_pb2.Tool(name="f", parameters_json="{}", parameters={})]}, "tools", "not both"),
    ({"tools": [WEATHER], "tool_choice": "other"}, "tool_choice", "'other'"),
    ({"tools": [WEATHER], "allowed_tools": ["other"]}, "tool_choice", "'other'"),
    ({"tools": [WEATHER], "allowed_tools": ["weather"], "tool_choice": "none"}, "tool_choice", "allowed_tools"),
    ({"text": responses_pb2.ResponseText(verbosity="low")}, "text", "verbosity"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="xml"))}, "text", "xml"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="json_schema"))}, "text", "no schema"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="json_schema", schema="{"))}, "text", "JSON"),
    ({"reasoning": responses_pb2.Reasoning(effort="most")}, "reasoning.effort", "most"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"truncation": "left"}, "truncation", "left"),
    ({"service_tier": "best"}, "service_tier", "best"),
    ({"metadata": {"a" * 65: "b"}}, "metadata", "64"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["Create", "CreateStream"])
def test_what_is_wrong_is_refused_by_name(stubs, method, fields, param, says):
    status, named_, details = refused(getattr(stubs.responses, method), ask(**fields))
    assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert named_ == param
    assert says in details


@pytest.mark.parametrize(("question", "says"), [
    ({}, "type"), ({"type": "predicate"}, "instructions"), ({"type": "choice", "instructions": "a"}, "choices"),
    ({"type": "predicate", "instructions": "a", "levels": [responses_pb2.Level(value=1)]}, "levels"),
    ({"type": "choice", "instructions": "a", "choices": [responses_pb2.Choice()] * 2}, "value"),
])  # fmt: skip
def test_questions_that_are_refused(stubs, question, says):
    request = responses_pb2.DecideRequest(model="bytes", input_text="a", questions=[responses_pb2.Question(**question)])
    status, param, details = refused(stubs.decisions.Decide, request)
    assert (status, param) == (grpc.StatusCode.INVALID_ARGUMENT, "questions")
    assert says in details


def test_fields_of_a_newer_client_are_told(stubs):
    request = ask()
    request.MergeFromString(b"\xa0\x06\x01")  # field 100
    request.reasoning.MergeFromString(b"\xa0\x06\x01")
    _, rpc = stubs.responses.Create.with_call(request, timeout=60)
    assert dict(rpc.trailing_metadata())["x-kvasir-warning"] == "ignored: field 100, reasoning.field 100"
    call = stubs.responses.CreateStream(request, timeout=60)
    list(call)
    assert "reasoning.field 100" in dict(call.trailing_metadata())["x-kvasir-warning"]
    _, rpc = stubs.responses.Create.with_call(ask(), timeout=60, metadata=(("kvasir-resumable", "true"),))
    assert "kvasir-resumable" in dict(rpc.trailing_metadata())["x-kvasir-warning"]


# -- completeness


def test_every_field_of_http_is_there():
    """Or is said otherwise: by the method, metadata, or because it says nothing here."""
    otherwise = {"stream", "stream_options", "request_id", "max_tool_calls"}
    for honoured, message in (
        (responses_schema.HONOURED, responses_pb2.CreateResponseRequest),
        (responses_schema.COMPACTED, responses_pb2.CompactRequest),
        (decisions_schema.HONOURED, responses_pb2.DecideRequest),
        (decisions_schema._QUESTION, responses_pb2.Question),
    ):
        assert set(honoured) - set(message.DESCRIPTOR.fields_by_name) <= otherwise, message


def test_every_field_of_an_answer_is_there(gateway):
    echoed = {"object", "text", "tools", "tool_choice", "max_tool_calls"}
    body = httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "Hi", "user": "me"}).json()
    assert set(body) - set(responses_pb2.Response.DESCRIPTOR.fields_by_name) == echoed
    item = body["output"][0]
    assert set(item) <= set(responses_pb2.Item.DESCRIPTOR.fields_by_name)
    assert set(item["content"][0]) - set(responses_pb2.ContentPart.DESCRIPTOR.fields_by_name) == {"annotations"}


# -- keys

OPEN = {
    "grpc.health.v1.Health": {"Check", "Watch"},
    "inference.GRPCInferenceService": {"ServerLive", "ServerReady", "ModelReady"},
}
"""What needs no key; nothing else may be added without a word here."""


def every_method(gateway, key):
    """(service, method) of all that the server has, as its reflection says."""

    class Channel:
        def stream_stream(self, *args, **options):
            call = channel.stream_stream(*args, **options)
            return lambda requests, **more: call(requests, metadata=key, **more)

    with grpc.insecure_channel(gateway.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(Channel())
        for service in database.get_services():
            file = database.FindFileContainingSymbol(service)
            (found,) = [one for one in file.service if f"{file.package}.{one.name}" == service]
            yield from ((service, method) for method in found.method)


def test_every_method_needs_a_key_but_an_explicit_list(live_gateway):
    key = (("authorization", "Bearer secret"),)
    with live_gateway(GatewayConfig(api_key=("secret", "other"))) as gateway:
        methods = list(every_method(gateway, key))
        ours = {service for service, _ in methods if service.startswith("kvasir.v1.")}
        assert {one.partition("v1.")[2] for one in ours} == {
            "Inference", "Chats", "Responses", "Conversations", "Decisions", "Files", "Batches",
        }  # fmt: skip
        assert len(methods) > 50
        with grpc.insecure_channel(gateway.grpc_address) as channel:
            for service, method in methods:
                kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
                call = getattr(channel, kind)(f"/{service}/{method.name}", _registered_method=False)
                for metadata in (
                    (),
                    (("authorization", "Bearer wrong"),),
                    (("authorization", "secret"),),
                    (("kvasir-principal", ""),),
                ):
                    status = first_status(call, method, metadata)
                    needs = method.name not in OPEN.get(service, ())
                    assert (status == grpc.StatusCode.UNAUTHENTICATED) == needs, (service, method.name, metadata)
                assert first_status(call, method, key) != grpc.StatusCode.UNAUTHENTICATED, (service, method.name)


def first_status(call, method, metadata):
    """Status of a call with an empty request, OK if it has an answer. (Reflection ends only when its client does.)"""
    sent = iter([b""]) if method.client_streaming else b""
    try:
        found = call(sent, metadata=metadata, timeout=60)
        if method.server_streaming:
            next(found, None)
            found.cancel()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_what_one_key_stored_no_other_finds(live_gateway):
    mine, theirs = ((("authorization", f"Bearer {key}"),) for key in ("one", "two"))
    with live_gateway(GatewayConfig(api_key=("one", "two"))) as gateway, Stubs(gateway) as stubs:
        made = stubs.responses.Create(ask(), timeout=60, metadata=mine)
        talk = stubs.conversations.Create(responses_pb2.CreateConversationRequest(), timeout=60, metadata=mine)
        info = iter([files_pb2.UploadRequest(info=files_pb2.FileInfo(purpose="batch"))])
        file = stubs.files.Upload(info, timeout=60, metadata=mine)
        for method, one in (
            (stubs.responses.Get, made), (stubs.responses.Delete, made), (stubs.responses.Cancel, made),
            (stubs.conversations.Get, talk), (stubs.conversations.Delete, talk),
            (stubs.files.Get, file), (stubs.files.Content, file), (stubs.files.Delete, file),
        ):  # fmt: skip
            assert refused(method, named(one.id), metadata=theirs)[0] == grpc.StatusCode.NOT_FOUND
        assert (
            refused(stubs.responses.Create, ask(previous_response_id=made.id), metadata=theirs)[1]
            == "previous_response_id"
        )
        batch = files_pb2.CreateBatchRequest(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        assert refused(stubs.batches.Create, batch, metadata=theirs)[0] == grpc.StatusCode.NOT_FOUND
        assert not stubs.files.List(files_pb2.ListFilesRequest(), timeout=60, metadata=theirs).data
        found = httpx.get(f"{gateway.url}/v1/responses/{made.id}", headers={"authorization": "Bearer one"})
        assert found.status_code == 200  # the same key is the same client by either door
