"""Answers of /v1/responses, whole or as numbered server-sent events.

An answer is a list of items: text, thoughts and calls of tools, which open, grow and close with events of their own; one
is open at a time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from kvasir.cluster.answer_parts import Part
from kvasir.cluster.carried import carry
from kvasir.cluster.generation import Generation
from kvasir.cluster.openai_logprobs import ChatLogprobs
from kvasir.cluster.reading import AnswerStream, cut_short, thought_tokens
from kvasir.cluster.responses_schema import ResponseAsk
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.service_fields import tier_served
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta, Output, Usage

Json = dict[str, Any]
Events = list[tuple[str, Json]]
"""(type, fields) of server-sent events."""
KINDS = {"content": "message", "reasoning": "reasoning", "call": "call", "arguments": "call"}
"""Part of an answer -> the item that it belongs to."""

_ERRORS = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""Status -> the nearest of the codes that OpenAI's responses have; any other is a server_error."""


class ResponseReply:
    """One response, from its creation on: `response` is it so far, `begin` comes when its generation runs."""

    def __init__(self, ask: ResponseAsk, model: ServedModel, response_id: str | None = None) -> None:
        sampling = {"temperature": 1.0, "top_p": 1.0, **model.sampling_defaults, **ask.call.sampling}
        self._ask = ask
        self._number = 0
        self._item: _Message | _Thoughts | _Call | None = None
        self._answer: AnswerStream | None = None
        self._plain = False
        """The text is the answer."""
        self._generation: Generation | None = None
        self.response: Json = {
            "id": response_id or f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "queued" if ask.background else "in_progress",
            "model": ask.call.model or model.name,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "service_tier": tier_served(ask.body.get("service_tier")),
            **{name: float(sampling[name]) for name in ("temperature", "top_p")},
            **ask.echo,
        }

    def begin(self, generation: Generation) -> None:
        """From now on `generation` writes the answer."""
        self._generation, self._answer = generation, AnswerStream(generation.reading)
        self._plain = generation.reading.plain
        self.response["status"] = "in_progress"

    def opening(self) -> list[bytes]:
        """Events of a response that is created, in its present status."""
        return [self._event("response.created", response=self.response), self.now()]

    def now(self) -> bytes:
        """The event of the present status."""
        return self._event(f"response.{self.response['status']}", response=self.response)

    def events(self, deltas: Sequence[tuple[int, Delta]]) -> list[bytes]:
        """Events of one step."""
        out = [] if self._number else self.opening()
        for _, delta in deltas:
            out += self._feed(delta)
        return out

    def ending(self) -> list[bytes]:
        """Events behind the last step; `response` is complete."""
        out = [] if self._number else self.opening()
        return [*out, *self._complete(), self.now()]

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        return b"".join(self.events(deltas))

    def closing(self) -> bytes:
        return b"".join(self.ending())

    def whole(self) -> Json:
        """The answer in one piece."""
        output = self._output
        self._feed(Delta(0, output.text, output.token_ids, output.logprobs))
        self._complete()
        return self.response

    def failure(self, error: KvasirError) -> bytes:
        """The event that ends a stream which can't be finished; `response` says why."""
        self.response = failed(self.response, error)
        return self.now()

    @property
    def begun(self) -> bool:
        """Its generation has begun."""
        return self._generation is not None

    @property
    def count(self) -> int:
        """Events so far."""
        return self._number

    @property
    def _output(self) -> Output:
        assert self._generation is not None, "begin comes first"
        return self._generation.transcripts[0].outputs[0]

    def _feed(self, delta: Delta) -> list[bytes]:
        """What a delta brings: more of the open item, or the next ones."""
        assert self._answer is not None, "begin comes first"
        out: list[bytes] = []
        scores = self._logprobs(delta.token_ids, delta.logprobs)
        if self._plain:
            parts = [Part("content", delta.text)] if delta.text else []
        else:
            parts = self._answer.parts(delta.text, last=False)
        if not parts and scores and isinstance(self._item, _Message):
            parts = [Part("content", "")]
        for part in parts:
            out += self._grow(part, scores)
            scores = scores if part.kind != "content" else []
        return out

    def _grow(self, part: Part, scores: list[Json], status: str = "completed") -> list[bytes]:
        """status: of the open item, where the part begins another."""
        assert self._answer is not None
        out: list[bytes] = []
        if part.kind == "call" or self._item is None or self._item.kind != KINDS[part.kind]:
            out += self._close(status)
            index = len(self.response["output"])
            if part.kind == "call":
                call_id, custom = self._answer.ids[part.call], part.call in self._answer.custom
                self._item = _Call(index, part.text, call_id, custom)
            else:
                self._item = _Message(index) if part.kind == "content" else _Thoughts(index, self._ask)
            out += self._events(self._item.opening())
        if part.kind == "call" or not (grown := self._item.grow(self._number, part.text, scores)):
            return out
        self._number += 1
        return [*out, grown]

    def _close(self, status: str) -> list[bytes]:
        """The open item is complete."""
        if self._item is None:
            return []
        item, events = self._item.closing(status)
        self.response["output"] = [*self.response["output"], item]
        self._item = None
        return self._events(events)

    def _complete(self) -> list[bytes]:
        """Fill in what is known at the end."""
        assert self._generation is not None
        assert self._answer is not None
        parts = self._answer.parts("", last=True)
        full = self._output.finish_reason == "length"
        cut = full or cut_short(self._answer, self._output)
        status = "incomplete" if cut else "completed"
        out: list[bytes] = []
        for part in parts:
            out += self._grow(part, [], status)
        if self._item is None and not self.response["output"]:
            out += self._grow(Part("content", ""), [])
        out += self._close(status)
        thoughts = thought_tokens(self._generation.model.tokenizer, "".join(self._answer.thoughts))
        self.response |= {
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if full else None,
            "usage": usage_json(self._generation.usage, thoughts),
        }
        if self._ask.return_timing:
            self.response["timing"] = self._generation.timing.json()
        return out

    def _events(self, events: Sequence[tuple[str, Json]]) -> list[bytes]:
        return [self._event(kind, **fields) for kind, fields in events]

    def _logprobs(self, ids: Sequence[int], scores: Any) -> list[Json]:
        if self._ask.logprobs is None or self._generation is None:
            return []
        found = ChatLogprobs(self._generation.model.tokenizer, self._ask.logprobs).json(ids, scores)
        return found["content"] if found else []

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._number
        self._number += 1
        return event(kind, number, **fields)


