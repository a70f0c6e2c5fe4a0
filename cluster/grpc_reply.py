"""Deltas as `GenerateReply`s."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from kvasir.cluster.answer_parts import Part
from kvasir.cluster.call import Conversation
from kvasir.cluster.generation import Generation
from kvasir.cluster.openai_logprobs import token_text
from kvasir.cluster.openai_reply import going_on, prompt_text
from kvasir.cluster.openai_schema import Ask
from kvasir.cluster.reading import AnswerStream, called, thought_tokens
from kvasir.engine.event import TokenLogprob
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Delta
from kvasir.proto import inference_pb2 as pb

_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class GenerateReplies:
    """The messages of one answer."""

    def __init__(self, ask: Ask, generation: Generation, request_id: str, role: str) -> None:
        self.answers: dict[int, AnswerStream] = {}
        """Of each continuation, as far as it is read."""
        self._ask, self._generation, self._role = ask, generation, role
        self._same = pb.GenerateReply(request_id=request_id, model=generation.model.name)
        self._begun: set[int] = set()

    async def all(self, keep: Callable[[], Awaitable[str]]) -> AsyncIterator[pb.GenerateReply]:
        """One per delta, and one with the counts. keep: done when the answer is complete, before the client is told; gives the
        id of what is stored, if it is."""
        reply = self._new()
        if self._ask.return_token_ids:
            reply.prompt_token_ids.extend(self._generation.requests[0].prompt_token_ids)
        async for deltas in self._generation:
            for _, delta in deltas:
                yield self._reply(reply, delta)
                reply = self._new()
        yield self._end(reply, await keep())

    def _new(self) -> pb.GenerateReply:
        reply = pb.GenerateReply()
        reply.CopyFrom(self._same)
        return reply

    def _reply(self, reply: pb.GenerateReply, delta: Delta) -> pb.GenerateReply:
        tokenizer = self._generation.model.tokenizer
        reply.index = delta.index
        if self._ask.echo and delta.index not in self._begun:
            reply.text = self._opening()
        self._begun.add(delta.index)
        if not self._ask.no_output:
            self._output(reply, delta)
        if delta.prompt_logprobs:
            ids = self._generation.requests[0].prompt_token_ids
            reply.prompt_logprobs.extend(_logprobs(tokenizer, ids, delta.prompt_logprobs))
        if delta.finish_reason:
            waits = called(self.answers.get(delta.index), delta)
            reply.finish_reason = pb.FINISH_REASON_TOOL_CALLS if waits else _FINISH[delta.finish_reason]
        if isinstance(delta.stop_reason, str):
            reply.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            reply.stop_token_id = delta.stop_reason
        return reply

    def _opening(self) -> str:
        """What comes before the output."""
        prompt = self._ask.call.prompts[0]
        if isinstance(prompt, Conversation):
            return going_on(prompt, self._role)[1]
        return prompt_text(self._generation, 0)

    def _output(self, reply: pb.GenerateReply, delta: Delta) -> None:
        if self._generation.reading.plain:
            reply.text += delta.text
        else:
            answer = self.answers.setdefault(delta.index, AnswerStream(self._generation.reading))
            _write_parts(reply, answer.parts(delta.text, last=delta.finish_reason is not None), answer)
        reply.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            reply.logprobs.extend(_logprobs(self._generation.model.tokenizer, delta.token_ids, delta.logprobs))

    def _end(self, reply: pb.GenerateReply, stored_id: str) -> pb.GenerateReply:
        """The counts, and where the time went if it was asked for."""
        usage = self._generation.usage
        reply.stored_id = stored_id
        reply.usage.prompt_tokens = usage.prompt_tokens
        reply.usage.cached_tokens = usage.cached_tokens
        reply.usage.completion_tokens = 0 if self._ask.no_output else usage.completion_tokens
        reply.usage.truncated_tokens = self._generation.truncated_tokens
        tokenizer = self._generation.model.tokenizer
        thoughts = ("".join(answer.thoughts) for answer in self.answers.values())
        reply.usage.reasoning_tokens = sum(thought_tokens(tokenizer, text) for text in thoughts)
        if self._ask.return_timing:
            reply.timing.CopyFrom(pb.Timing(**self._generation.timing.json()))
        return reply


async def numbered(replies: AsyncIterator[pb.GenerateReply]) -> AsyncIterator[Sequence[bytes]]:
    """As a recording holds them."""
    number = 0
    async for reply in replies:
        number += 1
        reply.number = number
        yield [reply.SerializeToString()]


def _write_parts(reply: pb.GenerateReply, parts: Sequence[Part], answer: AnswerStream) -> None:
    for part in parts:
        if part.kind == "content":
            reply.text += part.text
        elif part.kind == "reasoning":
            reply.reasoning += part.text
        else:
            if part.kind == "call":
                reply.tool_calls.add(index=part.call, id=answer.ids[part.call], name=part.text)
            elif not reply.tool_calls or reply.tool_calls[-1].index != part.call:
                reply.tool_calls.add(index=part.call)
            said = part.text if part.kind == "arguments" else ""
            if part.call in answer.custom:
                reply.tool_calls[-1].input += said
            else:
                reply.tool_calls[-1].arguments += said


def _logprobs(
    tokenizer: Tokenizer | None, ids: Sequence[int], scores: Sequence[TokenLogprob | None]
) -> Iterator[pb.TokenLogprob]:
    for token, score in zip(ids, scores, strict=False):
        message = pb.TokenLogprob(token_id=token, text=token_text(tokenizer, token))
        if score is not None:
            message.logprob, message.rank = score.logprob, score.rank
            for other, value in score.top:
                message.top.add(token_id=other, text=token_text(tokenizer, other), logprob=value)
        yield message
