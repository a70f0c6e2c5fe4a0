"""The Open Inference Protocol over a real socket: Triton's own client in a process of its own, since a process has room for
one definition of the protocol's messages, and stubs for what that client can't say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import grpc
import httpx
import numpy as np
import pytest
from grpc_stubs import TEXT
from hypothesis import given
from hypothesis import strategies as st
from kserve_requests import add_input, asking, changed

from kvasir.cluster.open_inference_schema import INPUTS, parse_inference
from kvasir.cluster.openai_fields import SAMPLING
from kvasir.cluster.structured_fields import FIELDS as STRUCTURED
from kvasir.engine.errors import ClientError
from kvasir.proto import open_inference_pb2 as pb
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

TRITON = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton

def tensor(name, value, shape):
    kind, dtype = ("BOOL", bool) if isinstance(value, bool) else ("BYTES", object)
    made = triton.InferInput(name, shape, kind)
    made.set_data_from_numpy(np.array([value if dtype is bool else value.encode()], dtype=dtype).reshape(shape))
    return made

def inputs(shape=[1], **given):
    return [tensor(name, value, shape) for name, value in given.items()]

found = {}
with triton.InferenceServerClient(sys.argv[1]) as client:
    found["health"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("bytes")]
    found["health"] += [client.is_model_ready("other"), client.is_model_ready("bytes", "2")]
    found["server"] = client.get_server_metadata().name
    metadata = client.get_model_metadata("alias/bytes", as_json=True)
    found["model"] = [metadata["name"], metadata["versions"], metadata["inputs"][0], metadata["outputs"][0]]
    sampling = json.dumps({"temperature": "0.5", "top_p": "0.95", "max_tokens": 16})
    given = inputs([1, 1], text_input="Hi ", sampling_parameters=sampling, return_finish_reason=True,
                   return_num_input_tokens=True, return_num_output_tokens=True)
    reply = client.infer("bytes", given, request_id="7", parameters={"seed": 3})
    found["id"] = reply.get_response().id
    for name in ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens"):
        values = reply.as_numpy(name).tolist()
        found[name] = [value.decode() if isinstance(value, bytes) else value for value in values]
    wanted = [triton.InferRequestedOutput("text_output")]
    reply = client.infer("bytes", inputs(text_input="Hi", exclude_input_in_output=True), outputs=wanted)
    found["without"] = reply.as_numpy("text_output")[0].decode()
    try:
        client.infer("bytes", inputs(text_input="Hi", image="x"))
    except triton.InferenceServerException as error:
        found["error"] = [error.status(), error.message()]
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for name in ("a", "b"):
        client.async_stream_infer("bytes", inputs(text_input="Hi", stream=True), request_id=name,
                                  enable_empty_final_response=True)
    texts, left = {"a": [], "b": []}, 2
    while left:
        result, error = answers.get(timeout=60)
        response = result.get_response()
        texts[response.id].append(result.as_numpy("text_output")[0].decode())
        left -= response.parameters["triton_final_response"].bool_param
    found["stream"] = {name: ["".join(pieces), len(pieces) > 3] for name, pieces in texts.items()}
    client.async_stream_infer("bytes", inputs(text_input="Hi", stream=True, sampling_parameters='{"top_p": 7}'))
    result, error = answers.get(timeout=60)
    found["stream error"] = error.message()
    client.stop_stream()
    found["statistics"] = client.get_inference_statistics("bytes", as_json=True)["model_stats"]
with triton.InferenceServerClient(sys.argv[2]) as client:
    metadata = client.get_model_metadata("bytes", as_json=True)
    found["embedder"] = {one["name"]: [one["datatype"], one["shape"]] for one in metadata["inputs"] + metadata["outputs"]}
    texts = triton.InferInput("text_input", [2], "BYTES")
    texts.set_data_from_numpy(np.array([b"Hi", "Hör".encode()], dtype=object))
    given = [texts, *inputs(return_num_input_tokens=True)]
    reply = client.infer("bytes", given, request_id="8", parameters={"dimensions": 2})
    found["vectors"] = [reply.as_numpy("embedding").tolist(), reply.as_numpy("num_input_tokens").tolist()]
    found["vectors"] += [str(reply.as_numpy("embedding").dtype), reply.get_response().id]
print(json.dumps(found))
"""


