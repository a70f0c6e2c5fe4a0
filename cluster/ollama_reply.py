"""Answers of /api/generate and /api/chat, whole or as lines of JSON."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import orjson

from kvasir.cluster.answer_parts import CalledTool, Part, ReadAnswer
from kvasir.cluster.generation import Generation
from kvasir.cluster.ollama_schema import OllamaAsk
from kvasir.cluster.openai_logprobs import ChatLogprobs
from kvasir.cluster.reading import AnswerStream, cut_short
from kvasir.engine.transcript import Delta

Json = dict[str, Any]
Kind = Literal["generate", "chat"]


class OllamaReply:
    """`started`: time.monotonic() of the request's arrival."""

    def __init__(self, kind: Kind, ask: OllamaAsk, generation: Generation, started: float) -> None:
        self._kind, self._ask, self._generation, self._started = kind, ask, generation, started
        self._logprobs = ChatLogprobs(generation.model.tokenizer, ask.logprobs or 0)
        self._reads = not generation.reading.plain
        self._answer = AnswerStream(generation.reading)
        self._read = ReadAnswer()
        self._shown = 0
        """Calls that have been sent: each goes out as a whole."""
        model = orjson.dumps(ask.model or generation.model.name)
        said = b'"response":' if kind == "generate" else b'"message":{"role":"assistant","content":'
        self._line = (b'{"model":' + model + b',"created_at":"', b'",' + said)
        self._line_end = b',"done":false}\n' if kind == "generate" else b'},"done":false}\n'

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        """Lines of one step."""
        return b"".join([self._lines(delta) for _, delta in deltas])

    def closing(self) -> bytes:
        """The last line: counts and durations."""
        return _line(self._part(ReadAnswer()) | self._end())

    def whole(self) -> Json:
        output, read = self._generation.transcripts[0].outputs[0], ReadAnswer()
        read.add(self._answer.parts(output.text, last=True))
        return self._part(read, Delta(0, output.text, output.token_ids, output.logprobs)) | self._end()

    def _lines(self, delta: Delta) -> bytes:
        """Of one delta: one for each kind of text, and for each call that is complete."""
        if not self._reads and self._ask.logprobs is None:
            return self._text(delta.text) if delta.text else b""
        if not self._reads:
            read = [ReadAnswer(content=delta.text)] if delta.text else []
        else:
            parts = self._answer.parts(delta.text, last=delta.finish_reason is not None)
            if len(parts) == 1 and parts[0].kind == "content" and self._ask.logprobs is None and not self._read.calls:
                return self._text(parts[0].text)
            read = self._news(parts, delta.finish_reason is not None) if parts or delta.finish_reason else []
        if not read and delta.logprobs and self._ask.logprobs is not None:
            read = [ReadAnswer()]
        scores = [delta, *(None for _ in read)]
        return b"".join(_line(self._part(one, at) | {"done": False}) for one, at in zip(read, scores, strict=False))

    def _text(self, text: str) -> bytes:
        """A line with nothing but text: what is the same in all of them is encoded once."""
        head, said = self._line
        return head + timestamp(time.time()).encode() + said + orjson.dumps(text) + self._line_end

    def _news(self, parts: Sequence[Part], last: bool) -> list[ReadAnswer]:
        self._read.add([part for part in parts if part.kind in ("call", "arguments")])
        news = [ReadAnswer(content=part.text) for part in parts if part.kind == "content"]
        news = [ReadAnswer(reasoning=part.text) for part in parts if part.kind == "reasoning"] + news
        going_on = not last and bool(parts) and parts[-1].kind in ("call", "arguments")
        complete = len(self._read.calls) - going_on if last or parts else self._shown
        calls, self._shown = self._read.calls[self._shown : complete], max(self._shown, complete)
        return [*news, *(ReadAnswer(calls=[call]) for call in calls)]

    def _part(self, read: ReadAnswer, delta: Delta | None = None) -> Json:
        found = envelope(self._ask.model or self._generation.model.name)
        called = [(call, self._call(call)) for call in read.calls]
        calls = [shown for _, shown in called if shown]
        text = read.content + "".join(call.arguments for call, shown in called if not shown)
        said: Json = {"thinking": read.reasoning} if read.reasoning else {}
        if self._kind == "generate":
            found |= {"response": text, **said}
        else:
            said |= {"tool_calls": calls} if calls else {}
            found |= {"message": {"role": "assistant", "content": text, **said}}
        scores = self._logprobs.json(delta.token_ids, delta.logprobs) if delta else None
        return found | {"logprobs": scores["content"]} if scores else found

    def _call(self, call: CalledTool) -> Json | None:
        """With its arguments as an object, which Ollama's clients read; None: they were cut short."""
        output, ids = self._generation.transcripts[0].outputs[0], self._answer.ids
        try:
            arguments = orjson.loads(call.arguments)
        except ValueError:
            return None
        if not isinstance(arguments, dict) or (call.number == len(ids) - 1 and cut_short(self._answer, output)):
            return None
        function = {"index": call.number, "name": call.name, "arguments": arguments}
        return {"id": ids[call.number], "type": "function", "function": function}

    def _end(self) -> Json:
        transcript, request = self._generation.transcripts[0], self._generation.requests[0]
        output, usage = transcript.outputs[0], self._generation.usage
        end: Json = {"done": True, "done_reason": output.finish_reason}
        if self._ask.gives_context:
            end["context"] = [*request.prompt_token_ids, *output.token_ids]
        if self._ask.return_timing:
            end["timing"] = self._generation.timing.json()
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
    part, whole = math.modf(seconds)
    more, part = divmod(round(part * 1e6), 1_000_000)  # rounded as datetime does
    whole = int(whole) + more
    return f"{_second(whole)}.{part:06d}Z" if part else f"{_second(whole)}Z"


@lru_cache(2)
def _second(seconds: int) -> str:
    """Many lines are written in each."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _nanoseconds(begin: float, end: float) -> int:
    """Between two times of `Timing`; 0 unless both happened."""
    return max(0, round((end - begin) * 1e9)) if begin and end else 0


def _line(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
