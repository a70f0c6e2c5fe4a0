"""Messages of inference.proto as what HTTP's bodies are read as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvasir.cluster.call import EFFORT_IGNORED, Call, Conversation, Prompt, Text, check_variables, thinking_variables
from kvasir.cluster.custom_tools import chat_tool, custom_grammars, shown_tools
from kvasir.cluster.grpc_json import as_json, function, plain, tool_choice
from kvasir.cluster.grpc_pooling import inputs_of
from kvasir.cluster.openai_fields import CHAT_HONOURED
from kvasir.cluster.openai_messages import template_messages
from kvasir.cluster.openai_schema import Ask
from kvasir.cluster.service_fields import check_metadata, check_tier, priority
from kvasir.cluster.tool_use import tool_use
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.errors import ClientError
from kvasir.engine.event import Pooled
from kvasir.engine.request import PoolingParams, StructuredOutput
from kvasir.engine.thoughts import Thoughts
from kvasir.proto import inference_pb2 as pb

GENERATE_MAX_TOKENS = 16
_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_MAPS = ("logit_bias", "logits_processors")


def ask_of_generate(request: pb.GenerateRequest) -> Ask:
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
    if request.suffix and request.echo:
        raise ClientError("echo can't be combined with suffix: the prompt isn't all that is read", param="echo")
    sampling = _sampling(request.sampling)
    no_output = request.echo and sampling.get("max_tokens") == 0
    if no_output:
        sampling["max_tokens"] = 1
    call = Call(
        model=request.model,
        prompts=(prompt,),
        sampling=sampling,
        max_tokens=GENERATE_MAX_TOKENS,
        priority=_priority(request),
        cache_salt=request.cache_salt,
        reads="echo" if request.echo else "",
    )
    return Ask(call=call, echo=request.echo, no_output=no_output, **_shape(request))


def ask_of_chat(request: pb.ChatRequest) -> Ask:
    """Raises ClientError."""
    tools, custom = _tools(request)
    parallel = request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True
    use = tool_use(tools, tool_choice(request), parallel, custom)
    effort = request.reasoning_effort if request.HasField("reasoning_effort") else None
    if effort is not None:
        CHAT_HONOURED["reasoning_effort"]("reasoning_effort", effort)
    messages = _messages(request.messages)
    prompt = Conversation(
        messages=template_messages(messages),
        tools=tools or None,
        variables={**thinking_variables(effort), **_variables(request)},
        **_set(request, _CONVERSATION),
    )
    call = Call(
        model=request.model,
        prompts=(prompt,),
        sampling=_sampling(request.sampling),
        priority=_priority(request),
        cache_salt=request.cache_salt,
        tools=use,
        thinking_budget=request.thinking_token_budget if request.HasField("thinking_token_budget") else None,
    )
    check_metadata("metadata", labels := dict(request.metadata))
    unheard = (f"reasoning_effort {EFFORT_IGNORED}",) if effort is not None else ()
    return Ask(
        call=call,
        echo=request.echo,
        store=request.store,
        metadata=labels,
        messages=messages,
        warnings=(*unheard, *(("metadata",) if labels and not request.store else ())),
        **_shape(request),
    )


def _shape(request: pb.GenerateRequest | pb.ChatRequest) -> dict[str, Any]:
    """Fields of `Ask` that both have."""
    return {
        "logprobs": request.sampling.logprobs if request.sampling.HasField("logprobs") else None,
        "prompt_logprobs": request.sampling.HasField("prompt_logprobs"),
        "return_token_ids": request.return_prompt_token_ids,
        "return_timing": request.return_timing,
        "service_tier": request.service_tier if request.HasField("service_tier") else None,
    }


def _priority(request: pb.GenerateRequest | pb.ChatRequest) -> int:
    tier = _set(request, ("service_tier",))
    for name, value in tier.items():
        check_tier(name, value)
    return priority({"priority": request.priority, **tier})


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
        cache_salt=request.cache_salt,
    )


def embed_reply(vectors: Vectors, events: Sequence[Pooled], request_id: str) -> pb.EmbedReply:
    """The whole answer."""
    reply = pb.EmbedReply(request_id=request_id, model=vectors.model.name)
    for event in events:
        reply.embeddings.add(values=event.values, prompt_tokens=event.prompt_tokens)
    reply.usage.prompt_tokens, reply.usage.cached_tokens = vectors.prompt_tokens, vectors.cached_tokens
    reply.usage.truncated_tokens = vectors.truncated_tokens
    return reply


_CONVERSATION = ("add_generation_prompt", "continue_final_message", "add_special_tokens")


def prompt_of_tokenize(request: pb.TokenizeRequest) -> Text | Conversation:
    """Raises ClientError."""
    if request.messages:
        if request.text:
            raise ClientError("send text or messages, not both", param="text")
        tools, custom = _tools(request)
        tool_use(tools, None, custom=custom)
        return Conversation(
            messages=template_messages(_messages(request.messages)),
            tools=tools or None,
            variables=_variables(request),
            **_set(request, _CONVERSATION),
        )
    for name in ("tools", "template_variables", "add_generation_prompt", "continue_final_message"):
        if getattr(request, name) if name == "tools" else request.HasField(name):
            raise ClientError(f"{name} needs messages", param=name)
    return Text(text=request.text, **_set(request, ("add_special_tokens",)))


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
    given = _set(message, ("json", "json_object", "regex", "grammar", "structural_tag", "disable_any_whitespace"))
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
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    return plain


def _call(call: pb.ToolCall) -> dict[str, Any]:
    if call.HasField("input"):
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": call.input}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tools(request: pb.ChatRequest | pb.TokenizeRequest) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(as chat templates know them, custom ones' Lark grammars)."""
    tools = [chat_tool(_tool(tool), f"tools[{number}]") for number, tool in enumerate(request.tools)]
    return shown_tools(tools), custom_grammars(tools)


def _tool(message: pb.Tool) -> dict[str, Any]:
    """A tool of a response."""
    tool = {"type": "function", "name": "", **function(as_json(message))}
    return {"description": "", "parameters": {}, **tool} if tool["type"] == "function" else tool
