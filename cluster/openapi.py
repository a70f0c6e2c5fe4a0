"""The OpenAPI document of every HTTP route: bodies from the tables by which they are read, answers by name.

OpenAPI 3.1 can't say what a stream's events are: `x-events` beside a stream's media type does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from kvasir.cluster.described import Json
from kvasir.cluster.openapi_answers import ANSWERS, ref
from kvasir.cluster.openapi_bodies import BODIES
from kvasir.cluster.openapi_examples import EXAMPLES

JSON, SSE, NDJSON, TEXT = "application/json", "text/event-stream", "application/x-ndjson", "text/plain"
METHODS = ("get", "post", "delete", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A method of a route. `body` and `answer` are names of schemas."""

    says: str
    answer: str = ""
    """Of status 200; empty: `other` alone."""
    body: str = ""
    events: Mapping[str, str] = field(default_factory=dict)
    """Media type of a stream -> schema of its events."""
    other: Sequence[str] = ()
    """Media types that aren't JSON."""
    query: Mapping[str, Json] = field(default_factory=dict)
    upload: bool = False
    """The body is a form with a file."""
    statuses: Mapping[str, str] = field(default_factory=dict)
    """Further statuses -> schema."""
    refused: bool = False
    """Every call is an error."""
    open: bool = False
    """Needs no key."""


_LIMIT: Json = {"type": "integer", "minimum": 1, "maximum": 100}
_ORDER: Json = {"enum": ["asc", "desc"]}
_PAGE: Json = {"limit": _LIMIT, "after": {"type": "string"}, "order": _ORDER}
_FILES: Json = {**_PAGE, "limit": {**_LIMIT, "maximum": 10_000}, "purpose": {"type": "string"}}
_AFTER: Json = {"type": "integer", "minimum": 0}


def _pooling(says: str, body: str, answer: str, *paths: str) -> dict[tuple[str, str], Operation]:
    return {(path, "post"): Operation(says=says, body=body, answer=answer) for path in paths}


def _health(says: str) -> Operation:
    return Operation(says=says, answer="Healthy", statuses={"503": "Unhealthy"}, open=True)


