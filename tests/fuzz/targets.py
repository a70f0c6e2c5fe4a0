"""What reads bytes that somebody else made: each target takes any, and raises only where the code has a bug.

Refusals (ClientError of a request, ConfigError of a file) are right answers. A first byte or two choose among the variants.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import orjson
import routes
from google.protobuf.message import DecodeError, Message

from kvasir.cluster import (
    anthropic_schema,
    ollama_schema,
    openai_schema,
    pooling_schema,
    responses_schema,
    system_one,
    wire,
)
from kvasir.cluster.call import request_id_from
from kvasir.cluster.files import expires_after
from kvasir.cluster.multipart import Multipart
from kvasir.cluster.pages import Page
from kvasir.cluster.recordings import Recordings
from kvasir.cluster.service_fields import check_metadata
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.engine import gguf_config, gguf_tokenizer
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.gguf import read_gguf
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.peer_wire import decode_ask, decode_get, decode_offer
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.sentencepiece_model import read_sentencepiece
from kvasir.engine.tiktoken_file import read_ranks, read_tekken
from kvasir.engine.tokenizer_files import load_tokenizer
from kvasir.proto import group_pb2 as pb

Target = Callable[[bytes], None]

_BODIES: list[Callable[[dict[str, Any]], Any]] = [
    openai_schema.parse_chat,
    openai_schema.parse_completion,
    openai_schema.parse_tokenize,
    openai_schema.parse_detokenize,
    responses_schema.parse_response,
    responses_schema.parse_input_tokens,
    anthropic_schema.parse_messages,
    anthropic_schema.parse_count,
    ollama_schema.parse_chat,
    ollama_schema.parse_generate,
    ollama_schema.parse_embed,
    ollama_schema.parse_embeddings,
    pooling_schema.parse_embeddings,
    pooling_schema.parse_classify,
    pooling_schema.parse_rerank,
    pooling_schema.parse_score,
    system_one.parse_system_one,
]
_KINDS = ("json", "regex", "grammar", "structural_tag")
_TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "tokenizer_config.json")
_BOXES = [pb.GatewayMessage, pb.GroupMessage]
_KNOWN = Request(request_id="a", prompt_token_ids=[1], sampling=SamplingParams())


def bodies(data: bytes) -> None:
    """Bodies of requests, to where a group would take them."""
    with contextlib.suppress(ClientError, orjson.JSONDecodeError):
        body = orjson.loads(data[1:])
        if isinstance(body, dict):
            ask = _BODIES[data[0] % len(_BODIES)](body)
            call = getattr(ask, "call", None)
            if sampling := dict(getattr(call or ask, "sampling", {})):
                SamplingParams(**sampling)
            if (use := getattr(call, "tools", None)) is not None:
                for form in (None, TOOL_FORMATS["hermes"]):
                    use.held(form)


def constraints(data: bytes) -> None:
    """Schemas, grammars and structural tags, to what the grammar library is given."""
    with contextlib.suppress(ClientError):
        text = data[1:].decode("utf-8", "replace")
        grammar_text(StructuredOutput(**{_KINDS[data[0] % len(_KINDS)] if data else "json": text}), {"<tool>": 7})


def gguf(data: bytes) -> None:
    """GGUF files: tensors, configuration and tokenizer."""
    with _file("model.gguf", data) as path, contextlib.suppress(ConfigError):
        found = read_gguf(path)
        with contextlib.suppress(ConfigError):
            gguf_config.config(found)
        gguf_tokenizer.read_gguf_tokenizer(found.metadata)


def tokenizer_files(data: bytes) -> None:
    """Files of tokenizers in a model's folder."""
    name = _FILES[data[0] % len(_FILES)] if data else _FILES[0]
    with _file(name, data[1:]) as path, contextlib.suppress(ConfigError):
        load_tokenizer(path.parent)


def vocabularies(data: bytes) -> None:
    """The formats that we parse ourselves."""
    for read in (read_sentencepiece, read_ranks, read_tekken):
        with contextlib.suppress(ConfigError):
            read(data)


def templates(data: bytes) -> None:
    """Chat templates, the model's or a request's."""
    source = data.decode("utf-8", "replace")
    for tools in (None, [_TOOL]):
        with contextlib.suppress(ClientError):
            ChatTemplates({"default": source}, {"bos_token": "<s>"}).render(_TALK, tools)


def multipart(data: bytes) -> None:
    """Uploads: however they are cut, the same is read."""
    if not data:
        return
    found = []
    for step in (len(data), data[0] % 32 + 1):
        form, events, error = Multipart("multipart/form-data; boundary=x"), [], ""
        try:
            for at in range(1, len(data), step):
                events += form.feed(data[at : at + step])
        except ClientError as refusal:
            error = refusal.message
        fields = [event for event in events if not hasattr(event, "data")]
        found.append((fields, b"".join(getattr(event, "data", b"") for event in events), form.complete, error))
    assert found[0] == found[1] or found[0][3], found


def messages(data: bytes) -> None:
    """What gateways and groups say to each other."""
    if not data:
        return
    try:
        message: Any = _BOXES[data[0] % 2].FromString(data[1:])
    except DecodeError:
        return
    kind = message.WhichOneof("message")
    with contextlib.suppress(ClientError):
        if kind == "submit":
            wire.encode_request(wire.decode_request(message.submit, "a"), 1)
        elif kind == "step":
            with contextlib.suppress(ValueError):  # columns of different lengths
                for _ in wire.step_events(message.step, lambda number: _KNOWN):
                    pass
        elif kind == "answer":
            wire.encode_error(wire.decode_error(message.answer.error))
        elif kind == "load":
            wire.decode_stats(message.load.stats)
        assert isinstance(message, Message)


def peers(data: bytes) -> None:
    """What groups say to each other about blocks; ValueError is a refusal there."""
    with contextlib.suppress(ValueError):
        said = json.loads(data)
        for decode in (decode_get, decode_offer, lambda given: decode_ask(given, b"\x01\x00\x00\x00")):
            with contextlib.suppress(ValueError):
                decode(said)


def identifiers(data: bytes) -> None:
    """Ids, numbers and words in headers, paths and queries."""
    text = data.decode("latin-1")
    words = text.split("\n")
    for word in words:
        with contextlib.suppress(ClientError):
            request_id_from(word, "X-Request-ID")
        with contextlib.suppress(ClientError):
            Recordings().resumed(word, 0, {}, ())
        with contextlib.suppress(ClientError):
            Recordings().new({"kvasir-resumable": word})
        with contextlib.suppress(ClientError):
            Page.of({"limit": word, "order": "asc"})
        with contextlib.suppress(ClientError):
            expires_after("created_at", word)
        with contextlib.suppress(ClientError):
            check_metadata("metadata", {word: word})


@contextlib.contextmanager
def _file(name: str, data: bytes) -> Any:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


TARGETS: dict[str, Target] = formats.TARGETS | routes.TARGETS | {
    function.__name__: function
    for function in (
        bodies, constraints, gguf, tokenizer_files, vocabularies, templates, multipart, messages, peers, identifiers,
    )
}  # fmt: skip
