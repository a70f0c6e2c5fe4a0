"""Call: what a client asks for in one request of any dialect, before it is tokenised."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from kvasir.cluster.tool_use import ToolUse
from kvasir.engine.errors import ClientError

ROUTE_HEADER = "kvasir-route"
"""A request that sends it, with any value, gets one with the router's reasons."""
SESSION_HEADERS = ("kvasir-session", "x-session-id")
"""Requests with the same value go to the same group while it isn't overloaded."""
EFFORT_IGNORED = "(but by chat templates that know it, or enable_thinking)"
"""What becomes of an effort."""
_TEMPLATE_ARGUMENTS = ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A plain prompt."""

    text: str
    add_special_tokens: bool = True
    suffix: str = ""
    """The answer goes between the text and this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat template renders."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template knows: enable_thinking, ..."""
    add_special_tokens: bool = False
    chat_template: str | None = None
    """In place of the model's, for this call."""
    source: str = "messages"
    """The field that the messages were made of, which errors about them name."""


Prompt = Union[Text, Conversation, Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Prompts for one model, all sampled alike."""

    model: str
    """Empty: the only model of a server that serves one."""
    prompts: Sequence[Prompt]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What the client set, by the names of `SamplingParams`; the model's defaults fill the rest."""
    max_tokens: int | None = None
    """Where neither client nor model say; None: what is left of the context."""
    known_as: Mapping[str, str] = field(default_factory=dict)
    """Fields of `SamplingParams` that the client knows by other names, in which errors are told."""
    context: int | None = None
    """Tokens that prompt and output may have together, where the client wants fewer than the model has (Ollama's num_ctx)."""
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None
    tools: ToolUse | None = None
    """Those that the model may call, and must."""
    thinks: bool = False
    """Thoughts are asked for: a model that has none is refused."""
    thinking_budget: int | None = None
    """Tokens after which the model's thoughts are ended; None: no limit."""
    reads: str = ""
    """The field that wants a prompt's tokens as text, which a model without a tokenizer can't tell; empty: none does."""

    @property
    def source(self) -> str:
        """The field that the prompts were made of, which errors about them name."""
        first = self.prompts[0]
        return first.source if isinstance(first, Conversation) else "prompt"

    @property
    def operation(self) -> str:
        """OpenTelemetry's name for it."""
        return "chat" if isinstance(self.prompts[0], Conversation) else "text_completion"


def request_id_from(given: str | None, param: str) -> str:
    """The client's own id for its request, or a new one. ClientError when it couldn't be put into a header or a log."""
    if not given:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(given):
        raise ClientError(f"{param} must be 1 to 128 letters, digits or ._:/+=@-, got {given!r:.60}", param=param)
    return given


def check_variables(variables: Mapping[str, Any], param: str) -> None:
    """What a request adds for the chat template doesn't replace what other fields say, nor the template."""
    if taken := [name for name in _TEMPLATE_ARGUMENTS if name in variables]:
        raise ClientError(f"{param} can't hold {taken[0]}", param=param)


def thinking_budget(given: int | None) -> int | None:
    """Of `Call`: -1 is no limit, as with vLLM."""
    return None if given == -1 else given


def thinking_variables(effort: str | None, enabled: bool | None = None) -> dict[str, Any]:
    """What `effort` (none, minimal, low, medium, high, ...) and a switch tell the chat template, by the names that the
    families' templates have."""
    found: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if enabled is None and effort is not None:
        enabled = effort != "none"
    return found if enabled is None else {**found, "enable_thinking": enabled, "thinking": enabled}
