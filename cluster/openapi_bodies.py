"""Request bodies in the OpenAPI document: made from the tables of fields by which bodies are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvasir.cluster import (
    anthropic_schema,
    batches_api,
    context_edits,
    conversations_api,
    decisions_schema,
    groups_api,
    ollama_fields,
    openai_fields,
    pooling_schema,
    responses_items,
    responses_schema,
    system_one,
)
from kvasir.cluster.described import Check, schema_of
from kvasir.cluster.openai_fields import Neutral
from kvasir.engine.request import MAX_LOGPROBS, MAX_N, MAX_WHOLE

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_IDS: Json = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS: Json = {"type": "array", "items": _TEXT, "minItems": 1}
_TEXT_OR_TEXTS: Json = {"anyOf": [_TEXT, _TEXTS]}
_PROMPT: Json = {"anyOf": [_TEXT, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_SCHEMA: Json = {"type": ["object", "boolean", "string"], "description": "A JSON Schema, or the text of one."}
_CHOICE: Json = {"type": ["string", "object"]}
_KEY_AND_COUNT: Json = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
_FUNCTION: Json = {
    "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    "description": _TEXT,
    "parameters": {"type": "object", "properties": {"type": {"const": "object"}}},
    "strict": {"type": "boolean"},
}
_GRAMMAR: Json = {"syntax": {"enum": ["lark", "regex"]}, "definition": _TEXT}


def _custom(form: Json) -> Json:
    """Fields of a custom tool. form: of a grammar."""
    grammar = {"type": "object", "properties": {"type": {"const": "grammar"}, **form}, "required": ["type", *form]}
    text = {
        "type": "object",
        "properties": {"type": {"const": "text"}},
        "required": ["type"],
        "additionalProperties": False,
    }
    return {"name": _FUNCTION["name"], "description": _TEXT, "format": {"anyOf": [text, grammar]}}


def _tool(kind: str, fields: Json, *, flat: bool) -> Json:
    inner: Json = fields if flat else {kind: {"type": "object", "properties": fields, "required": ["name"]}}
    named = "name" if flat else kind
    return {"type": "object", "properties": {"type": {"const": kind}, **inner}, "required": ["type", named]}


_DEEP_GRAMMAR: Json = {"grammar": {"type": "object", "properties": _GRAMMAR, "required": [*_GRAMMAR]}}
_TOOL: Json = {"anyOf": [_tool("function", _FUNCTION, flat=False), _tool("custom", _custom(_DEEP_GRAMMAR), flat=False)]}
_FLAT_TOOL: Json = {"anyOf": [_tool("function", _FUNCTION, flat=True), _tool("custom", _custom(_GRAMMAR), flat=True)]}
_NAMED_TOOL: Json = {
    "type": "object",
    "properties": {
        "name": _FUNCTION["name"],
        "description": _TEXT,
        "input_schema": _FUNCTION["parameters"],
    },
    "required": ["name", "input_schema"],
}
_MESSAGE: Json = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "description": "system, user, assistant, tool, or what the chat template knows"},
        "content": {"type": ["string", "array", "null"]},
    },
    "required": ["role"],
}
_TURN: Json = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": ["string", "array"]}},
    "required": ["role", "content"],
}
_BLOCKS: Json = {"type": ["string", "array"]}


def _number(low: float | None, high: float | None, *, open_low: bool = False) -> Json:
    limits: Json = {"type": "number"}
    if low is not None:
        limits["exclusiveMinimum" if open_low else "minimum"] = low
    return limits if high is None else {**limits, "maximum": high}


def _integer(low: int, high: int = MAX_WHOLE) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


SAMPLING: dict[str, Json] = {
    "n": _integer(1, MAX_N),
    "best_of": _integer(1, MAX_N),
    "temperature": _number(0, None),
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, None, open_low=True),
    "seed": _integer(-(2**63), 2**63 - 1),
    "min_tokens": _integer(0),
    "prompt_logprob_start": _integer(0),
    "repeat_last_n": _integer(-1),
    "typical_p": _number(0, 1, open_low=True),
    "tfs_z": _number(0, 1, open_low=True),
    "mirostat": _integer(0, 2),
    "mirostat_tau": _number(0, None),
    "mirostat_eta": _number(0, 1),
    "length_penalty": _number(None, None),
    "early_stopping": {"enum": [True, False, "no", "yes", "never"]},
    "truncate_prompt_tokens": _integer(-1),
    "truncation_side": {"enum": ["left", "right"]},
    "num_keep": _integer(-1),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
}
"""Ranges that `SamplingParams` checks."""

LATER: dict[str, Json] = {
    **SAMPLING,
    "repeat_penalty": SAMPLING["repetition_penalty"],
    "logits_processors": {"type": ["object", "array"]},
    "top_logprobs": _integer(0, MAX_LOGPROBS),
    "logprobs": _integer(0, MAX_LOGPROBS),
    "tool_choice": _CHOICE,
    "prompt": _PROMPT,
    "response_format": {
        "type": "object",
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
            "json_schema": {"type": "object", "properties": {"name": _TEXT, "schema": {"type": "object"}}},
        },
        "required": ["type"],
    },
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": _SCHEMA,
            "json_object": {"type": "boolean"},
            "disable_any_whitespace": {"type": "boolean"},
            **dict.fromkeys(("regex", "grammar"), _TEXT),
            "choice": _TEXTS,
            "structural_tag": {"type": ["object", "string"]},
        },
    },
    "guided_json": _SCHEMA,
    "guided_json_object": {"type": "boolean"},
    "guided_regex": _TEXT,
    "guided_choice": _TEXTS,
    "guided_grammar": _TEXT,
    "structural_tag": {"type": ["object", "string"]},
    "encoding_format": {"enum": ["float", "base64"]},
    "documents": {"anyOf": [_TEXT, {"type": "array", "items": {"type": ["string", "object"]}, "minItems": 1}]},
    **dict.fromkeys(("text_1", "text_2", "queries", "items", "data_1", "data_2"), _TEXT_OR_TEXTS),
    "input": _PROMPT,
    "conversation": {"type": ["string", "object"]},
    "endpoint": {"enum": [*batches_api.ENDPOINTS]},
    "completion_window": {"const": "24h"},
    "messages": {"type": "array", "items": _TURN, "minItems": 1},
    "system": _BLOCKS,
    "tools": {"type": "array", "items": _NAMED_TOOL},
    "thinking": {
        "type": "object",
        "properties": {"type": {"enum": ["enabled", "adaptive", "disabled"]}, "budget_tokens": _integer(1)},
        "required": ["type"],
    },
    "output_config": {"type": "object"},
    "output_format": {"type": "object"},
    "metadata": {"type": "object"},
    "cache_control": {},
}
"""Of fields that the tables leave to the code behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One kind of body. `closer`: field -> what holds beyond its check."""

    honoured: Mapping[str, Check]
    ignored: Neutral = field(default_factory=dict)
    refused: Neutral = field(default_factory=dict)
    required: Sequence[str] = ()
    closer: Mapping[str, Json] = field(default_factory=dict)
    closed: bool = False
    """Unknown fields are refused instead of being named in a warning."""

    def schema(self) -> Json:
        properties = {name: self._honoured(name, check) for name, check in sorted(self.honoured.items())}
        for name, neutral in sorted(self.refused.items()):
            properties.setdefault(name, _refused(neutral))
        for name in sorted(self.ignored):
            properties.setdefault(name, {"description": "Ignored; the header X-Kvasir-Warning says so."})
        found: Json = {"type": "object", "properties": properties}
        if self.required:
            found["required"] = [*self.required]
        return found | ({"additionalProperties": False} if self.closed else {})

    def _honoured(self, name: str, check: Check) -> Json:
        schema = self.closer.get(name) or schema_of(check) or LATER[name]
        return {"anyOf": [dict(schema), {"type": "null"}]} if name not in self.required else dict(schema)


def _refused(neutral: Sequence[Any]) -> Json:
    return {"enum": [None, *neutral], "description": "Not supported: any other value is refused."}


_OPTIONS = Body(
    honoured=ollama_fields.OPTIONS,
    ignored=ollama_fields.OPTIONS_IGNORED,
    refused=ollama_fields.OPTIONS_REFUSED,
    closer={"logit_bias": _KEY_AND_COUNT},
)
_OLLAMA_CLOSER: Json = {"options": _OPTIONS.schema()}
_ANTHROPIC_CLOSER: Json = {
    "tool_choice": {"type": "object", "required": ["type"]},
    "context_management": {
        "type": "object",
        "properties": {
            "edits": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"type": {"enum": [*context_edits.KNOWN]}},
                    "required": ["type"],
                },
            }
        },
    },
}
_POOLING: Json = {"ignored": pooling_schema._IGNORED, "refused": pooling_schema._REFUSED}
_CHAT_CLOSER: Json = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
    "tools": {"type": "array", "items": _TOOL},
    "logit_bias": _KEY_AND_COUNT,
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
}
_ITEM: Json = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", *sorted(responses_items.READ - {"message"}), responses_items.REFERENCE]},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"type": ["string", "array"]},
        **dict.fromkeys(("id", "call_id", "name", "arguments", "encrypted_content"), _TEXT),
        "output": {"type": ["string", "array"]},
    },
}
_ITEMS: Json = {"anyOf": [_TEXT, {"type": "array", "items": _ITEM, "minItems": 1}]}
_RESPONSE = Body(
    honoured=responses_schema.HONOURED,
    ignored=responses_schema.IGNORED,
    refused=responses_schema.REFUSED,
    closer={
        "input": _ITEMS,
        "tools": {"type": "array", "items": _FLAT_TOOL},
        "text": {
            "type": "object",
            "properties": {
                "format": {
                    "type": "object",
                    "properties": {
                        "type": {"enum": ["text", "json_object", "json_schema"]},
                        "name": _TEXT,
                        "schema": {"type": "object"},
                    },
                    "required": ["type"],
                },
                "verbosity": {"const": "medium"},
            },
        },
        "reasoning": {
            "type": "object",
            "properties": {
                "effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", None]},
                "summary": {"enum": ["auto", "concise", "detailed", None]},
            },
        },
        "conversation": {"anyOf": [_TEXT, {"type": "object", "properties": {"id": _TEXT}, "required": ["id"]}]},
    },
)
_CHOSEN: Json = {
    "type": "object", "properties": {"value": {"type": ["string", "boolean"]}}, "required": ["value"],
    "additionalProperties": False,
}  # fmt: skip
_LEVEL: Json = {
    "type": "object", "properties": {"value": {"type": "number"}, "label": _TEXT}, "additionalProperties": False,
}  # fmt: skip
_QUESTION: Json = {
    "type": "object",
    "properties": {
        "type": {"enum": ["predicate", "choice", "score"]},
        "name": _TEXT,
        "instructions": _TEXT,
        "choices": {"type": "array", "items": {"anyOf": [_TEXT, _CHOSEN]}, "minItems": 2},
        "levels": {"type": "array", "items": {"anyOf": [_TEXT, {"type": "number"}, _LEVEL]}, "minItems": 2},
    },
    "required": ["type", "instructions"],
}
_SAID: Json = {"type": ["string", "object", "array"]}
_NAMED_QUESTIONS: Json = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": decisions_schema.MAX_QUESTIONS,
    "additionalProperties": {
        "type": "object",
        "properties": {"type": {"enum": [*system_one.TYPES]}},
        "required": ["type", "instructions"],
    },
}
_QUESTIONS: Json = {"type": "array", "items": _QUESTION, "minItems": 1, "maxItems": decisions_schema.MAX_QUESTIONS}

BODIES: dict[str, Body] = {
    "ChatRequest": Body(
        honoured=openai_fields.CHAT_HONOURED,
        ignored=openai_fields.CHAT_IGNORED,
        refused=openai_fields.CHAT_REFUSED,
        required=("messages",),
        closer=_CHAT_CLOSER,
    ),
    "CompletionRequest": Body(
        honoured=openai_fields.COMPLETION_HONOURED,
        ignored=openai_fields.COMPLETION_IGNORED,
        refused=openai_fields.COMPLETION_REFUSED,
        required=("prompt",),
        closer={name: _CHAT_CLOSER[name] for name in ("logit_bias", "stream_options")},
    ),
    "TokenizeRequest": Body(
        honoured=openai_fields.TOKENIZE_HONOURED,
        refused={"chat_template": ()},
        closer={"messages": _CHAT_CLOSER["messages"]},
    ),
    "DetokenizeRequest": Body(honoured=openai_fields.DETOKENIZE_HONOURED, required=("tokens",)),
    "EmbeddingRequest": Body(honoured=pooling_schema.EMBEDDINGS, required=("input",), **_POOLING),
    "ClassifyRequest": Body(honoured=pooling_schema.CLASSIFY, required=("input",), **_POOLING),
    "RerankRequest": Body(
        honoured=pooling_schema.RERANK,
        ignored=pooling_schema._IGNORED,
        refused=pooling_schema._RERANK_REFUSED,
        required=("query", "documents"),
        closer={"documents": {"type": "array", "items": {"type": ["string", "object"]}, "minItems": 1}},
    ),
    "ScoreRequest": Body(honoured=pooling_schema.SCORE, **_POOLING),
    "ResponseRequest": _RESPONSE,
    "CompactionRequest": Body(
        honoured=responses_schema.COMPACTED,
        ignored=responses_schema.IGNORED,
        refused=responses_schema.NOT_COMPACTED,
        closer={"input": _ITEMS},
    ),
    "DecisionRequest": Body(
        honoured=decisions_schema.HONOURED,
        ignored=decisions_schema.IGNORED,
        refused=decisions_schema.REFUSED,
        required=("input", "questions"),
        closer={"input": _ITEMS, "questions": _QUESTIONS},
    ),
    "SystemOneRequest": Body(
        honoured=system_one.HONOURED,
        ignored=decisions_schema.IGNORED,
        refused=system_one.REFUSED,
        required=("state", "questions"),
        closer={"state": _SAID, "instructions": _SAID, "questions": _NAMED_QUESTIONS},
    ),
    "ConversationRequest": Body(honoured=conversations_api._CREATE, closed=True),
    "ConversationItems": Body(honoured={"items": conversations_api._ITEMS}, required=("items",), closed=True),
    "MetadataRequest": Body(
        honoured={"metadata": conversations_api._CREATE["metadata"]}, required=("metadata",), closed=True
    ),
    "RoleRequest": Body(honoured={"role": groups_api.check_role}, required=("role",), closed=True),
    "BatchRequest": Body(honoured=batches_api._HONOURED, required=("input_file_id", "endpoint", "completion_window")),
    "MessagesRequest": Body(
        honoured=anthropic_schema._MESSAGES,
        ignored=anthropic_schema._IGNORED,
        refused=anthropic_schema._REFUSED,
        required=("messages", "max_tokens"),
        closer=_ANTHROPIC_CLOSER,
    ),
    "CountTokensRequest": Body(
        honoured=anthropic_schema._COUNTED,
        ignored=anthropic_schema._IGNORED,
        refused=anthropic_schema._REFUSED,
        required=("messages",),
        closer=_ANTHROPIC_CLOSER,
    ),
    "OllamaGenerateRequest": Body(
        honoured=ollama_fields.GENERATE,
        ignored=ollama_fields.IGNORED,
        refused=ollama_fields.GENERATE_REFUSED,
        closer=_OLLAMA_CLOSER,
    ),
    "OllamaChatRequest": Body(
        honoured=ollama_fields.CHAT,
        ignored=ollama_fields.IGNORED,
        refused=ollama_fields.CHAT_REFUSED,
        closer={**_OLLAMA_CLOSER, "messages": {"type": "array", "items": {"type": "object", "required": ["role"]}}},
    ),
    "OllamaEmbedRequest": Body(
        honoured=ollama_fields.EMBED,
        refused=ollama_fields.EMBED_REFUSED,
        closer={"input": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}},
    ),
    "OllamaEmbeddingsRequest": Body(honoured=ollama_fields.EMBEDDINGS, refused=ollama_fields.EMBEDDINGS_REFUSED),
    "OllamaShowRequest": Body(
        honoured=ollama_fields.SHOW, refused={"system": ("",), "template": ("",), "options": ({},)}
    ),
}
"""Name of a schema of the document -> what it describes."""