_CHAT, _RESPONSES, _CONVERSATIONS = "/v1/chat/completions", "/v1/responses", "/v1/conversations"
_OPENAI: dict[tuple[str, str], Operation] = {
    (_CHAT, "post"): Operation(
        says="Answer a conversation.",
        body="ChatRequest",
        answer="ChatCompletion",
        events={SSE: "ChatCompletionChunk"},
    ),
    (_CHAT, "get"): Operation(
        says="Chats that were asked with `store`.",
        answer="StoredChatList",
        query={**_PAGE, "model": {"type": "string"}},
    ),
    (f"{_CHAT}/{{id}}", "get"): Operation(says="A stored chat.", answer="ChatCompletion"),
    (f"{_CHAT}/{{id}}", "post"): Operation(
        says="Change a stored chat's metadata.", body="MetadataRequest", answer="ChatCompletion"
    ),
    (f"{_CHAT}/{{id}}", "delete"): Operation(says="Forget a stored chat.", answer="ChatDeleted"),
    (f"{_CHAT}/{{id}}/messages", "get"): Operation(
        says="The messages of a stored chat.", answer="StoredMessages", query=_PAGE
    ),
    ("/v1/completions", "post"): Operation(
        says="Continue a text.", body="CompletionRequest", answer="Completion", events={SSE: "Completion"}
    ),
    ("/v1/models", "get"): Operation(says="The models that are served.", answer="ModelList"),
    ("/v1/models/{name}", "get"): Operation(says="One of them.", answer="Model"),
    **{
        (path, "post"): Operation(says="Text or conversation to token ids.", body="TokenizeRequest", answer="Tokens")
        for path in ("/tokenize", "/v1/tokenize")
    },
    **{
        (path, "post"): Operation(says="Token ids to text.", body="DetokenizeRequest", answer="Detokenized")
        for path in ("/detokenize", "/v1/detokenize")
    },
    ("/v1/systemone", "post"): Operation(
        says="The same, as System One models have it.", body="SystemOneRequest", answer="SystemOneAnswers"
    ),
    ("/v1/decisions", "post"): Operation(
        says="How likely each of the given answers to a question is.", body="DecisionRequest", answer="Decisions"
    ),
    **_pooling("A vector for each input.", "EmbeddingRequest", "Embeddings", "/v1/embeddings"),
    **_pooling("Documents by how well they fit.", "RerankRequest", "Ranking", "/rerank", "/v1/rerank", "/v2/rerank"),
    **_pooling("How well texts fit together.", "ScoreRequest", "Scores", "/score", "/v1/score"),
    **_pooling("A label for each input.", "ClassifyRequest", "Classes", "/classify", "/v1/classify"),
}
_STORED: dict[tuple[str, str], Operation] = {
    (_RESPONSES, "post"): Operation(
        says="Answer, and keep what was said.",
        body="ResponseRequest",
        answer="Response",
        events={SSE: "ResponseEvent"},
    ),
    (f"{_RESPONSES}/input_tokens", "post"): Operation(
        says="Count what such a body would have the model read.", body="ResponseRequest", answer="InputTokens"
    ),
    (f"{_RESPONSES}/compact", "post"): Operation(
        says="A conversation as a summary, to go on from.", body="CompactionRequest", answer="Compaction"
    ),
    (f"{_RESPONSES}/{{id}}", "get"): Operation(
        says="A response, or with `stream` the events of one that was made in the background.",
        answer="Response",
        events={SSE: "ResponseEvent"},
        query={"stream": {"enum": ["true", "false"]}, "starting_after": _AFTER},
    ),
    (f"{_RESPONSES}/{{id}}", "delete"): Operation(says="Forget a response.", answer="ResponseDeleted"),
    (f"{_RESPONSES}/{{id}}/cancel", "post"): Operation(says="End one in the background.", answer="Response"),
    (f"{_RESPONSES}/{{id}}/input_items", "get"): Operation(
        says="What the model read for it.", answer="ItemList", query=_PAGE
    ),
    (_CONVERSATIONS, "post"): Operation(
        says="Begin a conversation.", body="ConversationRequest", answer="Conversation"
    ),
    (f"{_CONVERSATIONS}/{{id}}", "get"): Operation(says="A conversation.", answer="Conversation"),
    (f"{_CONVERSATIONS}/{{id}}", "post"): Operation(
        says="Change its metadata.", body="MetadataRequest", answer="Conversation"
    ),
    (f"{_CONVERSATIONS}/{{id}}", "delete"): Operation(says="Forget it.", answer="ConversationDeleted"),
    (f"{_CONVERSATIONS}/{{id}}/items", "post"): Operation(
        says="Add items.", body="ConversationItems", answer="ItemList"
    ),
    (f"{_CONVERSATIONS}/{{id}}/items", "get"): Operation(says="Its items.", answer="ItemList", query=_PAGE),
    (f"{_CONVERSATIONS}/{{id}}/items/{{item}}", "get"): Operation(says="One item.", answer="Item"),
    (f"{_CONVERSATIONS}/{{id}}/items/{{item}}", "delete"): Operation(
        says="The conversation without it.", answer="Conversation"
    ),
    ("/v1/files", "post"): Operation(says="Upload a file of requests.", answer="File", upload=True),
    ("/v1/files", "get"): Operation(says="All files.", answer="FileList", query=_FILES),
    ("/v1/files/{id}", "get"): Operation(says="A file's facts.", answer="File"),
    ("/v1/files/{id}", "delete"): Operation(says="Delete a file.", answer="FileDeleted"),
    ("/v1/files/{id}/content", "get"): Operation(says="What it holds.", other=("application/octet-stream",)),
    ("/v1/batches", "post"): Operation(says="Answer the requests of a file.", body="BatchRequest", answer="Batch"),
    ("/v1/batches", "get"): Operation(says="All batches.", answer="BatchList", query=_PAGE),
    ("/v1/batches/{id}", "get"): Operation(says="How far a batch is.", answer="Batch"),
    ("/v1/batches/{id}/cancel", "post"): Operation(says="End it.", answer="Batch"),
    ("/v1/streams/{id}", "get"): Operation(
        says="Go on with a stream that was begun with the header kvasir-resumable, behind event number `after`.",
        events={SSE: "StreamedEvent", NDJSON: "StreamedEvent"},
        query={"after": _AFTER},
    ),
    ("/v1/streams/{id}", "delete"): Operation(says="End a stream.", answer="StreamCancelled"),
}
_OTHERS: dict[tuple[str, str], Operation] = {
    ("/v1/messages", "post"): Operation(
        says="Answer a conversation, in Anthropic's dialect.",
        body="MessagesRequest",
        answer="Message",
        events={SSE: "MessageEvent"},
    ),
    ("/v1/messages/count_tokens", "post"): Operation(
        says="Count a conversation's tokens.", body="CountTokensRequest", answer="CountedTokens"
    ),
    ("/api/generate", "post"): Operation(
        says="Continue a prompt, in Ollama's dialect.",
        body="OllamaGenerateRequest",
        answer="OllamaGenerated",
        events={NDJSON: "OllamaGenerated"},
    ),
    ("/api/chat", "post"): Operation(
        says="Answer a conversation, in Ollama's dialect.",
        body="OllamaChatRequest",
        answer="OllamaChat",
        events={NDJSON: "OllamaChat"},
    ),
    ("/api/embed", "post"): Operation(
        says="A vector for each input.", body="OllamaEmbedRequest", answer="OllamaEmbedded"
    ),
    ("/api/embeddings", "post"): Operation(says="A vector.", body="OllamaEmbeddingsRequest", answer="OllamaEmbedding"),
    ("/api/show", "post"): Operation(says="A model's facts.", body="OllamaShowRequest", answer="OllamaShown"),
    ("/api/tags", "get"): Operation(says="The models that are served.", answer="OllamaTags"),
    ("/api/ps", "get"): Operation(says="Those that are loaded.", answer="OllamaRunning"),
    ("/api/version", "get"): Operation(says="The version of Ollama's API.", answer="Version"),
    **{
        (f"/api/{name}", "delete" if name == "delete" else "post"): Operation(says="Not supported.", refused=True)
        for name in ("create", "pull", "push", "copy", "delete")
    },
    ("/api/blobs/{digest}", "post"): Operation(says="Not supported.", refused=True),
    ("/api/blobs/{digest}", "head"): Operation(says="There are none.", refused=True),
    ("/", "get"): Operation(says="How Ollama's clients see that it runs.", other=(TEXT,), open=True),
    ("/-/healthz", "get"): Operation(says="`success`, for KubeRay, until it drains.", other=(TEXT,), open=True),
    ("/health", "get"): _health("Every model has a living group."),
    ("/health/ready", "get"): _health("Every model answers."),
    ("/metrics", "get"): Operation(says="Prometheus' metrics.", other=(TEXT,)),
    ("/version", "get"): Operation(says="The version of Kvasir.", answer="Version"),
    ("/v1/groups", "get"): Operation(says="The groups, and what each is for.", answer="GroupList"),
    ("/v1/groups/{name}", "post"): Operation(
        says="Give a group another role while it runs.", body="RoleRequest", answer="Group"
    ),
    ("/openapi.json", "get"): Operation(says="This document.", answer="Document", open=True),
    ("/docs", "get"): Operation(says="This document, to be read.", other=("text/html",), open=True),
}
OPERATIONS: dict[tuple[str, str], Operation] = {**_OPENAI, **_STORED, **_OTHERS}
"""(path, method) -> what there is to say about it."""


