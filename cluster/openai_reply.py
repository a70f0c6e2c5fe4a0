"""Answers of /v1/chat/completions and /v1/completions, whole or as SSE frames, in OpenAI's shapes.

`return_token_ids`, `stop_reason` and `prompt_logprobs` are vLLM's additions, `timing` is ours. A frame costs a few
microseconds: what is the same in all chunks of an answer is encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson

from kvasir.cluster.answer_parts import Part, ReadAnswer
from kvasir.cluster.call import Conversation
from kvasir.cluster.generation import Generation
from kvasir.cluster.openai_logprobs import ChatLogprobs, CompletionLogprobs, prompt_logprobs_json
from kvasir.cluster.openai_schema import Ask
from kvasir.cluster.reading import AnswerStream, called, read_whole, thought_tokens
from kvasir.cluster.service_fields import tier_served
from kvasir.engine.transcript import Delta, Output, Usage

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "kvasir"
NULL = b"null"
_KINDS = {False: ("function", "arguments"), True: ("custom", "input")}
"""Whether a call is of a custom tool -> its type, and the field of what was written."""

Json = dict[str, Any]
Deltas = Sequence[tuple[int, Delta]]


class Reply(Protocol):
    """How the endpoints write."""

    def frames(self, deltas: Deltas) -> bytes:
        """SSE frames of one step."""

    def closing(self) -> bytes:
        """SSE frames behind the last step."""

    def whole(self) -> Json:
        """The answer in one piece."""


class ChatReply:
    """A chat has one prompt: the choice's index is the continuation's."""

    def __init__(
        self,
        ask: Ask,
        generation: Generation,
        request_id: str,
        role: str,
        answers: dict[int, AnswerStream] | None = None,
    ) -> None:
        """answers: of the continuations that are streamed, perhaps by someone else."""
        conversation = ask.call.prompts[0]
        assert isinstance(conversation, Conversation)
        self._ask = ask
        self._generation = generation
        self._role, opening = going_on(conversation, role)
        self._opening = opening if ask.echo else ""
        self._envelope = _envelope(f"chatcmpl-{request_id}", ask, generation)
        self._frames = _Frames({**self._envelope, "object": "chat.completion.chunk"}, ask)
        self._logprobs = ChatLogprobs(generation.model.tokenizer, ask.logprobs or 0)
        self._begun = False
        self._scored, self._ids = ask.logprobs is not None, ask.return_token_ids
        self._answers: dict[int, AnswerStream] = {} if answers is None else answers
        self._reads = not generation.reading.plain

    def frames(self, deltas: Deltas) -> bytes:
        out = b"" if self._begun else self._begin()
        for _, delta in deltas:
            if self._reads:
                out += self._parts(delta)
            elif self._scored and (delta.text or delta.token_ids):
                out += self._frames.content(delta.index, delta.text, *self._of_tokens(delta))
            elif delta.text or (delta.token_ids and self._ids):
                out += self._frames.content(delta.index, delta.text, delta.token_ids if self._ids else None)
            if delta.finish_reason:
                end: Json = {"index": delta.index, "delta": {}, "logprobs": None}
                reason = _finish_reason(self._answers.get(delta.index), delta)
                end |= {"finish_reason": reason, "stop_reason": delta.stop_reason}
                out += self._frames.chunk(end)
        return out

    def closing(self) -> bytes:
        thoughts = ["".join(answer.thoughts) for answer in self._answers.values()]
        return self._frames.closing(self._generation, self._usage(thoughts) if self._ask.include_usage else {})

    def whole(self) -> Json:
        transcript, reading = self._generation.transcripts[0], self._generation.reading
        choices, thoughts = list[Json](), list[str]()
        for output in transcript.outputs:
            found = ReadAnswer(output.text) if reading.plain else read_whole(reading, output.text)
            message = self._message(output.index, found)
            thoughts.append(found.reasoning)
            choice: Json = {"index": output.index, "message": message}
            choice["logprobs"] = self._logprobs.json(output.token_ids, output.logprobs)
            choice |= {"finish_reason": _finish_reason(found, output), "stop_reason": output.stop_reason}
            if self._ask.return_token_ids:
                choice["token_ids"] = output.token_ids
            choices.append(choice)
        answer = {**self._envelope, "object": "chat.completion", "choices": choices, **self._extra()}
        return answer | {"usage": self._usage(thoughts)} | _timing(self._ask, self._generation)

    def _begin(self) -> bytes:
        """The role, and what comes once: one chunk per choice."""
        self._begun = True
        out = b""
        for index in range(len(self._generation.transcripts[0].outputs)):
            delta = {"role": self._role, "content": self._opening}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            out += self._frames.chunk(choice, self._extra() if index == 0 else {})
        return out

    def _message(self, index: int, found: ReadAnswer) -> Json:
        """A whole answer. Calls that were streamed keep their ids."""
        reading, streamed = self._generation.reading, self._answers.get(index)
        content = self._opening + found.content
        message: Json = {"role": self._role, "content": content or None if found.calls else content, "refusal": None}
        if found.reasoning and self._ask.include_reasoning:
            message |= _reasoning(found.reasoning)
        if found.calls:
            ids = streamed.ids if streamed else [reading.call_id(call.name, i) for i, call in enumerate(found.calls)]
            message["tool_calls"] = [
                _call(call_id, call.name in reading.custom, call.name, call.arguments)
                for call_id, call in zip(ids, found.calls, strict=True)
            ]
        return message

    def _usage(self, thoughts: Sequence[str]) -> Json:
        """thoughts: of each continuation."""
        tokenizer = self._generation.model.tokenizer
        count = sum(thought_tokens(tokenizer, text) for text in thoughts)
        return usage_json(self._generation.usage) | {"completion_tokens_details": {"reasoning_tokens": count}}

    def _parts(self, delta: Delta) -> bytes:
        """One chunk for each part; what was asked for of the tokens goes with the first, or alone."""
        answer = self._answers.get(delta.index)
        if answer is None:
            answer = self._answers[delta.index] = AnswerStream(self._generation.reading)
        parts = answer.parts(delta.text, last=delta.finish_reason is not None)
        if not self._ask.include_reasoning:
            parts = [part for part in parts if part.kind != "reasoning"]
        if (self._scored or self._ids) and delta.token_ids:
            said: list[Json] = [_part(part, answer) for part in parts] or [{}]
            first = self._frames.said(delta.index, said[0], *self._of_tokens(delta))
            rest = self._of_tokens(Delta(delta.index))
            return first + b"".join(self._frames.said(delta.index, one, *rest) for one in said[1:])
        return b"".join(
            self._frames.content(delta.index, part.text)
            if part.kind == "content"
            else self._frames.said(delta.index, _part(part, answer))
            for part in parts
        )

    def _of_tokens(self, delta: Delta) -> tuple[Sequence[int] | None, bytes]:
        """What was asked for of its tokens: their ids, and log probabilities as JSON text."""
        return delta.token_ids if self._ids else None, self._logprobs.encoded(delta.token_ids, delta.logprobs)

    def _extra(self) -> Json:
        """Facts of the prompt that were asked for."""
        request, transcript = self._generation.requests[0], self._generation.transcripts[0]
        extra: Json = {}
        if self._ask.return_token_ids:
            extra["prompt_token_ids"] = list(request.prompt_token_ids)
        if self._ask.prompt_logprobs:
            tokenizer, ids = self._generation.model.tokenizer, request.prompt_token_ids
            extra["prompt_logprobs"] = prompt_logprobs_json(tokenizer, ids, transcript.prompt_logprobs)
        return extra


class CompletionReply:
    """Several prompts with n continuations each: choice = prompt * n + continuation."""

    def __init__(self, ask: Ask, generation: Generation, request_id: str, role: str) -> None:
        self._ask = ask
        self._generation = generation
        self._n = generation.requests[0].sampling.n
        self._envelope = _envelope(f"cmpl-{request_id}", ask, generation)
        self._frames = _Frames({**self._envelope, "object": "text_completion"}, ask)
        choices = len(generation.requests) * self._n
        self._logprobs = [CompletionLogprobs(generation.model.tokenizer, ask.logprobs) for _ in range(choices)]
        self._begun = [False] * choices
        self._scored, self._ids = ask.logprobs is not None, ask.return_token_ids
        self._shows_prompt = ask.echo or ask.return_token_ids or ask.prompt_logprobs

    def frames(self, deltas: Deltas) -> bytes:
        out = b""
        for number, delta in deltas:
            index = number * self._n + delta.index
            if self._shows_prompt and not self._begun[index]:
                out += self._frames.chunk(self._opening(number, index))
            if self._scored or delta.finish_reason or self._ask.no_output:
                if delta.text or delta.finish_reason or self._scored or self._ids:
                    out += self._frames.chunk(self._choice(index, delta))
            elif delta.text or self._ids:
                out += self._frames.text(index, delta.text, delta.token_ids if self._ids else None)
        return out

    def closing(self) -> bytes:
        return self._frames.closing(self._generation, usage_json(self._usage()))

    def whole(self) -> Json:
        choices = []
        for number, transcript in enumerate(self._generation.transcripts):
            for output in transcript.outputs:
                index = number * self._n + output.index
                first = self._opening(number, index) if self._shows_prompt else None
                ids = () if self._ask.no_output else output.token_ids
                rest = Delta(index, "" if self._ask.no_output else output.text, ids, output.logprobs)
                choice = self._choice(index, rest)
                choice |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
                choices.append(_joined(first, choice) if first else choice)
        answer = {**self._envelope, "object": "text_completion", "choices": choices}
        return answer | {"usage": usage_json(self._usage())} | _timing(self._ask, self._generation)

    def _opening(self, number: int, index: int) -> Json:
        """What comes before the output: the prompt's text and scores, as far as they were asked for."""
        self._begun[index] = True
        request, transcript = self._generation.requests[number], self._generation.transcripts[number]
        tokenizer, ids = self._generation.model.tokenizer, request.prompt_token_ids
        choice: Json = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        if self._ask.echo:
            choice["text"] = prompt_text(self._generation, number)
            choice["logprobs"] = self._logprobs[index].json(ids, transcript.prompt_logprobs)
        if self._ask.prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs_json(tokenizer, ids, transcript.prompt_logprobs)
        if self._ask.return_token_ids:
            choice |= {"prompt_token_ids": list(ids), "token_ids": []}
        return choice

    def _choice(self, index: int, delta: Delta) -> Json:
        silent = self._ask.no_output
        choice: Json = {"index": index, "text": "" if silent else delta.text}
        choice["logprobs"] = None if silent else self._logprobs[index].json(delta.token_ids, delta.logprobs)
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._ask.return_token_ids:
            choice["token_ids"] = [] if silent else list(delta.token_ids)
        return choice

    def _usage(self) -> Usage:
        usage = self._generation.usage
        return Usage(usage.prompt_tokens, usage.cached_tokens, 0) if self._ask.no_output else usage


