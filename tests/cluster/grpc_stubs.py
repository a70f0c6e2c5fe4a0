"""Clients of kvasir.v1 for what is stored, and the requests that their tests share."""

from __future__ import annotations

import grpc
import pytest

from kvasir.proto import (
    chats_pb2_grpc,
    files_pb2,
    files_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    responses_pb2,
    responses_pb2_grpc,
)

TEXT = "Hello, wörld!"
HI = responses_pb2.Item(role="user", text="Hi")
WEATHER = inference_pb2.Tool(name="weather", description="Tells it.")
WEATHER.parameters.update({"type": "object", "properties": {"days": {"type": "integer", "maximum": 5}}})


class Stubs:
    def __init__(self, gateway, metadata=()):
        self.channel = grpc.insecure_channel(gateway.grpc_address)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.chats = chats_pb2_grpc.ChatsStub(self.channel)
        self.responses = responses_pb2_grpc.ResponsesStub(self.channel)
        self.conversations = responses_pb2_grpc.ConversationsStub(self.channel)
        self.decisions = responses_pb2_grpc.DecisionsStub(self.channel)
        self.files = files_pb2_grpc.FilesStub(self.channel)
        self.batches = files_pb2_grpc.BatchesStub(self.channel)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


def named(object_id):
    return files_pb2.IdRequest(id=object_id)


def ask(**fields):
    return responses_pb2.CreateResponseRequest(**{"model": "bytes", "input_text": "Hi", **fields})


def whole(found):
    return list(found) if hasattr(found, "__next__") else found


def refused(call, *args, **options):
    """(status, kvasir-param, details) of a call."""
    with pytest.raises(grpc.RpcError) as caught:
        whole(call(*args, timeout=60, **options))
    error = caught.value
    return error.code(), dict(error.trailing_metadata() or ()).get("kvasir-param"), error.details()


def prompt_of(gateway):
    return bytes(token for token in gateway.group.requests[-1].prompt_token_ids if token < 256).decode()