def test_tritons_client(gateway, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(gateway.group, "step_s", 0.01)
    command = [sys.executable, "-c", TRITON, gateway.grpc_address, embedder.grpc_address]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["health"] == [True, True, True, False, False]
    assert found["server"] == "kvasir"
    text_input = {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
    assert found["model"] == ["bytes", ["1"], text_input, {"name": "text_output", "datatype": "BYTES", "shape": ["-1"]}]
    assert (found["text_output"], found["finish_reason"]) == (["Hi " + TEXT], ["stop"])
    assert (found["num_input_tokens"], found["num_output_tokens"], found["id"]) == ([3], [15], "7")
    seeded = next(request for request in gateway.group.requests if request.request_id.startswith("7-"))
    assert (seeded.sampling.temperature, seeded.sampling.top_p, seeded.sampling.seed) == (0.5, 0.95, 3)
    assert found["without"] == TEXT
    status, message = found["error"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "'image'" in message
    assert found["stream"] == {"a": [TEXT, True], "b": [TEXT, True]}
    assert "top_p" in found["stream error"]
    (of_model,) = found["statistics"]
    assert (of_model["name"], of_model["version"], of_model["inference_count"]) == ("bytes", "1", "4")
    assert int(of_model["inference_stats"]["success"]["ns"]) > 4e9 * 0.01
    assert found["embedder"] == {
        "text_input": ["BYTES", ["-1"]], "return_num_input_tokens": ["BOOL", ["1"]],
        "embedding": ["FP32", ["-1", "-1"]], "num_input_tokens": ["UINT32", ["1"]],
    }  # fmt: skip
    assert found["vectors"] == [[[2.0, 0.5], [4.0, 0.5]], [6], "float32", "8"]


@pytest.fixture(scope="module")
def stub(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def embedder(gateway, byte_model):
    """Another gateway, whose model embeds and does nothing else."""
    with type(gateway)(byte_model) as live:
        live.group.info = dataclasses.replace(live.group.info, tasks=("embed",))
        yield live


def test_infer_with_values_inside_the_tensors(gateway, stub):
    parameters = {"temperature": 0.5, "exclude_input_in_output": True, "priority": 4, "timeout": 2_000_000}
    request = asking(parameters=parameters, sampling={"n": 2, "stop": ["wör"], "guided_regex": ".*"})
    request.outputs.add(name="num_output_tokens")
    request.outputs.add(name="text_output")
    reply, call = stub.ModelInfer.with_call(
        request, timeout=60, metadata=(("x-request-id", "mine"), ("kvasir-route", "1"))
    )
    assert [tensor.name for tensor in reply.outputs] == ["num_output_tokens", "text_output"]
    assert list(reply.outputs[1].contents.bytes_contents) == [b"Hello, "] * 2
    assert list(reply.outputs[0].shape) == [2]
    assert not reply.raw_output_contents
    assert (reply.model_name, reply.model_version) == ("bytes", "1")
    assert "why=only" in reply.parameters["kvasir-route"].string_param
    assert dict(call.initial_metadata())["x-request-id"] == "mine"
    assert "total" in dict(call.trailing_metadata())["server-timing"]
    sent = gateway.group.requests[-1]
    assert (sent.sampling.temperature, sent.sampling.max_tokens, sent.priority) == (0.5, 16, 4)
    assert sent.sampling.structured_outputs.regex == ".*"
    assert 1 < sent.deadline_s <= 2


def test_what_means_nothing_is_told(stub):
    request = asking(sampling={"use_beam_search": True, "best_of": 2, "seed": 3, "truncate_prompt_tokens": 1})
    reply = stub.ModelInfer(request, timeout=60, metadata=(("kvasir-resumable", "true"),))
    warning = reply.parameters["warning"].string_param
    assert all(part in warning for part in ("seed", "kvasir-resumable", "1 tokens"))


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (asking(stream=True), "INVALID_ARGUMENT", "stream"),
        (asking(image="x"), "INVALID_ARGUMENT", "image"),
        (asking(parameters={"sequence_id": 4}), "INVALID_ARGUMENT", "sequence_id"),
        (asking(parameters={"text_input": "a"}), "INVALID_ARGUMENT", "text_input"),
        (asking(parameters={"stream": 1}), "INVALID_ARGUMENT", "stream"),
        (asking(parameters={"timeout": -1}), "INVALID_ARGUMENT", "timeout"),
        (asking(parameters={"temperature": 0.5}, sampling={"temperature": 1}), "INVALID_ARGUMENT", "temperature"),
        (asking(parameters={"stream": False}, stream=False), "INVALID_ARGUMENT", "stream"),
        (changed(lambda r: r.parameters["seed"].SetInParent()), "INVALID_ARGUMENT", "seed"),
        (asking(sampling={"temperature": -1}), "INVALID_ARGUMENT", "temperature"),
        (asking(parameters={"temperature": float("nan")}), "INVALID_ARGUMENT", "temperature"),
        (asking(sampling={"seed": "[1]"}), "INVALID_ARGUMENT", "seed"),
        (asking(sampling={"temperature": "warm"}), "INVALID_ARGUMENT", "temperature"),
        (asking(sampling={"echo": True}), "INVALID_ARGUMENT", "echo"),
        (asking(sampling={"logprobs": 1}), "INVALID_ARGUMENT", "logprobs"),
        (asking(sampling={"max_tokens": 9999}), "INVALID_ARGUMENT", "max_tokens"),
        (asking(sampling=[1]), "INVALID_ARGUMENT", "sampling_parameters"),
        (asking(sampling_parameters="{"), "INVALID_ARGUMENT", "sampling_parameters"),
        (asking("x" * 5000), "INVALID_ARGUMENT", "text_input"),
        (asking(outputs=["logprobs"]), "INVALID_ARGUMENT", "logprobs"),
        (changed(lambda r: add_input(r, "text_input", "b")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.ClearField("inputs")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.inputs[0].shape.append(2)), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: setattr(r.inputs[0], "datatype", "INT8")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.inputs[0].ClearField("contents")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.inputs[0].contents.int_contents.append(1)), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.inputs[0].parameters["x"].SetInParent()), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.raw_input_contents.append(b"\x01\0\0\0a")), "INVALID_ARGUMENT", "text_input"),
        (changed(lambda r: r.raw_input_contents.extend([b"", b""])), "INVALID_ARGUMENT", "raw_input_contents"),
        (changed(lambda r: setattr(r, "id", "a b")), "INVALID_ARGUMENT", "id"),
        (changed(lambda r: setattr(r, "model_version", "2")), "NOT_FOUND", "model_version"),
        (changed(lambda r: setattr(r, "model_name", "other")), "NOT_FOUND", "model"),
    ],
)  # fmt: skip
def test_refusals(stub, request_, code, param):
    """A call's status, and the same as a message of a stream, which goes on."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_, timeout=60)
    assert caught.value.code() == grpc.StatusCode[code]
    assert dict(caught.value.trailing_metadata())["kvasir-param"] == param
    if param == "stream" and request_.inputs[-1].name == "stream" and not request_.parameters:
        return  # which a stream may ask for
    replies = list(stub.ModelStreamInfer(iter([request_, asking(parameters={"seed": 1})]), timeout=60))
    (failed,) = [reply for reply in replies if reply.error_message]
    assert failed.infer_response.parameters["param"].string_param == param
    assert failed.infer_response.id == request_.id
    (good,) = [reply for reply in replies if not reply.error_message]
    assert good.infer_response.outputs[0].contents.bytes_contents[0].decode() == "Hi" + TEXT


VALUES = (
    True, 0, -1, 7, 2**63 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "1", "[1]", "{}", "1e999", "é",
)  # fmt: skip
LISTS = st.lists(st.sampled_from([*VALUES, None]), max_size=3)


def test_a_name_that_the_client_made_up_is_told_as_metadata_can(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(asking(sampling={"é\n" + "x" * 20_000: 1}), timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["kvasir-param"] == r"\xe9\n" + "x" * 94


@given(
    sampling=st.dictionaries(
        st.sampled_from([*SAMPLING, *STRUCTURED, "logit_bias", "x"]), LISTS | st.sampled_from(VALUES), max_size=5
    ),
    parameters=st.dictionaries(st.sampled_from([*SAMPLING, *INPUTS, "timeout"]), st.sampled_from(VALUES), max_size=5),
    raw=st.none() | st.lists(st.sampled_from([b"", b"\1", b"\1\0\0\0a", b"\2\0\0\0{}", b"\5\0\0\0"]), max_size=3),
    shape=st.sampled_from([(1,), (1, 1), (), (0,), (-1,), (2,)]),
)
def test_any_request_is_understood_or_refused(sampling, parameters, raw, shape):
    request = asking(parameters=parameters, sampling=sampling, stream=True)
    if raw is not None:
        for tensor in request.inputs:
            tensor.ClearField("contents")
        request.raw_input_contents.extend(raw)
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    try:
        assert parse_inference(request).outputs
    except ClientError as error:
        named = error.param
    else:
        named = "nothing"
    assert named


@pytest.mark.parametrize("raw", [b"", b"\x05\0\0\0a", b"\x01\0\0\0\xff"])
def test_raw_values_that_are_none(stub, raw):
    request = asking()
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.append(raw)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_of_several_continuations(stub):
    request = asking(stream=True, sampling={"n": 2}, return_num_output_tokens=True, return_finish_reason=True)
    replies = [reply.infer_response for reply in stub.ModelStreamInfer(iter([request]), timeout=60)]
    texts, counts = [b"", b""], [0, 0]
    for reply in replies:
        values = {tensor.name: tensor.contents for tensor in reply.outputs}
        for index in range(2):
            texts[index] += values["text_output"].bytes_contents[index]
            counts[index] += values["num_output_tokens"].uint_contents[index]
    assert [text.decode() for text in texts] == [TEXT, TEXT]
    assert counts == [15, 15]
    marks = [reply.parameters["triton_final_response"].bool_param for reply in replies]
    assert marks == [False] * (len(marks) - 1) + [True]
    assert b"stop" in {tensor.name: tensor.contents for tensor in replies[-1].outputs}["finish_reason"].bytes_contents


def test_a_stream_cant_repeat_the_prompt(stub):
    request = asking(stream=True, exclude_input_in_output=False)
    (reply,) = stub.ModelStreamInfer(iter([request]), timeout=60)
    assert reply.infer_response.parameters["param"].string_param == "exclude_input_in_output"


def texts_to_embed(*texts, shape=None, **parameters):
    request = asking(texts[0], parameters)
    request.inputs[0].contents.bytes_contents.extend(text.encode() for text in texts[1:])
    request.inputs[0].shape[:] = [len(texts)] if shape is None else shape
    return request


def test_vectors_as_the_embeddings_route_has_them(embedder, connect, monkeypatch):
    monkeypatch.setattr(embedder.group, "vector", lambda request: [0.1 * len(request.prompt_token_ids), -1 / 3])
    stub = connect(embedder)
    request = texts_to_embed(
        "a", "bc", shape=[2, 1], normalize=False, truncate_prompt_tokens=3, priority=2, timeout=5_000_000
    )
    reply, call = stub.ModelInfer.with_call(request, timeout=60, metadata=(("x-request-id", "mine"),))
    (tensor,) = reply.outputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("embedding", "FP32", [2, 2])
    body = {"model": "bytes", "input": ["a", "bc"], "normalize": False}
    data = httpx.post(embedder.url + "/v1/embeddings", json=body, timeout=60).json()["data"]
    np.testing.assert_array_equal(
        np.float32(tensor.contents.fp32_contents), np.float32([one["embedding"] for one in data]).ravel()
    )
    assert not reply.raw_output_contents
    assert "total" in dict(call.trailing_metadata())["server-timing"]
    sent = embedder.group.requests[-4]
    assert (sent.priority, sent.pooling.normalize, sent.request_id.split("-")[0]) == (2, False, "mine")
    assert 1 < sent.deadline_s <= 5


def test_vectors_in_a_stream(embedder, connect):
    requests = [texts_to_embed("a"), texts_to_embed("b", temperature=0.5)]
    replies = list(connect(embedder).ModelStreamInfer(iter(requests), timeout=60))
    (good,) = [reply.infer_response for reply in replies if not reply.error_message]
    assert list(good.outputs[0].contents.fp32_contents) == [1.0, 0.5]
    assert good.parameters["triton_final_response"].bool_param
    (failed,) = [reply.infer_response for reply in replies if reply.error_message]
    assert failed.parameters["param"].string_param == "temperature"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (asking(stream=True), "stream"),
        (asking(sampling={"temperature": 1}), "sampling_parameters"),
        (asking(outputs=["text_output"]), "text_output"),
        (asking(parameters={"dimensions": 0}), "dimensions"),
        (asking(parameters={"encoding_format": "base64"}), "encoding_format"),
        (texts_to_embed("a", "b", shape=[3]), "text_input"),
        (texts_to_embed("a", "b", shape=[1, 2]), "text_input"),
        (texts_to_embed("a", "b", shape=[0]), "text_input"),
        (texts_to_embed(*["a"] * 2049), "text_input"),
        (texts_to_embed("a", "x" * 5000), "text_input[1]"),
        (changed(lambda r: r.ClearField("inputs")), "text_input"),
        (changed(lambda r: add_input(r, "text_input", "b")), "text_input"),
    ],
)
def test_refusals_of_vectors(embedder, connect, request_, param):
    with pytest.raises(grpc.RpcError) as caught:
        connect(embedder).ModelInfer(request_, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["kvasir-param"] == param


def test_a_model_that_does_both(gateway, stub, monkeypatch):
    monkeypatch.setattr(gateway.group, "info", dataclasses.replace(gateway.group.info, tasks=("generate", "embed")))
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="bytes"), timeout=60)
    shapes = {one.name: list(one.shape) for one in [*metadata.inputs, *metadata.outputs]}
    assert (shapes["text_input"], shapes["text_output"], shapes["embedding"]) == ([1], [-1], [-1, -1])
    reply = stub.ModelInfer(asking(outputs=["embedding"]), timeout=60)
    assert list(reply.outputs[0].contents.fp32_contents) == [2.0, 0.5]
    assert stub.ModelInfer(asking(), timeout=60).outputs[0].name == "text_output"


def test_a_model_that_embeds_nothing(stub):
    with pytest.raises(grpc.RpcError, match="can't embed") as caught:
        stub.ModelInfer(asking(outputs=["embedding"]), timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