class _Frames:
    """SSE frames of one answer."""

    def __init__(self, envelope: Json, ask: Ask) -> None:
        self._head = b"data: " + orjson.dumps(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if ask.include_usage else b"]}\n\n"
        self._ask = ask
        self._contents: dict[int, bytes] = {}
        self._texts: dict[int, bytes] = {}
        self._end = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._content_end = b"}" + self._end

    def content(self, index: int, text: str, token_ids: Sequence[int] | None = None, logprobs: bytes = NULL) -> bytes:
        """A chat chunk with nothing but text, and what is told of its tokens."""
        if index not in self._contents:
            self._contents[index] = self._head + b'{"index":%d,"delta":{"content":' % index
        plain = token_ids is None and logprobs is NULL
        end = self._content_end if plain else b"}" + self._closed(token_ids, logprobs)
        return self._contents[index] + orjson.dumps(text) + end

    def said(self, index: int, delta: Json, token_ids: Sequence[int] | None = None, logprobs: bytes = NULL) -> bytes:
        """A chat chunk with anything else."""
        return self._head + b'{"index":%d,"delta":' % index + orjson.dumps(delta) + self._closed(token_ids, logprobs)

    def text(self, index: int, text: str, token_ids: Sequence[int] | None = None) -> bytes:
        """A completion chunk with nothing but text, and the tokens it is made of."""
        if index not in self._texts:
            self._texts[index] = self._head + b'{"index":%d,"text":' % index
        return self._texts[index] + orjson.dumps(text) + (self._end if token_ids is None else self._closed(token_ids))

    def _closed(self, token_ids: Sequence[int] | None, logprobs: bytes = NULL) -> bytes:
        ids = b"" if token_ids is None else b',"token_ids":' + orjson.dumps(token_ids)
        return b',"logprobs":' + logprobs + b',"finish_reason":null' + ids + b"}" + self._tail

    def chunk(self, choice: Mapping[str, Any], extra: Mapping[str, Any] = {}) -> bytes:
        """A chunk with one choice; `extra` goes beside it."""
        beside = b"," + orjson.dumps(extra)[1:-1] if extra else b""
        return self._head + orjson.dumps(choice) + b"]" + beside + self._tail[1:]

    def closing(self, generation: Generation, usage: Json) -> bytes:
        """A chunk without choices for what was asked for, and the end. Who asks for the counts is told the times, too: as
        in the header of a whole answer."""
        if not (self._ask.include_usage or self._ask.return_timing):
            return DONE
        extra = {"usage": usage} if self._ask.include_usage else {}
        return self._head + b"]," + orjson.dumps(extra | {"timing": generation.timing.json()})[1:] + b"\n\n" + DONE


def _timing(ask: Ask, generation: Generation) -> Json:
    """The field `timing`, if it was asked for."""
    return {"timing": generation.timing.json()} if ask.return_timing else {}


def _part(part: Part, answer: AnswerStream) -> Json:
    """What a delta says of it."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return _reasoning(part.text)
    custom = part.call in answer.custom
    if part.kind == "arguments":
        kind, field = _KINDS[custom]
        return {"tool_calls": [{"index": part.call, kind: {field: part.text}}]}
    return {"tool_calls": [{"index": part.call, **_call(answer.ids[part.call], custom, part.text, "")}]}


def _call(call_id: str, custom: bool, name: str, text: str) -> Json:
    """text: its arguments, or a custom tool's input."""
    kind, field = _KINDS[custom]
    return {"id": call_id, "type": kind, kind: {"name": name, field: text}}


def _reasoning(text: str) -> Json:
    """By vLLM's name of today and that of before, which DeepSeek's API has."""
    return {"reasoning": text, "reasoning_content": text}


def _finish_reason(answer: ReadAnswer | AnswerStream | None, end: Delta | Output) -> str | None:
    return "tool_calls" if called(answer, end) else end.finish_reason


def usage_json(usage: Usage) -> Json:
    """OpenAI's shape."""
    total = usage.prompt_tokens + usage.completion_tokens
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}
    return counts | {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def _envelope(answer_id: str, ask: Ask, generation: Generation) -> Json:
    """What all chunks begin with. `model` is the name that the client used."""
    model = ask.call.model or generation.model.name
    tier = {"service_tier": tier_served(ask.service_tier)} if ask.service_tier else {}
    return {"id": answer_id, "created": int(time.time()), "model": model, "system_fingerprint": FINGERPRINT, **tier}


def going_on(conversation: Conversation, role: str) -> tuple[str, str]:
    """(who says the answer, what it begins with where the model goes on inside the last message). role: of answers."""
    last = conversation.messages[-1]
    role = role if conversation.add_generation_prompt else last["role"]
    return role, _text(last) if last["role"] == role else ""


def prompt_text(generation: Generation, number: int) -> str:
    """What `echo` puts before an output."""
    request = generation.requests[number]
    tokenizer = generation.model.need_tokenizer("echo")
    return tokenizer.decode(request.prompt_token_ids, request.sampling.skip_special_tokens)


def _text(message: Mapping[str, Any]) -> str:
    """What a message says, where that is one text."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _joined(first: Json, rest: Json) -> Json:
    """Prompt and output in one choice."""
    logprobs: Json | None = rest["logprobs"]
    if first["logprobs"]:
        more = rest["logprobs"] or {}
        logprobs = {name: [*values, *more.get(name, ())] for name, values in first["logprobs"].items()}
    return {**first, **rest, "text": first["text"] + rest["text"], "logprobs": logprobs}
