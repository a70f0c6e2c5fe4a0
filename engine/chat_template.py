"""Chat templates: a conversation -> the text a model was trained to read, by the checkpoint's Jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Union

from kvasir.engine.errors import ClientError, ConfigError, UnsupportedError
from kvasir.engine.hub import read_json
from kvasir.engine.template_sandbox import compile_template, render_template

_CUT = "\ue000continue-here\ue001"
_CONTENT = ("probe one", "probe two")
_CUT_CALL = '{"probe": "on'
_PROBE_S = 2.0
_ROLES = frozenset({"system", "developer", "tool"})
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What clients call a message's reasoning. Templates read the first, gpt-oss's and LFM 2.5's the second."""

Message = Mapping[str, Any]


class ChatTemplates:
    """A model's templates by name ("default", "tool_use"); there may be none."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str], override: str | None = None) -> ChatTemplates:
        """The templates beside the tokenizer in `folder`, or `override` (a file or the template itself) alone."""
        return (
            cls(_sources(folder), special_tokens) if override is None else cls({}, special_tokens).overridden(override)
        )

    def overridden(self, value: str) -> ChatTemplates:
        """The same with one template only: that of the file `value`, or `value` itself."""
        source = _override(value)
        try:
            _compiled(source)
        except ClientError as error:
            raise ConfigError(f"--chat-template: {error.message}", param="chat_template") from error
        return ChatTemplates({"default": source}, self._special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        source: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of the conversation. `continue_final_message` ends it inside the last message, for the model to go on
        there. `source` replaces the model's template. ClientError when the template or the conversation is at fault."""
        if continue_final_message and add_generation_prompt:
            text = "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            raise ClientError(text, param="continue_final_message")
        template = _compiled(source if source is not None else self._choose(bool(tools)))
        known = {**self._special_tokens, **_plain(variables or {}, "chat_template_kwargs")}
        known |= {"tools": _plain(tools, "tools") if tools else None, "add_generation_prompt": add_generation_prompt}
        conversation, places = template.prepare(messages)
        if continue_final_message:
            _mark_end(conversation)
        text = template.render(conversation, known)
        template.check_shown(conversation, places, known, text)
        return _cut(text) if continue_final_message else text

    def _choose(self, has_tools: bool) -> str:
        if has_tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        named = f" (only ones named {', '.join(sorted(self.sources))})" if self.sources else ""
        text = (
            f"the model has no chat template{named}: give it one by --chat-template FILE, or let it continue texts "
            "(/v1/completions, LLM.generate)"
        )
        raise ClientError(text, param="messages")


