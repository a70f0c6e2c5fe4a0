"""LLM: the engine in process, for batches of prompts."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import operator
import queue
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, cast

from tqdm import tqdm

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.entry_points import EntryPoints, as_list
from kvasir.engine.errors import ERRORS, ClientError, ConfigError, OverloadedError, ServerError
from kvasir.engine.event import Event, Failed, Pooled
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.output import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    pooling_output,
    request_output,
)
from kvasir.engine.passage import Encoded, Passage, encode_passage, role_passage, similarity
from kvasir.engine.prompt_cut import cut_prompt
from kvasir.engine.request import PoolingParams, Request, SamplingParams
from kvasir.engine.sentence_transformers import TextRules, read_text_rules
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
        self.config, files = config, ModelFiles(config)
        self.tokenizer: Tokenizer | None = files.tokenizer()
        self.rules: TextRules = read_text_rules(files.path)
        self.defaults = files.default_sampling()

    def sampling(self, given: SamplingParams | None) -> SamplingParams:
        """The given parameters, or the model's own defaults."""
        sampling = given or SamplingParams(**self.defaults)
        return sampling if self.tokenizer else dataclasses.replace(sampling, detokenize=False)

    def request(
        self, prompt: Prompt, given: SamplingParams | None, request_id: str, context: int, **fields: Any
    ) -> tuple[Request, str | None]:
        """The request for a prompt, and the prompt's text if it had one. `context`: the model's, in tokens."""
        text, whole = self._parse(prompt)
        sampling = self.sampling(given)
        ids = cut_prompt(whole, sampling, context)
        cut = len(whole) - len(ids)
        request = Request(
            request_id=request_id, prompt_token_ids=ids, sampling=sampling, truncated_tokens=cut, **fields
        )
        return request, text

    def passage(self, prompt: Prompt, prompt_name: str | None = None) -> Passage | Sequence[int]:
        """A prompt for a vector: a text behind one of the model's prompts, or token ids."""
        found = self._plain(prompt)
        return Passage(text=found, prompt_name=prompt_name) if isinstance(found, str) else found

    def render(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation as the chat template writes it."""
        tokenizer = self._needed("chat")
        return tokenizer.encode(tokenizer.render_chat(messages, **options), add_special_tokens=False)

    def _parse(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        found = self._plain(prompt)
        return (found, self._needed("text prompts").encode(found)) if isinstance(found, str) else (None, found)

    def _plain(self, prompt: Prompt) -> str | Sequence[int]:
        """Text or token ids."""
        if isinstance(prompt, Mapping):
            keys = [key for key in ("prompt_token_ids", "prompt") if key in prompt]
            if len(keys) != 1 or len(prompt) != 1:
                raise ClientError(
                    f'a prompt has exactly one of "prompt" and "prompt_token_ids", got {sorted(prompt)}', param="prompt"
                )
            prompt = prompt[keys[0]]
        if isinstance(prompt, str):
            return prompt
        try:
            if (not isinstance(prompt, Sequence) and not hasattr(prompt, "__array__")) or isinstance(prompt, bytes):
                raise TypeError  # a set has no order
            return [operator.index(token) for token in prompt]  # type: ignore[arg-type]  # numpy's integers come no further
        except TypeError as error:
            text = f"a prompt is text or a list of token ids, got {prompt!r:.60}"
            raise ClientError(text, param="prompt") from error

    def _needed(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ClientError(
                f"{what} need a tokenizer, but skip_tokenizer_init is set; send token ids", param="prompt"
            )
        return self.tokenizer


class LLM(EntryPoints):
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
        many = as_list(prompts)
        sampling = _spread(sampling_params, len(many), "sampling_params")
        priorities = _spread(priority, len(many), "priority")
        context = self.engine.info.max_model_len
        made = [
            self._text.request(prompt, params, str(next(self._ids)), context, priority=level or 0)
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

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector of each prompt. `prompt_name`: which of the model's prompts (query, document, ...) stands before the
        texts. Prompts that are too long are an error unless `truncate_prompt_tokens` says where to cut (-1: at the
        model's limit)."""
        passages = [self._text.passage(prompt, prompt_name) for prompt in as_list(prompts)]
        done = self._pool(passages, pooling_params or PoolingParams(), "embed", truncate_prompt_tokens, use_tqdm)
        return [pooling_output(request, event, EmbeddingOutput(list(event.values))) for request, event in done]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each of the model's labels, for each prompt."""
        passages = [self._text.passage(prompt) for prompt in as_list(prompts)]
        params = pooling_params or PoolingParams(task="classify")
        done = self._pool(passages, params, "classify", truncate_prompt_tokens, use_tqdm)
        return [pooling_output(request, event, ClassificationOutput(list(event.values))) for request, event in done]

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well each document fits its query, or the only query there is: by a cross-encoder that reads both, or
        else by comparing their vectors."""
        left, right = _pairs(queries, documents)
        params = pooling_params or PoolingParams(task="score")
        if "score" in self.engine.info.tasks or "embed" not in self.engine.info.tasks:
            pairs = [Passage(text=a, pair=b) for a, b in zip(left, right, strict=True)]
            done = self._pool(pairs, params, "score", truncate_prompt_tokens, use_tqdm)
            return [pooling_output(request, event, ScoringOutput(event.values[0])) for request, event in done]
        return self._compared(left, right, truncate_prompt_tokens, use_tqdm)

    def _compared(
        self, queries: Sequence[str], documents: Sequence[str], truncate: int | None, use_tqdm: bool
    ) -> list[ScoringRequestOutput]:
        """Each distinct text is embedded once."""
        rules = self._text.rules
        left = [role_passage(text, "query", rules) for text in queries]
        right = [role_passage(text, "document", rules) for text in documents]
        distinct = list(dict.fromkeys([*left, *right]))
        found = dict(zip(distinct, self._pool(distinct, PoolingParams(), "embed", truncate, use_tqdm), strict=True))
        outputs = []
        for query, document in zip(left, right, strict=True):
            request, vector = found[document]
            score = ScoringOutput(similarity(found[query][1].values, vector.values, rules.similarity))
            outputs.append(pooling_output(request, vector, score))
        return outputs

    def shutdown(self) -> None:
        """End the engine's thread; the model is freed with the object."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _pool(
        self,
        passages: Sequence[Passage | Sequence[int]],
        params: PoolingParams,
        task: str,
        truncate: int | None,
        use_tqdm: bool,
    ) -> list[tuple[Request, Pooled]]:
        """Every passage's vector, in their order. Bad input raises before anything runs."""
        if params.task != task:
            raise ClientError(f"PoolingParams(task={params.task!r}) were given to {task}", param="pooling_params")
        limit, text = self.engine.info.max_model_len, self._text
        encoded = [encode_passage(p, text.tokenizer, text.rules, limit=limit, truncate=truncate) for p in passages]
        requests = [_pooling_request(str(next(self._ids)), one, params) for one in encoded]
        for request in requests:
            self.engine.check(request)
        with self._one_at_a_time:
            found = self._pool_alone(requests, use_tqdm)
        return [(request, found[request.request_id]) for request in requests]

    def _pool_alone(self, requests: Sequence[Request], use_tqdm: bool) -> dict[str, Pooled]:
        found: dict[str, Pooled] = {}
        mine, waiting = {request.request_id for request in requests}, collections.deque(requests)
        try:
            with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                self._submit(waiting)
                while len(found) < len(requests):
                    for event in self._events.get():
                        if isinstance(event, Failed) and event.request_id in mine:
                            raise ERRORS.get(event.code, ServerError)(event.message)
                        if isinstance(event, Pooled) and event.request_id in mine:
                            found[event.request_id] = event
                            bar.update()
                    self._submit(waiting)
        except BaseException:
            for request_id in mine:
                self.engine.abort(request_id)
            raise
        return found

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
        for index in transcript.take_matched():
            self.engine.abort(transcript.request.request_id, index, "stop")
        return sum(len(delta.token_ids) for delta in deltas)


def _by_request(events: Sequence[Event]) -> Iterable[tuple[str, list[Event]]]:
    grouped: dict[str, list[Event]] = {}
    for event in events:
        grouped.setdefault(event.request_id, []).append(event)
    return grouped.items()


def _pooling_request(request_id: str, encoded: Encoded, params: PoolingParams) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=encoded.ids,
        sampling=SamplingParams(),
        pooling=params,
        token_type_ids=encoded.segments,
    )


def _pairs(queries: str | Sequence[str], documents: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """As many queries as documents: one query counts for all."""
    left = [queries] if isinstance(queries, str) else list(queries)
    right = [documents] if isinstance(documents, str) else list(documents)
    if len(left) == 1:
        left *= len(right)
    if len(left) != len(right):
        raise ClientError(f"{len(left)} queries don't pair with {len(right)} documents", param="queries")
    return left, right


def _spread(given: Any, count: int, name: str) -> list[Any]:
    """One value for all, or one for each."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ClientError(f"{name} has {len(given)} entries for {count} prompts", param=name)
    return list(given)
