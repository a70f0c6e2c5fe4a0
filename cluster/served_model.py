"""ServedModel: what a gateway knows about a model: names, tokenizer, sampling defaults. Loads no weights, no torch."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvasir.cluster.answer_parts import ThoughtFormat, ToolFormat
from kvasir.cluster.call import Conversation, Text
from kvasir.cluster.derived_format import shows_tools
from kvasir.cluster.filling import filled
from kvasir.cluster.model_card import ModelCard
from kvasir.cluster.tool_formats import model_formats
from kvasir.cluster.tool_threads import ToolThreads
from kvasir.cluster.tool_use import HeldCalls, ToolUse
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ClientError
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.passage import Encoded, Passage, encode_passage
from kvasir.engine.request import StructuredOutput
from kvasir.engine.sentence_transformers import TextRules, read_text_rules
from kvasir.engine.tokenizer import Tokenizer

INLINE_CHARS = 2000
"""Texts up to this length are tokenised on the event loop (about 0.5 ms); longer ones in a thread."""

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")
_tool_threads = ToolThreads()
"""Apart: one tool's schema may take seconds."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model as clients see it. `names`: those that clients may use, the first is the model's own."""

    names: tuple[str, ...]
    tokenizer: Tokenizer | None
    """None: token ids in, token ids out (--skip-tokenizer-init)."""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """By the names of `SamplingParams`, from the model's generation_config.json or its GGUF file."""
    rules: TextRules = field(default_factory=TextRules)
    """Of texts that are embedded."""
    card: ModelCard = field(default_factory=ModelCard)
    tools: ToolFormat | None = None
    """How it writes calls of tools."""
    thoughts: ThoughtFormat | None = None
    """How it tells its thoughts from its answer."""

    @property
    def name(self) -> str:
        return self.names[0]

    @classmethod
    def load(cls, engine: EngineConfig) -> ServedModel:
        """Read the model's folder; fetches it from the hub when it isn't there. ConfigError when something is amiss."""
        files = ModelFiles(engine)
        tokenizer, defaults = files.tokenizer(), files.default_sampling()
        names = engine.served_model_name or (engine.model,)
        rules = read_text_rules(files.path)
        card = ModelCard.read(files)
        tools, thoughts = model_formats(engine.tool_call_parser, engine.reasoning_parser, tokenizer)
        return cls(
            names=tuple(names),
            tokenizer=tokenizer,
            sampling_defaults=defaults,
            rules=rules,
            card=card,
            tools=tools,
            thoughts=thoughts,
        )

    @cached_property
    def shows_tools(self) -> bool:
        """Its chat template tells the model of the tools that a request offers."""
        return self.tokenizer is not None and shows_tools(self.tokenizer.templates)

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer; `what` is the field that can't be used without one."""
        if self.tokenizer is None:
            text = f"{what} needs a tokenizer, and {self.name!r} is served with --skip-tokenizer-init; send token ids"
            raise ClientError(text, param=what)
        return self.tokenizer

    async def encode(self, prompt: Text | Conversation) -> list[int]:
        """Token ids of `prompt`, off the event loop when it is long."""
        if _length(prompt) <= INLINE_CHARS:
            return self._encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(_threads, self._encode, prompt)

    async def render(self, conversation: Conversation) -> str:
        """What the model reads of it, off the event loop when it is long."""
        if _length(conversation) <= INLINE_CHARS:
            return self._render(conversation)
        return await asyncio.get_running_loop().run_in_executor(_threads, self._render, conversation)

    async def hold(self, use: ToolUse, instead: StructuredOutput | None) -> HeldCalls:
        """`ToolUse.held` in this model's format, off the event loop."""
        return await _tool_threads.held(use, self.tools, instead)

    async def encode_passages(
        self, inputs: Sequence[Passage | Sequence[int]], places: Sequence[str], limit: int, truncate: int | None
    ) -> list[Encoded]:
        """The inputs of a call for vectors, each called by its place in errors; off the event loop when they are long."""
        texts = [one for one in inputs if isinstance(one, Passage)]
        if sum(len(one.text) + len(one.pair or "") for one in texts) <= INLINE_CHARS:
            return self._encode_passages(inputs, places, limit, truncate)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_threads, self._encode_passages, inputs, places, limit, truncate)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `ids`, off the event loop when they are many."""
        tokenizer = self.need_tokenizer("tokens")
        if len(ids) <= INLINE_CHARS:
            return tokenizer.decode(ids, skip_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_threads, tokenizer.decode, ids, skip_special_tokens)

    def _encode_passages(
        self, inputs: Sequence[Passage | Sequence[int]], places: Sequence[str], limit: int, truncate: int | None
    ) -> list[Encoded]:
        return [
            encode_passage(one, self.tokenizer, self.rules, limit=limit, truncate=truncate, param=place)
            for one, place in zip(inputs, places, strict=True)
        ]

    def _encode(self, prompt: Text | Conversation) -> list[int]:
        if isinstance(prompt, Text):
            tokenizer = self.need_tokenizer("prompt")
            return tokenizer.encode(filled(prompt, tokenizer, self.name), prompt.add_special_tokens)
        text = self._render(prompt)
        return self.need_tokenizer("messages").encode(text, prompt.add_special_tokens)

    def _render(self, conversation: Conversation) -> str:
        source = conversation.source
        try:
            return self.need_tokenizer("messages").render_chat(
                conversation.messages,
                conversation.tools,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                chat_template=conversation.chat_template,
                **conversation.variables,
            )
        except ClientError as error:
            if error.param == "messages" != source:  # which isn't numbered as they are
                error.message, error.param = re.sub(r"\bmessages(\[\d+\])?", source, error.message), source
            raise


def _length(prompt: Text | Conversation) -> int:
    """About how many characters; contents that aren't text count as long, so that a thread looks at them."""
    if isinstance(prompt, Text):
        return len(prompt.text) + len(prompt.suffix)
    total = INLINE_CHARS if prompt.tools else 0
    for message in prompt.messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        total += len(content) + 20 if isinstance(content, str) else INLINE_CHARS
    return total
