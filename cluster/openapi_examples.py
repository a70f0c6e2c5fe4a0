"""A body of every kind that the OpenAPI document describes, as a client would send it to a server of the bundled model."""

from __future__ import annotations

from kvasir.cluster.described import Json

_MODEL: Json = {"model": "skald"}
_ASKED: Json = {**_MODEL, "messages": [{"role": "user", "content": "Who are you?"}]}
_QUESTION: Json = {"type": "predicate", "instructions": "Is she angry?"}

EXAMPLES: dict[str, Json] = {
    "ChatRequest": {**_ASKED, "max_tokens": 64, "temperature": 0},
    "CompletionRequest": {**_MODEL, "prompt": "Once upon a time", "max_tokens": 32},
    "MetadataRequest": {"metadata": {"topic": "demo"}},
    "TokenizeRequest": {**_MODEL, "prompt": "Once upon a time"},
    "DetokenizeRequest": {**_MODEL, "tokens": [72, 101]},
    "EmbeddingRequest": {**_MODEL, "input": ["Once upon a time", "The sea"]},
    "ClassifyRequest": {**_MODEL, "input": "Once upon a time"},
    "RerankRequest": {**_MODEL, "query": "How do I bake bread?", "documents": ["Knead the dough.", "Stocks fell."]},
    "ScoreRequest": {**_MODEL, "text_1": "How do I bake bread?", "text_2": ["Knead the dough.", "Stocks fell."]},
    "ResponseRequest": {**_MODEL, "input": "What is 47 + 38?", "max_output_tokens": 64},
    "CompactionRequest": {**_MODEL, "input": [{"role": "user", "content": "I am Ann. Tea, please."}]},
    "ConversationRequest": {"metadata": {"topic": "demo"}},
    "ConversationItems": {"items": [{"type": "message", "role": "user", "content": "Tea, please."}]},
    "BatchRequest": {"input_file_id": "file-abc123", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    "DecisionRequest": {**_MODEL, "input": "Ann: I waited for two weeks.", "questions": [_QUESTION]},
    "SystemOneRequest": {
        **_MODEL,
        "state": "Ann: I waited for two weeks.",
        "questions": {"angry": {"type": "noul", "instructions": "She is angry."}},
    },
    "RoleRequest": {"role": "decode"},
    "MessagesRequest": {**_ASKED, "max_tokens": 64},
    "CountTokensRequest": _ASKED,
    "OllamaGenerateRequest": {**_MODEL, "prompt": "Once upon a time", "stream": False, "options": {"num_predict": 32}},
    "OllamaChatRequest": {**_ASKED, "stream": False, "options": {"temperature": 0, "num_predict": 32}},
    "OllamaEmbedRequest": {**_MODEL, "input": ["Once upon a time", "The sea"]},
    "OllamaEmbeddingsRequest": {**_MODEL, "prompt": "Once upon a time"},
    "OllamaShowRequest": _MODEL,
}
"""Name of a body's schema -> an example of it."""
