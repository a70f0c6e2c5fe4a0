"""Messages of inference.proto as a `Call`, and deltas as `GenerateReply`s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvasir.cluster.answer_parts import Part
from kvasir.cluster.call import Call, Conversation, Prompt, Text, check_variables, thinking_variables
from kvasir.cluster.generation import Generation
from kvasir.cluster.grpc_json import as_json, function, plain, tool_choice
from kvasir.cluster.grpc_pooling import inputs_of
from kvasir.cluster.openai_fields import CHAT_HONOURED
from kvasir.cluster.openai_logprobs import token_text
from kvasir.cluster.reading import AnswerStream
from kvasir.cluster.tool_use import tool_use
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Pooled, TokenLogprob
from kvasir.engine.request import PoolingParams, StructuredOutput
from kvasir.engine.thoughts import Thoughts
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Delta
from kvasir.proto import inference_pb2 as pb

GENERATE_MAX_TOKENS = 16
_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_MAPS = ("logit_bias", "logits_processors")
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def call_of_generate(request: pb.GenerateRequest) -> Call:
    """Raises ClientError."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise ClientError("send text or prompt_token_ids", param="prompt")
    special = request.add_special_tokens if request.HasField("add_special_tokens") else not request.suffix
    prompt: Prompt = list(request.prompt_token_ids.ids)
    if kind == "text":
        prompt = Text(text=request.text, add_special_tokens=special, suffix=request.suffix)
    elif request.suffix:
        raise ClientError("suffix needs text", param="suffix")
    return Call(
        model=request.model,
        prompts=(prompt,),
        sampling=_sampling(request.sampling),
        max_tokens=GENERATE_MAX_TOKENS,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def call_of_chat(request: pb.ChatRequest) -> Call:
    """Raises ClientError."""
    tools = [_tool(tool) for tool in request.tools]
    parallel = request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True
    use = tool_use(tools, tool_choice(request), parallel)
    effort = request.reasoning_effort if request.HasField("reasoning_effort") else None
    if effort is not None:
        CHAT_HONOURED["reasoning_effort"]("reasoning_effort", effort)
    prompt = Conversation(
        messages=_messages(request.messages),
        tools=tools or None,
        variables={**thinking_variables(effort), **_variables(request)},
        **_set(request, _CONVERSATION),
    )
    return Call(
        model=request.model,
        prompts=(prompt,),
        sampling=_sampling(request.sampling),
        priority=request.priority,
        cache_salt=request.cache_salt,
        tools=use,
        thinking_budget=request.thinking_token_budget if request.HasField("thinking_token_budget") else None,
    )


def _variables(request: Any) -> dict[str, Any]:
    variables: dict[str, Any] = plain(request.template_variables)
    check_variables(variables, "template_variables")
    return variables


def call_of_embed(request: pb.EmbedRequest) -> PoolingCall:
    """Raises ClientError."""
    given = _set(request, ("add_special_tokens", "prompt_name"))
    return PoolingCall(
        model=request.model,
        inputs=inputs_of(request.inputs, given),
        params=PoolingParams(**_set(request, ("dimensions", "normalize"))),
        operation="embeddings",
        param="inputs",
        truncate=request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None,
        priority=request.priority,
    )


def embed_reply(vectors: Vectors, events: Sequence[Pooled], request_id: str) -> pb.EmbedReply:
    """The whole answer."""
    reply = pb.EmbedReply(request_id=request_id, model=vectors.model.name)
    for event in events:
        reply.embeddings.add(values=event.values, prompt_tokens=event.prompt_tokens)
    reply.usage.prompt_tokens, reply.usage.cached_tokens = vectors.prompt_tokens, vectors.cached_tokens
    return reply


_CONVERSATION = ("add_generation_prompt", "continue_final_message", "add_special_tokens")


def prompt_of_tokenize(request: pb.TokenizeRequest) -> Text | Conversation:
    """Raises ClientError."""
    if request.messages:
        if request.text:
            raise ClientError("send text or messages, not both", param="text")
        tools = [_tool(tool) for tool in request.tools]
        tool_use(tools, None)
        return Conversation(
            messages=_messages(request.messages),
            tools=tools or None,
            variables=_variables(request),
            **_set(request, _CONVERSATION),
        )
    for name in ("tools", "template_variables", "add_generation_prompt", "continue_final_message"):
        if getattr(request, name) if name == "tools" else request.HasField(name):
            raise ClientError(f"{name} needs messages", param=name)
    return Text(text=request.text, **_set(request, ("add_special_tokens",)))


def opening_reply(generation: Generation, request_id: str, with_prompt: bool) -> pb.GenerateReply:
    """What every reply says; the first one also what comes once."""
    reply = pb.GenerateReply(request_id=request_id, model=generation.model.name)
    if with_prompt:
        reply.prompt_token_ids.extend(generation.requests[0].prompt_token_ids)
    return reply


def write_delta(
    reply: pb.GenerateReply, delta: Delta, generation: Generation, answers: dict[int, AnswerStream]
) -> None:
    """Put `delta` into `reply`. answers: what the deltas before brought, by their index."""
    tokenizer = generation.model.tokenizer
    reply.index = delta.index
    if generation.reading.plain:
        reply.text = delta.text
    else:
        answer = answers.setdefault(delta.index, AnswerStream(generation.reading))
        _write_parts(reply, answer.parts(delta.text, last=delta.finish_reason is not None), answer)
    reply.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        reply.logprobs.extend(_logprobs(tokenizer, delta.token_ids, delta.logprobs))
    if delta.prompt_logprobs:
        ids = generation.requests[0].prompt_token_ids
        reply.prompt_logprobs.extend(_logprobs(tokenizer, ids, delta.prompt_logprobs))
    if delta.finish_reason:
        called = delta.index in answers and bool(answers[delta.index].ids) and delta.finish_reason == "stop"
        reply.finish_reason = pb.FINISH_REASON_TOOL_CALLS if called else _FINISH[delta.finish_reason]
    if isinstance(delta.stop_reason, str):
        reply.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        reply.stop_token_id = delta.stop_reason


def _write_parts(reply: pb.GenerateReply, parts: Sequence[Part], answer: AnswerStream) -> None:
    for part in parts:
        if part.kind == "content":
            reply.text += part.text
        elif part.kind == "reasoning":
            reply.reasoning += part.text
        elif part.kind == "call":
            reply.tool_calls.add(index=part.call, id=answer.ids[part.call], name=part.text)
        elif reply.tool_calls and reply.tool_calls[-1].index == part.call:
            reply.tool_calls[-1].arguments += part.text
        else:
            reply.tool_calls.add(index=part.call, arguments=part.text)


def write_end(reply: pb.GenerateReply, generation: Generation, timed: bool) -> None:
    """Put the counts into `reply`, and where the time went if it was asked for."""
    usage = generation.usage
    reply.usage.prompt_tokens = usage.prompt_tokens
    reply.usage.cached_tokens = usage.cached_tokens
    reply.usage.completion_tokens = usage.completion_tokens
    reply.usage.truncated_tokens = generation.truncated_tokens
    if timed:
        reply.timing.CopyFrom(pb.Timing(**generation.timing.json()))


def _sampling(message: pb.Sampling) -> dict[str, Any]:
    """What is set, by the names of `SamplingParams`."""
    given = _set(message, _SCALARS)
    given |= {name: list(values) for name in _LISTS if (values := getattr(message, name))}
    given |= {name: dict(found) for name in _MAPS if (found := getattr(message, name))}
    if message.HasField("structured_outputs"):
        given["structured_outputs"] = _structure(message.structured_outputs)
    if message.HasField("thoughts"):
        thoughts = message.thoughts
        given["thoughts"] = Thoughts(begin=thoughts.begin, end=thoughts.end, **_set(thoughts, ("budget",)))
    return given


def _structure(message: pb.StructuredOutput) -> StructuredOutput:
    given = _set(message, ("json", "json_object", "regex", "grammar", "structural_tag"))
    return StructuredOutput(**given, choice=list(message.choice))


_SCALARS = tuple(f.name for f in pb.Sampling.DESCRIPTOR.fields if f.has_presence and f.message_type is None)


def _set(message: Any, names: Sequence[str]) -> dict[str, Any]:
    """The optional fields that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _messages(messages: Sequence[pb.Message]) -> list[dict[str, Any]]:
    """In OpenAI's shape, which chat templates read."""
    return [_message(message) for message in messages]


def _message(message: pb.Message) -> dict[str, Any]:
    plain = {"role": message.role, "content": message.content, **_set(message, ("name", "tool_call_id"))}
    if message.reasoning:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return plain


def _tool(tool: pb.Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"description": "", "parameters": {}, **function(as_json(tool)), "name": tool.name},
    }


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
