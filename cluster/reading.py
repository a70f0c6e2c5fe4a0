"""How the answers of one call are read: which marks tell thoughts and calls of tools from the rest, by the model's templates."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader, Part, ReadAnswer, ThoughtFormat, ToolFormat
from kvasir.cluster.call import Call
from kvasir.cluster.custom_tools import CustomInput
from kvasir.cluster.tool_formats import marks_of
from kvasir.cluster.tool_use import HeldCalls, ToolUse
from kvasir.engine.errors import UnsupportedError
from kvasir.engine.request import StructuredOutput
from kvasir.engine.thoughts import Thoughts
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Delta, Output

_TAIL = 24
"""Tokens of the prompt's end that show whether it has begun the thoughts."""
_TAIL_CHARS = 200
"""And characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Of one prompt's answers."""

    tools: ToolFormat | None = None
    thoughts: ThoughtFormat | None = None
    begun: bool = False
    """The prompt has begun the thoughts."""
    opening: str = ""
    """What of the answer the prompt has begun, in formats of the whole answer."""
    use: ToolUse | None = None
    shown: frozenset[int] = frozenset()
    """Special tokens that are marks: they stay in the text that is read."""
    warnings: tuple[str, ...] = ()
    """What of the tools' schemas the model isn't held to."""

    @property
    def custom(self) -> Mapping[str, str]:
        """Custom tools, by their names."""
        return self.use.custom if self.use else {}

    @property
    def plain(self) -> bool:
        """The text is the answer."""
        return self.tools is None and self.thoughts is None

    def reader(self) -> AnswerReader:
        """For one continuation."""
        schemas, may_call = (self.use.schemas, True) if self.use else ({}, False)
        found = AnswerReader(self.tools, self.thoughts, begun=self.begun, schemas=schemas, may_call=may_call)
        found.feed(self.opening)
        return found

    def call_id(self, name: str, number: int) -> str:
        """A new id for a call: in the form that the model's template wants to see again, where it wants one."""
        form = self.tools.name if self.tools else ""
        if form == "kimi_k2":
            return f"functions.{name}:{number}"
        return secrets.token_hex(5)[:9] if form == "mistral" else f"call_{secrets.token_hex(12)}"


PLAIN = Reading()


def reading(
    call: Call,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    taught: tuple[ToolFormat | None, ThoughtFormat | None],
    held: HeldCalls | None = None,
) -> Reading:
    """How answers to a conversation with these prompt tokens are read. taught: the model's formats; held: of the call's
    tools."""
    tools, thoughts = taught
    if held is not None:
        tools = held.form
    elif tools is None or tools.whole is None:
        tools = None
    begun, opening = False, ""
    tail = tokenizer.decode(list(prompt_ids[-_TAIL:]), skip_special_tokens=False)
    if tools is not None and tools.whole is not None:
        thoughts, opening = None, tools.opening(tail)
        begun = tools.thoughts is not None and opening in tools.thoughts.begins
    elif thoughts is not None:
        begun, open_ = thoughts_begun(tail, thoughts)
        thoughts = thoughts if open_ else None
    marks = marks_of(tools, thoughts)
    added = tokenizer.added_tokens
    shown = frozenset(token for token, text in added.items() if any(text in mark for mark in marks))
    warnings = held.unheld if held else ()
    if call.tools is not None and call.tools.required and "structured_outputs" in call.sampling:
        name = call.known_as.get("structured_outputs", "structured_outputs")
        warnings += (f"{name} (tool_choice makes every answer a call)",)
    return Reading(
        tools=tools, thoughts=thoughts, begun=begun, opening=opening, use=call.tools, shown=shown, warnings=warnings
    )


