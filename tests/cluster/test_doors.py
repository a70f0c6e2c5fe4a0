"""What HTTP can gRPC can: every route has its method, every field of its bodies a field there, or a reason stands here."""

from __future__ import annotations

import pytest

from kvasir.cluster import decisions_schema, openai_fields, pooling_schema, responses_schema, structured_fields
from kvasir.cluster.gateway import create_app
from kvasir.proto import chats_pb2, files_pb2, inference_pb2, responses_pb2

METHODS = {
    "POST /v1/chat/completions": "Inference.Chat",
    "GET /v1/chat/completions": "Chats.List",
    "GET /v1/chat/completions/{id}": "Chats.Get",
    "POST /v1/chat/completions/{id}": "Chats.Update",
    "DELETE /v1/chat/completions/{id}": "Chats.Delete",
    "GET /v1/chat/completions/{id}/messages": "Chats.ListMessages",
    "POST /v1/completions": "Inference.Generate",
    "GET /v1/models": "Inference.ListModels",
    "GET /v1/models/{name:path}": "Inference.ListModels",
    "POST /v1/responses": "Responses.Create",
    "POST /v1/responses/input_tokens": "Responses.CountInput",
    "POST /v1/responses/compact": "Responses.Compact",
    "GET /v1/responses/{id}": "Responses.Get",
    "DELETE /v1/responses/{id}": "Responses.Delete",
    "POST /v1/responses/{id}/cancel": "Responses.Cancel",
    "GET /v1/responses/{id}/input_items": "Responses.ListInputItems",
    "POST /v1/conversations": "Conversations.Create",
    "GET /v1/conversations/{id}": "Conversations.Get",
    "POST /v1/conversations/{id}": "Conversations.Update",
    "DELETE /v1/conversations/{id}": "Conversations.Delete",
    "POST /v1/conversations/{id}/items": "Conversations.AddItems",
    "GET /v1/conversations/{id}/items": "Conversations.ListItems",
    "GET /v1/conversations/{id}/items/{item}": "Conversations.GetItem",
    "DELETE /v1/conversations/{id}/items/{item}": "Conversations.DeleteItem",
    "POST /v1/decisions": "Decisions.Decide",
    "POST /v1/files": "Files.Upload",
    "GET /v1/files": "Files.List",
    "GET /v1/files/{id}": "Files.Get",
    "GET /v1/files/{id}/content": "Files.Content",
    "DELETE /v1/files/{id}": "Files.Delete",
    "POST /v1/batches": "Batches.Create",
    "GET /v1/batches": "Batches.List",
    "GET /v1/batches/{id}": "Batches.Get",
    "POST /v1/batches/{id}/cancel": "Batches.Cancel",
    "GET /v1/streams/{id}": "Inference.Resume",
    "DELETE /v1/streams/{id}": "Inference.Cancel",
}
METHODS |= {
    f"POST {prefix}/{name}": f"Inference.{name.title()}"
    for prefix in ("", "/v1")
    for name in ("tokenize", "detokenize", "classify", "score", "rerank")
}
METHODS |= {"POST /v1/embeddings": "Inference.Embed", "POST /v2/rerank": "Inference.Rerank"}
NOT_OVER_GRPC = {
    "GET /health": "grpc.health.v1 says it",
    "GET /health/ready": "grpc.health.v1 says it",
    "GET /-/healthz": "KubeRay asks it",
    "GET /metrics": "Prometheus's format is HTTP's",
    "GET /version": "for who looks at the server with a browser",
    "GET /openapi.json": "describes HTTP; reflection describes gRPC",
    "GET /docs": "describes HTTP; reflection describes gRPC",
    "GET /v1/groups": "for operators, as /metrics",
    "POST /v1/groups/{name}": "for operators",
    "POST /v1/messages": "Anthropic's words for what Chat does",
    "POST /v1/messages/count_tokens": "Anthropic's words for what Tokenize does",
    "POST /v1/systemone": "System One's words for what Decide does",
    "GET /": "Ollama's, as all of /api",
}
FIELDS = {
    inference_pb2.ChatRequest: openai_fields.CHAT_HONOURED,
    inference_pb2.GenerateRequest: openai_fields.COMPLETION_HONOURED,
    inference_pb2.TokenizeRequest: openai_fields.TOKENIZE_HONOURED,
    inference_pb2.DetokenizeRequest: openai_fields.DETOKENIZE_HONOURED,
    inference_pb2.EmbedRequest: pooling_schema.EMBEDDINGS,
    inference_pb2.ClassifyRequest: pooling_schema.CLASSIFY,
    inference_pb2.ScoreRequest: pooling_schema.SCORE,
    inference_pb2.RerankRequest: pooling_schema.RERANK,
    responses_pb2.CreateResponseRequest: responses_schema.HONOURED,
    responses_pb2.CompactRequest: responses_schema.COMPACTED,
    responses_pb2.DecideRequest: decisions_schema.HONOURED,
}
OTHER_NAMES = {
    "prompt": "text",
    "tokens": "token_ids",
    "return_token_strs": "return_token_texts",
    "chat_template_kwargs": "template_variables",
    "input": "inputs",
    "use_activation": "normalize",
    "return_token_ids": "return_prompt_token_ids",  # those of the output always come
    **dict.fromkeys(("max_completion_tokens", "max_tokens"), "sampling.max_tokens"),
    **dict.fromkeys(("text_1", "data_1"), "queries"),
    **dict.fromkeys(("text_2", "data_2", "items"), "documents"),
}
"""HTTP's name -> gRPC's, where it isn't the same, nor of Sampling."""
IN_SAMPLING = {
    **dict.fromkeys(("logprobs", "top_logprobs"), "logprobs"),
    **dict.fromkeys(structured_fields.FIELDS, "structured_outputs"),
}
ANOTHER_WAY = {
    "request_id": "metadata x-request-id",
    "session_id": "metadata x-session-id",
    "prompt_cache_key": "metadata x-session-id",
    "stream": "Generate and Chat always stream; responses have a method for it",
    "stream_options": "the last message has the counts",
    "include_reasoning": "thoughts are a field of their own, which nobody must read",
    **dict.fromkeys(("enable_thinking", "thinking"), "template_variables, or reasoning_effort none"),
    "guided_decoding_backend": "a name of other servers' libraries that says nothing here",
    "encoding_format": "floats are bytes here already",
    "return_documents": "the client has them; results name their places",
    "max_tool_calls": "of tools that the server runs: there are none",
}


def test_every_route_has_its_method(gateway):
    services = {
        service.name: service.methods_by_name
        for module in (inference_pb2, chats_pb2, responses_pb2, files_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    routes = {
        f"{method} {route.path}"
        for route in create_app(gateway.desk, gateway.config).routes
        for method in route.methods
        if method != "HEAD" and not route.path.startswith("/api/")
    }
    assert routes == {*METHODS, *NOT_OVER_GRPC}
    for method in METHODS.values():
        service, _, name = method.partition(".")
        assert name in services[service], method


def has(message, name):
    """Whether it has HTTP's field of that name."""
    there, sampling = message.DESCRIPTOR.fields_by_name, inference_pb2.Sampling.DESCRIPTOR.fields_by_name
    other = OTHER_NAMES.get(name, name)
    if "sampling" in there and (other.removeprefix("sampling.") in sampling or IN_SAMPLING.get(name) in sampling):
        return True
    return other in there or name in there


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.__name__)
def test_every_field_has_its_own(message):
    assert {name for name in FIELDS[message] if not has(message, name)} <= {*ANOTHER_WAY}


def test_no_exception_is_left_over():
    assert {name for message, fields in FIELDS.items() for name in fields if not has(message, name)} == {*ANOTHER_WAY}
