"""Answers in the OpenAPI document: whole ones, errors, and the events and lines that streams are made of."""

from __future__ import annotations

from typing import Any, get_args

from kvasir.engine.config import Role

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_INT: Json = {"type": "integer"}
_NUMBER: Json = {"type": "number"}
_BOOL: Json = {"type": "boolean"}
_ANY: Json = {}
_NULL: Json = {"type": "null"}


def ref(name: str) -> Json:
    """One of the document's schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": [*required]}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _or_null(of: Json) -> Json:
    return {"anyOf": [of, _NULL]}


def _is(value: object) -> Json:
    return {"const": value}


def _page(of: Json) -> Json:
    return _object(
        {"object": _is("list"), "data": _list(of), "has_more": _BOOL},
        {"first_id": _TEXT, "last_id": _TEXT},
    )


def _deleted(kind: str) -> Json:
    return _object({"id": _TEXT, "object": _is(kind), "deleted": _is(True)})


_USAGE = _object(
    {"prompt_tokens": _INT, "completion_tokens": _INT, "total_tokens": _INT},
    {
        "prompt_tokens_details": _or_null(_object({"cached_tokens": _INT})),
        "completion_tokens_details": _object({"reasoning_tokens": _INT}),
    },
)
_FINISH: Json = {"enum": ["stop", "length", "tool_calls", None]}
_STOP: Json = {"type": ["string", "integer", "null"]}
_CALLED: Json = {"function": {"name": _TEXT, "arguments": _TEXT}, "custom": {"name": _TEXT, "input": _TEXT}}
_CALL: Json = {
    "anyOf": [_object({"id": _TEXT, "type": _is(kind), kind: _object(said)}) for kind, said in _CALLED.items()]
}
_CALL_PART = _object(
    {"index": _INT},
    {"id": _TEXT, "type": {"enum": [*_CALLED]}, **{kind: _object({}, said) for kind, said in _CALLED.items()}},
)
_SAID: Json = {"reasoning": _TEXT, "reasoning_content": _TEXT}
_MESSAGE = _object({"role": _TEXT, "content": _or_null(_TEXT), "refusal": _NULL}, {**_SAID, "tool_calls": _list(_CALL)})
_ENVELOPE: Json = {"id": _TEXT, "created": _INT, "model": _TEXT}
_LABELS: Json = {"type": "object", "additionalProperties": _TEXT}
_BESIDE: Json = {
    "system_fingerprint": _TEXT,
    "service_tier": _TEXT,
    "usage": _or_null(ref("Usage")),
    "timing": ref("Timing"),
    "prompt_token_ids": _list(_INT),
    "prompt_logprobs": _or_null(_list(_ANY)),
    "metadata": _or_null(_LABELS),
}
_CHOICE: Json = {"logprobs": {"type": ["object", "null"]}, "stop_reason": _STOP, "token_ids": _list(_INT)}
_DURATIONS: Json = dict.fromkeys(
    ("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count"), _INT
) | {
    "timing": ref("Timing"),
    "eval_duration": _INT,
    "context": _list(_INT),
    "done_reason": _TEXT,
    "logprobs": _list(_ANY),
}
_OLLAMA: Json = {"model": _TEXT, "created_at": {"type": "string", "format": "date-time"}, "done": _BOOL}
_OLLAMA_CALL = _object(
    {
        "id": _TEXT,
        "type": _is("function"),
        "function": _object({"index": _INT, "name": _TEXT, "arguments": {"type": "object"}}),
    }
)
_ANTHROPIC_USAGE = _object({"input_tokens": _INT, "output_tokens": _INT})
_DETAILS = _object(
    dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), _TEXT)
    | {"families": _list(_TEXT)}
)
_CARD: Json = {"name": _TEXT, "model": _TEXT, "size": _INT, "digest": _TEXT, "details": _DETAILS}
_VECTOR: Json = {"type": ["array", "string"]}
_POOLED: Json = {"id": _TEXT, "object": _is("list"), "created": _INT, "model": _TEXT, "usage": ref("Usage")}


_TIMED: Json = {"timing": ref("Timing")}


def _pooled(of: Json) -> Json:
    return _object({**_POOLED, "data": _list(of)}, _TIMED)


_OPENAI = {
    "Usage": _USAGE,
    "Timing": _object(
        {f"{name}_ms": _NUMBER for name in ("queue", "prefill", "decode", "total")}
        | {"cached_tokens": _INT, "group": _TEXT},
        {"acceptance": _NUMBER},
    ),
    "ChatCompletion": _object(
        {
            **_ENVELOPE,
            "object": _is("chat.completion"),
            "choices": _list(_object({"index": _INT, "message": _MESSAGE, "finish_reason": _FINISH}, _CHOICE)),
            "usage": ref("Usage"),
        },
        _BESIDE,
    ),
    "ChatCompletionChunk": _object(
        {
            **_ENVELOPE,
            "object": _is("chat.completion.chunk"),
            "choices": _list(
                _object(
                    {
                        "index": _INT,
                        "delta": _object(
                            {}, {"role": _TEXT, "content": _TEXT, **_SAID, "tool_calls": _list(_CALL_PART)}
                        ),
                        "finish_reason": _FINISH,
                    },
                    _CHOICE,
                )
            ),
        },
        _BESIDE,
    ),
    "Completion": _object(
        {
            **_ENVELOPE,
            "object": _is("text_completion"),
            "choices": _list(
                _object(
                    {"index": _INT, "text": _TEXT, "finish_reason": _FINISH, "logprobs": _ANY},
                    {**_CHOICE, "prompt_token_ids": _list(_INT), "prompt_logprobs": _ANY},
                )
            ),
        },
        _BESIDE,
    ),
    "Model": _object(
        {"id": _TEXT, "object": _is("model"), "created": _INT, "owned_by": _TEXT},
        {"root": _TEXT, "parent": _NULL, "max_model_len": _or_null(_INT)},
    ),
    "ModelList": _object({"object": _is("list"), "data": _list(ref("Model"))}),
    "StoredChatList": _page(ref("ChatCompletion")),
    "StoredMessages": _page(_object({"id": _TEXT, "role": _TEXT})),
    "ChatDeleted": _deleted("chat.completion.deleted"),
    "Tokens": _object(
        {"count": _INT, "max_model_len": _INT, "tokens": _list(_INT), "token_strs": _or_null(_list(_TEXT))}
    ),
    "Detokenized": _object({"prompt": _TEXT}),
    "Embeddings": _pooled(_object({"object": _is("embedding"), "index": _INT, "embedding": _VECTOR})),
    "Classes": _pooled(
        _object({"index": _INT, "label": _or_null(_TEXT), "probs": _list(_NUMBER), "num_classes": _INT})
    ),
    "Scores": _pooled(_object({"object": _is("score"), "index": _INT, "score": _NUMBER})),
    "Ranking": _object(
        {
            "id": _TEXT,
            "model": _TEXT,
            "usage": ref("Usage"),
            "results": _list(
                _object({"index": _INT, "relevance_score": _NUMBER}, {"document": _object({"text": _TEXT})})
            ),
        },
        _TIMED,
    ),
}

_DECISION = _object(
    {"type": {"enum": ["predicate", "choice", "score"]}, "name": _or_null(_TEXT), "refusal": _NULL},
    {
        **dict.fromkeys(("probability", "confidence", "score"), _NUMBER),
        "choice": {"type": ["string", "boolean"]},
        "probabilities": _list(
            _object(
                {"value": {"type": ["string", "boolean", "number"]}, "probability": _NUMBER}, {"label": _or_null(_TEXT)}
            )
        ),
    },
)
_SHARES: Json = {"type": "object", "additionalProperties": _NUMBER}
_SYSTEM_ONE: Json = {
    "oneOf": [
        _object({"type": _is("noul"), "noul": _NUMBER}),
        _object({"type": _is("choice"), "choice": _TEXT, "confidence": _NUMBER, "probabilities": _SHARES}),
        _object(
            {
                "type": _is("score"),
                "score": _NUMBER,
                "confidence": _NUMBER,
                "legend": {"type": "object", "additionalProperties": _TEXT},
                "probabilities": _SHARES,
            }
        ),
    ]
}
_STORED = {
    "Item": _object({"id": _TEXT, "type": _TEXT}),
    "Response": _object(
        {
            "id": _TEXT,
            "object": _is("response"),
            "created_at": _INT,
            "status": {"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
            "model": _TEXT,
            "output": _list(ref("Item")),
            "error": _or_null(_object({"code": _TEXT, "message": _TEXT})),
            "usage": _or_null(ref("ResponseUsage")),
            "metadata": _LABELS,
            "parallel_tool_calls": _BOOL,
            "tool_choice": {"type": ["string", "object"]},
            "tools": _list(_object({"type": _is("function"), "name": _TEXT})),
        },
        {
            "background": _BOOL,
            "store": _BOOL,
            "conversation": _or_null(_object({"id": _TEXT})),
            "incomplete_details": _or_null(_object({"reason": _TEXT})),
            **dict.fromkeys(
                ("instructions", "previous_response_id", "prompt_cache_key", "service_tier"), _or_null(_TEXT)
            ),
            "max_output_tokens": _or_null(_INT),
            "reasoning": _object({"effort": _or_null(_TEXT), "summary": _or_null(_TEXT)}),
            "text": _object({"format": _object({"type": _TEXT})}),
            "truncation": {"enum": ["auto", "disabled"]},
        },
    ),
    "ResponseUsage": _object(
        {
            "input_tokens": _INT,
            "input_tokens_details": _object({"cached_tokens": _INT}),
            "output_tokens": _INT,
            "output_tokens_details": _object({"reasoning_tokens": _INT}),
            "total_tokens": _INT,
        }
    ),
    "ResponseEvent": _object({"type": {"type": "string", "pattern": r"^response\."}, "sequence_number": _INT}),
    "ResponseDeleted": _deleted("response"),
    "Compaction": _object(
        {
            "id": _TEXT,
            "object": _is("response.compaction"),
            "created_at": _INT,
            "output": _list(ref("Item")),
            "usage": ref("ResponseUsage"),
        }
    ),
    "Decisions": _object(
        {
            "id": _TEXT,
            "object": _is("decision"),
            "created_at": _INT,
            "model": _TEXT,
            "answers": _list(_DECISION),
            "usage": ref("ResponseUsage"),
        },
        _TIMED,
    ),
    "SystemOneAnswers": _object(
        {
            "model": _TEXT,
            "answers": {"type": "object", "additionalProperties": _SYSTEM_ONE},
            "usage": _object({"input_tokens": _INT, "output_tokens": _INT}),
        },
        _TIMED,
    ),
    "InputTokens": _object({"object": _is("response.input_tokens"), "input_tokens": _INT}),
    "ItemList": _page(ref("Item")),
    "Conversation": _object({"id": _TEXT, "object": _is("conversation"), "created_at": _INT, "metadata": _LABELS}),
    "ConversationDeleted": _deleted("conversation.deleted"),
    "File": _object(
        {"id": _TEXT, "object": _is("file"), "bytes": _INT, "created_at": _INT, "filename": _TEXT, "purpose": _TEXT}
    ),
    "FileList": _page(ref("File")),
    "FileDeleted": _deleted("file"),
    "Batch": _object(
        {
            "id": _TEXT,
            "object": _is("batch"),
            "endpoint": _TEXT,
            "input_file_id": _TEXT,
            "completion_window": _is("24h"),
            "status": _TEXT,
            "created_at": _INT,
            "request_counts": _object({"total": _INT, "completed": _INT, "failed": _INT}),
        }
    ),
    "BatchList": _page(ref("Batch")),
    "StreamCancelled": _deleted("stream"),
    "StreamedEvent": {"description": "As in the stream that was lost."},
}

_OTHERS = {
    "Message": _object(
        {
            "id": _TEXT,
            "type": _is("message"),
            "role": _is("assistant"),
            "model": _TEXT,
            "content": _list(
                _object(
                    {"type": {"enum": ["text", "thinking", "tool_use"]}},
                    {
                        **dict.fromkeys(("text", "thinking", "signature", "id", "name"), _TEXT),
                        "input": {"type": "object"},
                    },
                )
            ),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", None]},
            "stop_sequence": _or_null(_TEXT),
            "usage": _ANTHROPIC_USAGE,
        },
        {"timing": ref("Timing"), "context_management": _object({"applied_edits": _list({"type": "object"})})},
    ),
    "MessageEvent": _object(
        {
            "type": {
                "enum": [
                    *("message_start", "message_delta", "message_stop", "ping", "error"),
                    *("content_block_start", "content_block_delta", "content_block_stop"),
                ]
            }
        }
    ),
    "CountedTokens": _object({"input_tokens": _INT}, {"context_management": _object({"original_input_tokens": _INT})}),
    "OllamaGenerated": _object({**_OLLAMA, "response": _TEXT}, {**_DURATIONS, "thinking": _TEXT}),
    "OllamaChat": _object(
        {
            **_OLLAMA,
            "message": _object(
                {"role": _TEXT, "content": _TEXT}, {"thinking": _TEXT, "tool_calls": _list(_OLLAMA_CALL)}
            ),
        },
        _DURATIONS,
    ),
    "OllamaEmbedded": _object({"model": _TEXT, "embeddings": _list(_list(_NUMBER))}, _DURATIONS),
    "OllamaEmbedding": _object({"embedding": _list(_NUMBER)}, _TIMED),
    "OllamaModel": _object({**_CARD, "modified_at": _TEXT}),
    "OllamaTags": _object({"models": _list(ref("OllamaModel"))}),
    "OllamaRunning": _object(
        {"models": _list(_object({**_CARD, "expires_at": _TEXT, "size_vram": _INT, "context_length": _INT}))}
    ),
    "OllamaShown": _object(
        {
            **dict.fromkeys(("modelfile", "parameters", "template"), _TEXT),
            "details": _DETAILS,
            "model_info": {"type": "object"},
            "capabilities": _list(_TEXT),
            "modified_at": _TEXT,
        },
        {"license": _TEXT},
    ),
    "Group": _object(
        {"id": _TEXT, "object": _is("group"), "model": _TEXT, "role": {"enum": [*get_args(Role)]}, "state": _TEXT},
        {"running": _INT, "waiting": _INT},
    ),
    "GroupList": _object({"object": _is("list"), "data": _list(ref("Group"))}),
    "Version": _object({"version": _TEXT}),
    "Document": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    "Healthy": _object({"status": _is("ok")}),
    "Unhealthy": _object({"status": _is("unavailable"), "models": {"type": "object"}, "error": {"type": "object"}}),
}

_ERRORS = {
    "OpenAIError": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)},
            )
        }
    ),
    "AnthropicError": _object(
        {"type": _is("error"), "error": _object({"type": _TEXT, "message": _TEXT}), "request_id": _or_null(_TEXT)}
    ),
    "OllamaError": _object({"error": _TEXT}),
}

ANSWERS: dict[str, Json] = {**_OPENAI, **_STORED, **_OTHERS, **_ERRORS}
"""Name of a schema of the document -> the schema."""
