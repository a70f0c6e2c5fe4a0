"""Answers of /api/generate and /api/chat, whole or as lines of JSON."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any, Literal

import orjson

from kvasir.cluster.generation import Generation
from kvasir.cluster.ollama_schema import OllamaAsk
from kvasir.cluster.openai_logprobs import ChatLogprobs
from kvasir.engine.transcript import Delta

Json = dict[str, Any]
Kind = Literal["generate", "chat"]


class OllamaReply:
    """`started`: time.monotonic() of the request's arrival."""

    def __init__(self, kind: Kind, ask: OllamaAsk, generation: Generation, started: float) -> None:
        self._kind, self._ask, self._generation, self._started = kind, ask, generation, started
        self._logprobs = ChatLogprobs(generation.model.tokenizer, ask.logprobs or 0)

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        """Lines of one step."""
        return b"".join(
            _line(self._part(delta.text, delta) | {"done": False})
            for _, delta in deltas
            if delta.text or (delta.logprobs and self._ask.logprobs is not None)
        )

    def closing(self) -> bytes:
        """The last line: counts and durations."""
        return _line(self._part("") | self._end())

    def whole(self) -> Json:
        output = self._generation.transcripts[0].outputs[0]
        return self._part(output.text, Delta(0, output.text, output.token_ids, output.logprobs)) | self._end()

    def _part(self, text: str, delta: Delta | None = None) -> Json:
        found = envelope(self._ask.model or self._generation.model.name)
        found |= {"response": text} if self._kind == "generate" else {"message": {"role": "assistant", "content": text}}
        scores = self._logprobs.json(delta.token_ids, delta.logprobs) if delta else None
        return found | {"logprobs": scores["content"]} if scores else found

    def _end(self) -> Json:
        transcript, request = self._generation.transcripts[0], self._generation.requests[0]
        output, usage = transcript.outputs[0], self._generation.usage
        end: Json = {"done": True, "done_reason": output.finish_reason}
        if self._ask.gives_context:
            end["context"] = [*request.prompt_token_ids, *output.token_ids]
        at = output.timing
        return end | {
            "total_duration": round((time.monotonic() - self._started) * 1e9),
            "load_duration": _nanoseconds(at.queued, at.scheduled),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(at.scheduled, at.first_token),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(at.first_token, at.finished),
        }


def loaded(kind: Kind, ask: OllamaAsk, model: str) -> Json:
    """The answer to a request that has nothing to answer."""
    empty = {"response": ""} if kind == "generate" else {"message": {"role": "assistant", "content": ""}}
    return {**envelope(ask.model or model), **empty, "done": True, "done_reason": "unload" if ask.unload else "load"}


def envelope(model: str) -> Json:
    """What every line begins with; `model` is the name that the client used."""
    return {"model": model, "created_at": timestamp(time.time())}


def timestamp(seconds: float) -> str:
    """RFC 3339, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat().replace("+00:00", "Z")


def _nanoseconds(begin: float, end: float) -> int:
    """Between two times of `Timing`; 0 unless both happened."""
    return max(0, round((end - begin) * 1e9)) if begin and end else 0


def _line(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
