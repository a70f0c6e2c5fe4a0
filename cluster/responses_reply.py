"""Answers of /v1/responses, whole or as numbered server-sent events.

An answer is a list of items; `_Message` writes one that is text. Other kinds (calls of tools, thoughts) are classes like
it, which open, grow and close with events of their own; one item is open at a time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from kvasir.cluster.generation import Generation
from kvasir.cluster.openai_logprobs import ChatLogprobs
from kvasir.cluster.responses_schema import ResponseAsk
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.service_fields import tier_served
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta, Output, Usage

Json = dict[str, Any]

_ERRORS = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""Status -> the nearest of the codes that OpenAI's responses have; any other is a server_error."""


class ResponseReply:
    """One response, from its creation on: `response` is it so far, `begin` comes when its generation runs."""

    def __init__(self, ask: ResponseAsk, model: ServedModel, response_id: str | None = None) -> None:
        sampling = {"temperature": 1.0, "top_p": 1.0, **model.sampling_defaults, **ask.call.sampling}
        self._ask = ask
        self._number = 0
        self._item: _Message | None = None
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
        self._generation = generation
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
            if delta.text or (delta.token_ids and self._ask.logprobs is not None):
                out += self._open()
                out.append(self._text(delta))
        return out

    def ending(self) -> list[bytes]:
        """Events behind the last step; `response` is complete."""
        out = [] if self._number else self.opening()
        out += self._open()
        self._complete()
        assert self._item is not None
        out += [self._event(kind, **fields) for kind, fields in self._item.closing(self.response["output"][0])]
        return [*out, self.now()]

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        return b"".join(self.events(deltas))

    def closing(self) -> bytes:
        return b"".join(self.ending())

    def whole(self) -> Json:
        """The answer in one piece."""
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

    def _open(self) -> list[bytes]:
        if self._item is not None:
            return []
        self._item = _Message()
        return [self._event(kind, **fields) for kind, fields in self._item.opening()]

    def _text(self, delta: Delta) -> bytes:
        assert self._item is not None
        scores = self._logprobs(delta.token_ids, delta.logprobs)
        return self._event("response.output_text.delta", **self._item.place, delta=delta.text, logprobs=scores)

    def _complete(self) -> None:
        """Fill in what is known at the end."""
        assert self._generation is not None
        output = self._generation.transcripts[0].outputs[0]
        cut = output.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        self._item = self._item or _Message()
        self.response |= {
            "status": status,
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item.whole(output, self._logprobs(output.token_ids, output.logprobs), status)],
            "usage": usage_json(self._generation.usage),
        }

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

    def __init__(self) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self.place = {"item_id": self._id, "output_index": 0, "content_index": 0}

    def opening(self) -> list[tuple[str, Json]]:
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"output_index": 0, "item": self._item([], "in_progress")}
        return [("response.output_item.added", item), ("response.content_part.added", {**self.place, "part": empty})]

    def closing(self, item: Json) -> list[tuple[str, Json]]:
        (part,) = item["content"]
        done = {**self.place, "text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", done),
            ("response.content_part.done", {**self.place, "part": part}),
            ("response.output_item.done", {"output_index": 0, "item": item}),
        ]

    def whole(self, output: Output, logprobs: list[Json], status: str) -> Json:
        part = {"type": "output_text", "text": output.text, "annotations": [], "logprobs": logprobs}
        return self._item([part], status)

    def _item(self, content: list[Json], status: str) -> Json:
        return {"type": "message", "id": self._id, "role": "assistant", "status": status, "content": content}


def event(kind: str, number: int, **fields: Any) -> bytes:
    """One server-sent event."""
    data = orjson.dumps({"type": kind, "sequence_number": number, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def failed(response: Json, error: KvasirError) -> Json:
    """`response` as it ends by an error."""
    code = _ERRORS.get(error.status, "server_error")
    return {**response, "status": "failed", "error": {"code": code, "message": error.message}}


def usage_json(usage: Usage) -> Json:
    """The shape that responses have for it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
