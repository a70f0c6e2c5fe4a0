"""LLM: the engine in process, for batches of prompts."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import queue
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, cast

from tqdm import tqdm

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.errors import ClientError, ConfigError, OverloadedError
from kvasir.engine.event import Event
from kvasir.engine.hub import default_sampling, locate
from kvasir.engine.output import RequestOutput, request_output
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Transcript

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Message: TypeAlias = "Mapping[str, Any]"


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from keyword arguments; an unknown one is a ConfigError that names the nearest."""
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), param=name)
    return EngineConfig(model=model, **options)


class TextModel:
    """A model's tokenizer and defaults: from prompts to requests. What `LLM` and `AsyncLLM` share."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.folder = config, locate(config.model, config.revision)
        self.tokenizer: Tokenizer | None = None
        if not config.skip_tokenizer_init:
            source = locate(config.tokenizer) if config.tokenizer else self.folder
            self.tokenizer = Tokenizer.load(source, chat_template=config.chat_template)
        self.defaults = default_sampling(self.folder) if config.generation_config == "auto" else {}

    def sampling(self, given: SamplingParams | None) -> SamplingParams:
        """The given parameters, or the model's own defaults."""
        sampling = given or SamplingParams(**self.defaults)
        return sampling if self.tokenizer else dataclasses.replace(sampling, detokenize=False)

    def request(
        self, prompt: Prompt, sampling: SamplingParams | None, request_id: str, **fields: Any
    ) -> tuple[Request, str | None]:
        """The request for a prompt, and the prompt's text if it had one."""
        text, ids = self._parse(prompt)
        return Request(request_id=request_id, prompt_token_ids=ids, sampling=self.sampling(sampling), **fields), text

    def render(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation as the chat template writes it."""
        tokenizer = self._needed("chat")
        return tokenizer.encode(tokenizer.render_chat(messages, **options), add_special_tokens=False)

    def _parse(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            keys = [key for key in ("prompt_token_ids", "prompt") if key in prompt]
            if len(keys) != 1 or len(prompt) != 1:
                raise ClientError(
                    f'a prompt has exactly one of "prompt" and "prompt_token_ids", got {sorted(prompt)}', param="prompt"
                )
            prompt = prompt[keys[0]]
        if isinstance(prompt, str):
            return prompt, self._needed("text prompts").encode(prompt)
        if isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt):
            return None, cast("Sequence[int]", prompt)
        raise ClientError(f"a prompt is text or a list of token ids, got {prompt!r:.60}", param="prompt")

    def _needed(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ClientError(
                f"{what} need a tokenizer, but skip_tokenizer_init is set; send token ids", param="prompt"
            )
        return self.tokenizer


class LLM:
    """`LLM("skald").generate(["Hello"], SamplingParams(max_tokens=20))`. Options are the fields of EngineConfig."""

    def __init__(self, model: str = "skald", **options: Any) -> None:
        self.config = engine_config(model, options)
        self._text = TextModel(self.config)
        self._events: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
        self.engine = Engine(self.config, self._events.put)
        self.engine.start()
        weakref.finalize(self, self.engine.shutdown)  # the engine's thread ends, and the model goes, with this object
        self._one_at_a_time = threading.Lock()
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None with skip_tokenizer_init."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for; used when a call brings no parameters."""
        return self._text.sampling(None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; results in the order of the prompts. Bad input raises before anything runs."""
        many = _as_list(prompts)
        sampling = _spread(sampling_params, len(many), "sampling_params")
        priorities = _spread(priority, len(many), "priority")
        made = [
            self._text.request(prompt, params, str(next(self._ids)), priority=level or 0)
            for prompt, params, level in zip(many, sampling, priorities, strict=True)
        ]
        for request, _ in made:
            self.engine.check(request)
        return self._run(made, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of such lists)."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
        prompts = [
            self._text.render(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def shutdown(self) -> None:
        """End the engine's thread; the model is freed with the object."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(self, made: Sequence[tuple[Request, str | None]], use_tqdm: bool) -> list[RequestOutput]:
        """Keep the queue filled, but not over its limit, until all have ended."""
        with self._one_at_a_time:
            return self._run_alone(made, use_tqdm)

    def _run_alone(self, made: Sequence[tuple[Request, str | None]], use_tqdm: bool) -> list[RequestOutput]:
        texts = {request.request_id: text for request, text in made}
        transcripts = {request.request_id: Transcript(request, self._text.tokenizer) for request, _ in made}
        waiting = collections.deque(request for request, _ in made)
        settled = tokens = 0
        try:
            with tqdm(total=len(made), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                self._submit(waiting)
                while settled < len(made):
                    for request_id, events in _by_request(self._events.get()):
                        transcript = transcripts.get(request_id)
                        if transcript is None:
                            continue  # of a call that was interrupted
                        tokens += self._feed(transcript, events)
                        settled += transcript.settled
                        bar.update(transcript.settled)
                    self._submit(waiting)
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False)
        except BaseException:
            for request_id in transcripts:
                self.engine.abort(request_id)
            raise
        return [request_output(t, texts[name], self._text.tokenizer) for name, t in transcripts.items()]

    def _submit(self, waiting: collections.deque[Request]) -> None:
        """As many as the engine's queue takes; it has also sequences waiting that were branched off or preempted."""
        try:
            while waiting:
                self.engine.submit(waiting[0])
                waiting.popleft()
        except OverloadedError:
            return

    def _feed(self, transcript: Transcript, events: Sequence[Event]) -> int:
        """Take in a request's events; returns how many tokens they brought."""
        deltas = transcript.feed(events)
        for delta in deltas:
            if delta.matched:
                self.engine.abort(transcript.request.request_id, delta.index, "stop")
        return sum(len(delta.token_ids) for delta in deltas)


def _by_request(events: Sequence[Event]) -> Iterable[tuple[str, list[Event]]]:
    grouped: dict[str, list[Event]] = {}
    for event in events:
        grouped.setdefault(event.request_id, []).append(event)
    return grouped.items()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a list of ids is one."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _spread(given: Any, count: int, name: str) -> list[Any]:
    """One value for all, or one for each."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ClientError(f"{name} has {len(given)} entries for {count} prompts", param=name)
    return list(given)