def constraints(call: Call, found: Reading, tokenizer: Tokenizer, held: HeldCalls | None) -> dict[str, Any]:
    """What a reading adds to the sampling: a grammar for calls, where thoughts end. UnsupportedError names what can't be."""
    given: dict[str, Any] = {}
    wanted: StructuredOutput | None = call.sampling.get("structured_outputs")
    if held is not None:
        given["structured_outputs"] = wanted = held.grammar
    thoughts = found.thoughts
    if thoughts is None and found.tools is not None and (found.begun or not found.opening):
        thoughts = found.tools.thoughts if found.use is None else found.tools.thoughts_before_calls
    if (call.thinks or call.thinking_budget is not None) and thoughts is None:
        text = "this model has no thoughts that are told from its answer (its chat template knows none, or this request"
        param = "thinking" if call.thinks else "thinking_token_budget"
        raise UnsupportedError(f"{text} turns them off; see --reasoning-parser)", param=param)
    if (
        thoughts is not None
        and (wanted is not None or call.thinking_budget is not None)
        and "thoughts" not in call.sampling
    ):
        begin = () if found.begun or thoughts.always else _ids(tokenizer, thoughts.begins[0])
        given["thoughts"] = Thoughts(begin=begin, end=_ids(tokenizer, thoughts.end), budget=call.thinking_budget)
    return given


def read_whole(found: Reading, text: str) -> ReadAnswer:
    """A whole answer."""
    answer, stream = ReadAnswer(), AnswerStream(found)
    answer.add(stream.parts(text, last=True))
    answer.cut = stream.cut
    return answer


class AnswerStream:
    """The parts of one continuation, as its deltas come; calls get their ids."""

    def __init__(self, found: Reading) -> None:
        self._reading, self._reader = found, found.reader()
        self.ids: list[str] = []
        """Of the calls so far."""
        self.thoughts: list[str] = []
        """Pieces of them so far."""
        self.custom: set[int] = set()
        """Numbers of calls of custom tools."""
        self._input: CustomInput | None = None
        """Of the last call, if its tool is one."""

    @property
    def cut(self) -> bool:
        """Behind the last part: the text ended inside the last call."""
        return self._reader.cut

    def parts(self, text: str, *, last: bool) -> list[Part]:
        """What `text` brings; `last`: nothing follows. Calls of custom tools have their input for arguments."""
        parts = self._reader.feed(text) if text else []
        if last:
            parts = [*parts, *self._reader.finish()]
        if self._reading.custom:
            parts = self._with_inputs(parts, last)
        for part in parts:
            if part.kind == "call":
                self.ids.append(self._reading.call_id(part.text, part.call))
            elif part.kind == "reasoning":
                self.thoughts.append(part.text)
        return parts

    def _with_inputs(self, parts: Sequence[Part], last: bool) -> list[Part]:
        out: list[Part] = []
        for part in parts:
            if part.kind != "arguments":
                out += self._end_input()
            elif self._input is not None:
                part = Part("arguments", self._input.feed(part.text), part.call)
            if part.kind == "call" and part.text in self._reading.custom:
                self.custom.add(part.call)
                self._input = CustomInput()
            if part.text or part.kind != "arguments":
                out.append(part)
        return [*out, *(self._end_input() if last else ())]

    def _end_input(self) -> list[Part]:
        """What is left of the last call's input, if its tool is a custom one."""
        rest = self._input.finish() if self._input is not None else ""
        self._input = None
        return [Part("arguments", rest, max(self.custom))] if rest else []


def thought_tokens(tokenizer: Tokenizer | None, thoughts: str) -> int:
    """How many tokens they are, without the marks around them."""
    return len(tokenizer.encode(thoughts, add_special_tokens=False)) if tokenizer is not None and thoughts else 0


def cut_short(answer: ReadAnswer | AnswerStream, end: Delta | Output) -> bool:
    """Its last call has no end, and not because the model left it so: something else ended the text, as a stop string."""
    return answer.cut and (end.finish_reason != "stop" or end.stop_reason is not None)


def called(answer: ReadAnswer | AnswerStream | None, end: Delta | Output) -> bool:
    """The model ended with calls, and waits for their results."""
    if answer is None or end.finish_reason != "stop" or cut_short(answer, end):
        return False
    return bool(answer.calls if isinstance(answer, ReadAnswer) else answer.ids)


def thoughts_begun(prompt: str, thoughts: ThoughtFormat) -> tuple[bool, bool]:
    """(the prompt has begun the thoughts, there may be thoughts): a prompt that ends them has none."""
    tail = prompt[-_TAIL_CHARS:].rstrip()
    if tail.endswith(thoughts.end):
        return False, False
    return any(tail.endswith(mark.rstrip()) for mark in thoughts.begins), True


def _ids(tokenizer: Tokenizer, mark: str) -> list[int]:
    return tokenizer.encode(mark, add_special_tokens=False)