class _Message:
    """An item that is text."""

    kind = "message"

    def __init__(self, index: int) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._index, self._place = index, {"item_id": self._id, "output_index": index, "content_index": 0}
        self._head = _delta_head("response.output_text.delta", self._place)
        self._text, self._logprobs = "", []  # type: str, list[Json]

    def opening(self) -> Events:
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"output_index": self._index, "item": self._item([], "in_progress")}
        return [("response.output_item.added", item), ("response.content_part.added", {**self._place, "part": empty})]

    def grow(self, number: int, text: str, logprobs: list[Json]) -> bytes:
        """The event, if there is one."""
        if not text and not logprobs:
            return b""
        self._text += text
        self._logprobs += logprobs
        scores = orjson.dumps(logprobs) if logprobs else b"[]"
        return _delta(self._head, number, text) + b',"logprobs":' + scores + b"}\n\n"

    def closing(self, status: str) -> tuple[Json, Events]:
        """(the whole item, its last events)."""
        part = {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}
        item = self._item([part], status)
        done = {**self._place, "text": self._text, "logprobs": self._logprobs}
        return item, [
            ("response.output_text.done", done),
            ("response.content_part.done", {**self._place, "part": part}),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    def _item(self, content: list[Json], status: str) -> Json:
        return {"type": "message", "id": self._id, "role": "assistant", "status": status, "content": content}


class _Thoughts:
    """An item of what the model thought: as it is, or as a summary where one was asked for."""

    kind = "reasoning"

    def __init__(self, index: int, ask: ResponseAsk) -> None:
        self._id = f"rs_{uuid.uuid4().hex}"
        self._index, self._summarised, self._carried = index, ask.summarised, ask.carried
        place = "summary_index" if ask.summarised else "content_index"
        self._place = {"item_id": self._id, "output_index": index, place: 0}
        self._head = _delta_head(f"response.{self._kind}.delta", self._place)
        self._text = ""

    def opening(self) -> Events:
        item = {"output_index": self._index, "item": self._item(None, "in_progress")}
        return [("response.output_item.added", item), self._part("added", "")]

    def grow(self, number: int, text: str, logprobs: list[Json]) -> bytes:
        self._text += text
        return _delta(self._head, number, text) + b"}\n\n"

    def closing(self, status: str) -> tuple[Json, Events]:
        item = self._item(self._text, status)
        return item, [
            (f"response.{self._kind}.done", {**self._place, "text": self._text}),
            self._part("done", self._text),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    @property
    def _kind(self) -> str:
        return "reasoning_summary_text" if self._summarised else "reasoning_text"

    def _part(self, state: str, text: str) -> tuple[str, Json]:
        kind = "reasoning_summary_part" if self._summarised else "content_part"
        return f"response.{kind}.{state}", {**self._place, "part": self._written(text)}

    def _written(self, text: str) -> Json:
        return {"type": "summary_text" if self._summarised else "reasoning_text", "text": text}

    def _item(self, text: str | None, status: str) -> Json:
        parts = [] if text is None else [self._written(text)]
        shown = {"summary": parts, "content": []} if self._summarised else {"summary": [], "content": parts}
        kept = {"encrypted_content": carry(text)} if self._carried and text is not None else {}
        return {"type": "reasoning", "id": self._id, **shown, **kept, "status": status}


class _Call:
    """An item that calls a tool of the client's: a function, or a custom one."""

    kind = "call"

    def __init__(self, index: int, name: str, call_id: str, custom: bool) -> None:
        self._type, self._field = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
        self._id = f"{'ctc' if custom else 'fc'}_{uuid.uuid4().hex}"
        self._index, self._place = index, {"item_id": self._id, "output_index": index}
        self._head = _delta_head(f"response.{self._type}_{self._field}.delta", self._place)
        self._name, self._call_id, self._text = name, call_id, ""

    def opening(self) -> Events:
        return [("response.output_item.added", {"output_index": self._index, "item": self._item("in_progress")})]

    def grow(self, number: int, text: str, logprobs: list[Json]) -> bytes:
        self._text += text
        return _delta(self._head, number, text) + b"}\n\n"

    def closing(self, status: str) -> tuple[Json, Events]:
        item = self._item(status)
        done = {**self._place, "name": self._name, self._field: self._text}
        return item, [
            (f"response.{self._type}_{self._field}.done", done),
            ("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    def _item(self, status: str) -> Json:
        called = {"call_id": self._call_id, "name": self._name, self._field: self._text}
        return {"type": self._type, "id": self._id, **called, "status": status}


def event(kind: str, number: int, **fields: Any) -> bytes:
    """One server-sent event."""
    data = orjson.dumps({"type": kind, "sequence_number": number, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _delta_head(kind: str, place: Json) -> tuple[bytes, bytes]:
    """What the deltas of an item have in common: before their number, and from there to their text."""
    name = kind.encode()
    before = b"event: " + name + b'\ndata: {"type":"' + name + b'","sequence_number":'
    return before, b"," + orjson.dumps(place)[1:-1] + b',"delta":'


def _delta(head: tuple[bytes, bytes], number: int, text: str) -> bytes:
    """An event up to its text: as `event`, in a quarter of its time."""
    return b"%s%d%s" % (head[0], number, head[1]) + orjson.dumps(text)


def failed(response: Json, error: KvasirError) -> Json:
    """`response` as it ends by an error."""
    code = _ERRORS.get(error.status, "server_error")
    return {**response, "status": "failed", "error": {"code": code, "message": error.message}}


def usage_json(usage: Usage, thought_tokens: int) -> Json:
    """The shape that responses have for it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
