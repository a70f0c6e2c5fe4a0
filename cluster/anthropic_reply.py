"""Answers of /v1/messages, whole or as server-sent events."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import orjson

from kvasir.cluster.anthropic_schema import MessagesAsk
from kvasir.cluster.error_shapes import anthropic_error
from kvasir.cluster.generation import Generation
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta, Output

Json = dict[str, Any]

_STOPS = {"stop": "end_turn", "length": "max_tokens"}


class MessagesReply:
    """One message. Blocks of other types than text are opened and closed by `_Blocks` alike."""

    def __init__(self, ask: MessagesAsk, generation: Generation, request_id: str) -> None:
        self._generation = generation
        self._id = f"msg_{request_id}"
        self._model = ask.call.model or generation.model.name
        self._blocks = _Blocks()
        self._begun = False

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        out = b"" if self._begun else self._begin()
        for _, delta in deltas:
            if delta.text:
                out += self._blocks.text(delta.text)
        return out

    def closing(self) -> bytes:
        output = self._output
        stop = {"stop_reason": _stop_reason(output), "stop_sequence": _stop_sequence(output)}
        end = event("message_delta", {"delta": stop, "usage": self._usage()})
        return (b"" if self._begun else self._begin()) + self._blocks.close() + end + event("message_stop", {})

    def whole(self) -> Json:
        output = self._output
        content = [{"type": "text", "text": output.text, "citations": None}] if output.text else []
        stop = {"stop_reason": _stop_reason(output), "stop_sequence": _stop_sequence(output)}
        return self._message(content) | stop | {"usage": self._usage()}

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

    def text(self, text: str) -> bytes:
        return self._delta({"type": "text", "text": ""}, {"type": "text_delta", "text": text})

    def close(self) -> bytes:
        """The end of the open block, if there is one."""
        if self._open is None:
            return b""
        self._open = None
        return event("content_block_stop", {"index": self._index})

    def _delta(self, block: Json, delta: Json) -> bytes:
        """`delta` of the open block, or of a new one that begins as `block`."""
        out = b""
        if self._open != block["type"]:
            out = self.close()
            self._index, self._open = self._index + 1, block["type"]
            out += event("content_block_start", {"index": self._index, "content_block": block})
        return out + event("content_block_delta", {"index": self._index, "delta": delta})


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


def _stop_reason(output: Output) -> str:
    return "stop_sequence" if _stop_sequence(output) else _STOPS[output.finish_reason or "stop"]


def _stop_sequence(output: Output) -> str | None:
    return output.stop_reason if isinstance(output.stop_reason, str) else None