class _Template:
    """One compiled template, and what it makes of the forms in which the same message can be given."""

    def __init__(self, source: str) -> None:
        self._template = compile_template(source)
        self._seen: set[tuple[str, bool]] = set()
        """(role, whether it came first) of messages that came out."""

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], seconds: float | None = None) -> str:
        """The output for prepared `messages`."""
        return render_template(self._template, {**variables, "messages": messages}, seconds)

    def prepare(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[int]]:
        """(a copy of the messages in the forms that this template reads, the number that each was given as): content as
        text or as parts, arguments of tool calls as an object (what most templates want, and vLLM gives them) or as JSON
        text, what a developer says by a role that comes out."""
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise ClientError("messages must be a list of at least one message", param="messages")
        plain = _plain(list(messages), "messages")
        found: list[dict[str, Any]] = []
        places: list[int] = []
        for number, given in enumerate(plain):
            message = self._message(given, f"messages[{number}]")
            if message["role"] == "developer" and not self._shows_developer:
                message["role"] = "system"
            if found and message["role"] == found[-1]["role"] == "system" and not self._shows_systems:
                found[-1]["content"] = _joined(found[-1]["content"], message["content"])
            else:
                found.append(message)
                places.append(number)
        return found, places

    def check_shown(
        self, messages: Sequence[Message], places: Sequence[int], variables: Mapping[str, Any], text: str
    ) -> None:
        """ClientError when `text`, made of prepared `messages`, lacks one that is neither the user's nor the model's.

        Where that isn't plain (a template may escape what it shows) it is rendered again, with marks as contents."""
        marked, marks = list(messages), {}
        for number, message in enumerate(messages):
            role, content = message["role"], message["content"]
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            if role in ("user", "assistant") or not any(map(str.strip, texts)):
                continue
            if (role, number == 0) in self._seen and all(one.strip() in text for one in texts):
                continue
            marks[number] = mark = f"probe-{number}-message"
            marked[number] = {**message, "content": mark if isinstance(content, str) else _parts([mark])}
        if not marks:
            return
        try:
            shown = self.render(marked, variables)
        except ClientError:  # it reads these contents, so it doesn't leave them out
            return
        for number, mark in marks.items():
            role = messages[number]["role"]
            if mark in shown:
                if role in _ROLES:  # others are the client's words: there is no end of them
                    self._seen.add((role, number == 0))
                continue
            why = f"the chat template doesn't show a {role!r:.60} message here, so the model wouldn't read it"
            raise ClientError(f"messages[{places[number]}].role: {why}", param="messages")

    def _message(self, message: Any, at: str) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ClientError(f"{at} must be an object with a role", param="messages")
        message["content"] = self._content(message.get("content"), at)
        calls = message.get("tool_calls")
        thoughts = next((message[name] for name in _THOUGHTS if isinstance(message.get(name), str)), None)
        if thoughts is not None:
            message["reasoning_content"] = thoughts
            if not (calls and message["content"]):  # gpt-oss's template refuses a call with both
                message.setdefault("thinking", thoughts)
        if calls is None:
            message.pop("tool_calls", None)  # templates ask whether the key is there
            return message
        if not isinstance(calls, list) or not all(isinstance(_function(call), dict) for call in calls):
            raise ClientError(f"{at}.tool_calls must be a list of objects with a function", param="messages")
        for call in calls:
            function = _function(call)
            function["arguments"] = self._arguments(function.get("arguments"))
        return message

    def _content(self, content: Any, at: str) -> str | list[dict[str, str]]:
        if content is None:
            return ""
        if isinstance(content, str):
            return content if self._reads_text else _parts([content])
        if not isinstance(content, list):
            raise ClientError(f"{at}.content must be a string or a list of parts", param="messages")
        texts = [_part_text(part, at) for part in content]
        return _parts(texts) if self._reads_parts else "\n".join(texts)

    def _arguments(self, arguments: Any) -> Any:
        """What isn't a JSON object, such as a call that was cut short, stays as the model wrote it, or goes into one."""
        if arguments is None:
            arguments = {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if self._wants_json_arguments:
            return text
        found = _loaded(text.strip() or "{}") if isinstance(arguments, str) else arguments
        if isinstance(found, dict):
            return found
        return text if self._reads_text_arguments else {"INVALID_JSON": text}

    @cached_property
    def _reads_parts(self) -> bool:
        """Content may be a list of parts: both of two parts' texts come out, and nothing of the list's own form."""
        text = self._probe([{"role": "user", "content": _parts(_CONTENT)}])
        return all(part in text for part in _CONTENT) and "'type'" not in text and '"type"' not in text

    @cached_property
    def _reads_text(self) -> bool:
        """Content may be a string (nearly always so)."""
        return not self._reads_parts or _CONTENT[0] in self._probe([{"role": "user", "content": _CONTENT[0]}])

    @cached_property
    def _shows_developer(self) -> bool:
        """Behind a system message too: some templates know the role in the system's place alone, where it is the same."""
        return _CONTENT[1] in self._two("system", "developer")

    @cached_property
    def _shows_systems(self) -> bool:
        """There may be two of them at the beginning; most templates know one."""
        text = self._two("system", "system")
        return all(one in text for one in _CONTENT)

    def _two(self, first: str, second: str) -> str:
        said = [{"role": role, "content": text} for role, text in zip((first, second), _CONTENT, strict=True)]
        return self._probe([*said, {"role": "user", "content": "a"}])

    @cached_property
    def _wants_json_arguments(self) -> bool:
        """The template can't take an object as a tool call's arguments, but can take its JSON text."""
        return not self._probe(_probe_call({"probe": 1})) and "probe" in self._probe(_probe_call('{"probe": 1}'))

    @cached_property
    def _reads_text_arguments(self) -> bool:
        """A text as a tool call's arguments comes out as it is."""
        return _CUT_CALL in self._probe(_probe_call(_CUT_CALL))

    def _probe(self, messages: Sequence[Message]) -> str:
        try:
            variables = {"add_generation_prompt": False, "bos_token": "", "eos_token": ""}
            return self.render(messages, variables, _PROBE_S)
        except ClientError:
            return ""


@lru_cache(maxsize=32)
def _compiled(source: str) -> _Template:
    return _Template(source)


def _plain(value: Any, field: str) -> Any:
    """A copy made of JSON types alone: what a template can't abuse and may not change."""
    try:
        return json.loads(json.dumps(value, default=_as_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise ClientError(f"{field} must hold JSON values only: {error}", param=field) from error


def _as_json(value: Any) -> Any:
    """Pydantic models, as OpenAI's client returns them, and mappings other than dict."""
    dump: Callable[..., Any] | None = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"got {type(value).__name__}")


def _parts(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: Any, at: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else "string" if isinstance(part, str) else type(part).__name__
    if kind == "string":
        return str(part)
    if kind not in ("text", "refusal"):
        raise UnsupportedError(f"{at}.content has a part of type {kind!r}; only text is supported", param="messages")
    if not isinstance(part.get(kind), str):
        raise ClientError(f"{at}.content has a {kind} part without a {kind}", param="messages")
    return str(part[kind])


def _joined(first: str | list[dict[str, str]], second: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """Two contents as one."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [
        part for content in (first, second) for part in (_parts([content]) if isinstance(content, str) else content)
    ]


def _function(call: Any) -> Any:
    """The named function of a tool call, which some clients send bare."""
    return call.get("function", call) if isinstance(call, dict) else None


def _loaded(text: str) -> Any:
    """None when it isn't JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _probe_call(arguments: Union[str, dict[str, Any]]) -> list[Message]:
    call = {"id": "callprobe", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _mark_end(conversation: list[dict[str, Any]]) -> None:
    """Put the mark where the last message's content ends; the space behind it shows whether the template strips."""
    last = conversation[-1]
    if isinstance(last["content"], list) and last["content"]:
        last["content"][-1]["text"] += _CUT + " "
    else:
        last["content"] = (last["content"] or "") + _CUT + " "


def _cut(text: str) -> str:
    before, mark, after = text.rpartition(_CUT)
    if not mark:
        text = "continue_final_message: the chat template doesn't show the final message as it is"
        raise ClientError(text, param="continue_final_message")
    return before if after.startswith(" ") else before.rstrip()


def _override(value: str) -> str:
    """The template that --chat-template names: a file, or the text itself when it looks like one."""
    path = Path(value).expanduser()
    if not any(char in value for char in "{}\n"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
        text = f"--chat-template: there is no file {value!r}, and it isn't a Jinja template either"
        raise ConfigError(text, param="chat_template")
    return value


def _sources(folder: Path) -> dict[str, str]:
    """name -> template. A chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = read_json(folder / name).get("chat_template")
        if isinstance(given, str):
            given = {"default": given}
        elif isinstance(given, list):
            given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        if given is not None and not (isinstance(given, dict) and all(map(_is_text, (*given, *given.values())))):
            text = f"{folder / name}: chat_template must be a template, or a list of ones with a name and a template"
            raise ConfigError(text, param="chat_template")
        found |= given or {}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found |= {path.stem: path.read_text(encoding="utf-8") for path in more}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)
