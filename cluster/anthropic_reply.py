"""Answers of /v1/messages, whole or as server-sent events."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import orjson

from kvasir.cluster.answer_parts import Part
from kvasir.cluster.anthropic_schema import MessagesAsk
from kvasir.cluster.error_shapes import anthropic_error
from kvasir.cluster.generation import Generation
from kvasir.cluster.reading import AnswerStream, called
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta, Output

Json = dict[str, Any]

_TEXT = {"type": "text_delta", "text": ""}
_STOPS = {"stop": "end_turn", "length": "max_tokens"}
_BLOCKS = {"content": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
"""Part of an answer -> the block that it belongs to."""
_SIGNATURE = "a3Zhc2ly"
"""Of thoughts: some clients send them back only if they have one. It says nothing, and nobody checks it."""


class MessagesReply:
    """One message. Blocks of other types than text are opened and closed by `_Blocks` alike."""

    def __init__(self, ask: MessagesAsk, generation: Generation, request_id: str) -> None:
        self._ask, self._generation = ask, generation
        self._id = f"msg_{request_id}"
        self._model = ask.call.model or generation.model.name
        self._blocks = _Blocks()
        self._answer = AnswerStream(generation.reading)
        self._begun = False

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        out = b"" if self._begun else self._begin()
        for _, delta in deltas:
            if not self._generation.reading.plain:
                out += self._parts(delta)
            elif delta.text:
                out += self._blocks.text(delta.text)
        return out

    def closing(self) -> bytes:
        end = event("message_delta", {"delta": self._stop(), "usage": self._usage(), **self._beside()})
        return (b"" if self._begun else self._begin()) + self._blocks.close() + end + event("message_stop", {})

    def whole(self) -> Json:
        parts = self._answer.parts(self._output.text, last=True)
        blocks = groupby(parts, lambda part: (_BLOCKS[part.kind], part.call))
        content = [self._block(list(some)) for _, some in blocks]
        return self._message(content) | self._stop() | {"usage": self._usage(), **self._beside()}

    def _block(self, parts: Sequence[Part]) -> Json:
        first, text = parts[0], "".join(part.text for part in parts if part.kind != "call")
        if first.kind == "content":
            return {"type": "text", "text": text, "citations": None}
        if first.kind == "reasoning":
            return _thinking("" if self._ask.hides_thoughts else text, _SIGNATURE)
        return self._use(first, _input(text))

    def _stop(self) -> Json:
        """Why it ended."""
        output = self._output
        sequence = output.stop_reason if isinstance(output.stop_reason, str) else None
        reason = "stop_sequence" if sequence else _STOPS[output.finish_reason or "stop"]
        return {"stop_reason": "tool_use" if called(self._answer, output) else reason, "stop_sequence": sequence}

    def _parts(self, delta: Delta) -> bytes:
        out = b""
        for part in self._answer.parts(delta.text, last=delta.finish_reason is not None):
            if part.kind == "content":
                out += self._blocks.text(part.text)
            elif part.kind == "reasoning":
                out += self._blocks.thinking("" if self._ask.hides_thoughts else part.text)
            elif part.kind == "call":
                out += self._blocks.use(self._use(part, {}))
            else:
                out += self._blocks.input(part.text)
        return out

    def _use(self, call: Part, arguments: Json) -> Json:
        call_id = self._answer.ids[call.call].replace("call_", "toolu_")
        return {"type": "tool_use", "id": call_id, "name": call.text, "input": arguments}

    @property
    def _output(self) -> Output:
        return self._generation.transcripts[0].outputs[0]

    def _begin(self) -> bytes:
        self._begun = True
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        usage = self._usage() | {"output_tokens": 0}
        return event("message_start", {"message": message | {"usage": usage}}) + event("ping", {})

    def _message(self, content: list[Json]) -> Json:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}

    def _beside(self) -> Json:
        """What else was asked for."""
        edits = {} if self._ask.applied is None else {"context_management": {"applied_edits": self._ask.applied}}
        return {**edits, **({"timing": self._generation.timing.json()} if self._ask.return_timing else {})}

    def _usage(self) -> Json:
        """Anthropic counts what came out of the cache apart."""
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


class _Blocks:
    """Content blocks of a stream: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None
        self._head = b""
        """What a piece of text of the open block begins with."""

    def text(self, text: str) -> bytes:
        out = b"" if self._open == "text" else self._begin({"type": "text", "text": ""})
        return out + self._head + orjson.dumps(text) + b"}}\n\n"

    def thinking(self, text: str) -> bytes:
        if not text:
            return b"" if self._open == "thinking" else self._begin(_thinking("", ""))
        return self._delta(_thinking("", ""), {"type": "thinking_delta", "thinking": text})

    def use(self, block: Json) -> bytes:
        """A call begins."""
        return self._begin(block)

    def input(self, text: str) -> bytes:
        """More of its arguments."""
        delta = {"type": "input_json_delta", "partial_json": text}
        return event("content_block_delta", {"index": self._index, "delta": delta})

    def close(self) -> bytes:
        """The end of the open block, if there is one."""
        if self._open is None:
            return b""
        out = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            out = event("content_block_delta", {"index": self._index, "delta": delta})
        self._open = None
        return out + event("content_block_stop", {"index": self._index})

    def _delta(self, block: Json, delta: Json) -> bytes:
        """`delta` of the open block, or of a new one that begins as `block`."""
        out = b"" if self._open == block["type"] else self._begin(block)
        return out + event("content_block_delta", {"index": self._index, "delta": delta})

    def _begin(self, block: Json) -> bytes:
        out = self.close()
        self._index, self._open = self._index + 1, block["type"]
        self._head = event("content_block_delta", {"index": self._index, "delta": _TEXT}).removesuffix(b'""}}\n\n')
        return out + event("content_block_start", {"index": self._index, "content_block": block})


def model_card(name: str, created: int) -> Json:
    """An entry of the list of models."""
    date = datetime.datetime.fromtimestamp(created, datetime.timezone.utc).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": date}


def event(kind: str, fields: Json) -> bytes:
    """One server-sent event."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def failed(error: KvasirError) -> bytes:
    """The event that ends a stream which can't be finished."""
    return b"event: error\ndata: " + orjson.dumps(anthropic_error(error)) + b"\n\n"


def _thinking(text: str, signature: str) -> Json:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _input(arguments: str) -> Json:
    """As an object; text that was cut short stays one, under a name that says so."""
    try:
        found = orjson.loads(arguments or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}