def document() -> Json:
    """The whole document."""
    paths: dict[str, Json] = {}
    for (path, method), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, operation)
    for path, item in paths.items():
        if names := [part[1:-1] for part in path.split("/") if part.startswith("{")]:
            item["parameters"] = [_parameter(name, "path", {"type": "string"}, required=True) for name in names]
    schemas = {**{name: body.schema() for name, body in BODIES.items()}, **ANSWERS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Kvasir", "version": version("kvasir"), "description": _ABOUT},
        "tags": [{"name": name} for name in sorted({_tag(path) for path in paths})],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}, {}],
    }


_ABOUT = """Keys are needed when the server was started with some. Null is as good as leaving a field out. Unknown fields are
named in the header X-Kvasir-Warning. With `stream` an answer comes as server-sent events, or lines of JSON in Ollama's
dialect: `x-events` says what each holds. OpenAI's streams end with `data: [DONE]`."""


def _operation(path: str, operation: Operation) -> Json:
    error = {"description": "What is wrong.", "content": {JSON: {"schema": ref(error_schema(path))}}}
    found: Json = {"summary": operation.says, "tags": [_tag(path)], "responses": {}}
    if operation.query:
        found["parameters"] = [_parameter(name, "query", schema) for name, schema in operation.query.items()]
    if operation.body:
        content = {"schema": ref(operation.body), "example": EXAMPLES[operation.body]}
        found["requestBody"] = {"required": True, "content": {JSON: content}}
    if operation.upload:
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    if not operation.refused:
        found["responses"]["200"] = {"description": "The answer.", "content": _content(operation)}
    for status, name in operation.statuses.items():
        found["responses"][status] = {"description": "The answer.", "content": {JSON: {"schema": ref(name)}}}
    found["responses"] |= {"4XX": error, "5XX": error}
    if operation.open:
        found["security"] = []
    return found


def _content(operation: Operation) -> Json:
    found: Json = {media: {"schema": {"type": "string"}} for media in operation.other}
    if operation.answer:
        found[JSON] = {"schema": ref(operation.answer)}
    events = {media: {"schema": {"type": "string"}, "x-events": ref(name)} for media, name in operation.events.items()}
    return {**found, **events}


def error_schema(path: str) -> str:
    """The shape of a path's errors, as `error_shapes.error_body` has it."""
    if path.startswith("/api/"):
        return "OllamaError"
    return "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"


_TAGS = {
    "Server": ("/-/healthz", "/health", "/metrics", "/version", "/openapi", "/docs", "/v1/groups", "/v1/streams"),
    "Ranking": ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/classify", "/v1/classify"),
    "Tokens": ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
}
"""Tag -> beginnings of the paths that no dialect has."""


def _tag(path: str) -> str:
    if path.startswith("/api/") or path == "/":
        return "Ollama"
    if path.startswith("/v1/messages"):
        return "Anthropic"
    return next((tag for tag, paths in _TAGS.items() if path.startswith(paths)), "OpenAI")


def _parameter(name: str, place: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": place, "required": required, "schema": schema}


_FORM: Json = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 30 * 86400},
    },
    "required": ["file", "purpose"],
}
