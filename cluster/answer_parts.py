"""What a model wrote, as its parts: thoughts, content, calls of tools. Fed with text however it is cut; what it gives adds up
to the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from kvasir.cluster.text_scanner import Scanner, Steps
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.raw_values import opened, resolved

Kind = Literal["content", "reasoning", "call", "arguments"]
_SHORT = 2
"""Marks up to this length may stand anywhere in thoughts."""
MAX_RETURNED = 500_000
"""Characters of one answer that are read in vain as calls: about half a second."""
KINDS: tuple[Literal["reasoning"], Literal["content"]] = ("reasoning", "content")


@dataclass(slots=True)  # not frozen, as engine.event.Token
class Part:
    """A piece of an answer. Of a call: first its function's name, then its arguments, JSON text in any number of pieces."""

    kind: Kind
    text: str
    call: int = 0
    """Number of the call, from 0."""


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """How a family of models tells thoughts from the answer."""

    name: str
    begins: tuple[str, ...]
    end: str
    always: bool = False
    """Even an answer without a beginning mark begins with thoughts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """How a family of models writes calls."""

    name: str
    begins: tuple[str, ...]
    """What calls begin with, in the midst of other text."""
    read: Callable[[AnswerReader, str], Steps[bool]]
    """Reads on behind one of `begins`; False when that isn't a call after all, and nothing was said."""
    inner: tuple[str, ...] = ()
    """Marks inside of calls, some of which are special tokens."""
    signs: tuple[str, ...] = ()
    """A chat template that holds all of these teaches this format; default: `begins`."""
    call: tuple[str, str]
    """What stands before the arguments, with NAME for the name, {number} for a number and {id} for an id, and behind: for
    grammars."""
    arguments: ArgumentStyle | None = None
    """How they are written; None: as a JSON object."""
    unwrapped: tuple[str, str] | None = None
    """As `call`, in a second way that the models have."""
    wrap: tuple[str, str, str] = ("", "\n", "")
    """What stands before, between and behind several calls."""
    befores: tuple[str, ...] = ()
    """And may stand before them instead."""
    whole: Callable[[AnswerReader], Steps[None]] | None = None
    """Reads the answer from its beginning, thoughts included."""
    thoughts: ThoughtFormat | None = None
    """With `whole`: what stands before and behind the thoughts, up to the answer itself."""
    blocks: tuple[tuple[str, str], ...] = ()
    """With `whole`: what stands before and behind thoughts and remarks, any number of which precede calls or the answer. The
    first are the thoughts, if it has some."""
    answer: tuple[str, str] = ("", "")
    """With `whole`: what stands before an answer that is no call, and may stand behind it."""

    def opening(self, prompt: str) -> str:
        """With `whole`: the mark by which a prompt that ends so has begun the answer; empty: it hasn't."""
        marks = [*(begin for begin, _ in self.blocks), self.answer[0]]
        return next((mark for mark in marks if mark and prompt.endswith(mark)), "")

    @property
    def thoughts_before_calls(self) -> ThoughtFormat | None:
        """With `whole`: the thoughts, up to a call or the answer."""
        thinks = self.thoughts is not None and self.blocks
        return ThoughtFormat(self.name, (self.blocks[0][0],), self.blocks[0][1]) if thinks else self.thoughts


@dataclass(slots=True)
class _Text:
    """One kind's text: white space at its end waits until more follows."""

    strip: bool
    """Nor is white space shown that stands at its beginning."""
    begun: bool = False
    held: list[str] = field(default_factory=list)

    def add(self, text: str) -> str:
        if self.strip and not self.begun:
            text = text.lstrip()
        shown = text.rstrip()
        if not shown:
            self.held.append(text)
            return ""
        self.begun = True
        shown, behind = "".join((*self.held, shown)), text[len(shown) :]
        self.held = [behind]
        return shown

    def flush(self) -> str:
        """What is held belongs to the text, if there is any since the last time."""
        held, self.held = "".join(self.held) if self.begun else "", []
        self.begun = False
        return held


class AnswerReader:
    """Reads one answer. `begun`: the prompt has opened the thoughts already. `schemas`: tool -> its parameters' schema.
    may_call: false where there are no tools: what looks like a call is text."""

    def __init__(
        self,
        tools: ToolFormat | None,
        thoughts: ThoughtFormat | None,
        *,
        begun: bool = False,
        schemas: Mapping[str, Any] | None = None,
        may_call: bool = True,
    ) -> None:
        self.scanner = Scanner()
        self.schemas = schemas or {}
        self.may_call = may_call
        self.calls = 0
        """How many have begun."""
        self.said = False
        """The answer has text, or a call."""
        self.cut = False
        """Once finished: the text ended inside the last call."""
        self._arguments: list[str] = []
        """Of the last call."""
        self._beside = ""
        self._parts: list[Part] = []
        self._tools, self._thoughts, self._begun = tools, thoughts, begun
        self._texts = {"content": _Text(strip=False), "reasoning": _Text(strip=True)}
        self._steps = self._read()
        self._over = False
        self._go()

    def feed(self, text: str) -> list[Part]:
        """What more text brings."""
        self.scanner.feed(text)
        return self._go()

    def finish(self) -> list[Part]:
        """What was held back."""
        calls, closed = self.calls, _closed(self._arguments)
        self.scanner.end()
        parts = self._go()  # some readers close what is open
        self.cut = self.calls > 0 and not (closed if self.calls == calls else _closed(self._arguments))
        if not self.calls:  # white space alone is an answer, too
            self._texts["content"].begun = True
        for kind in KINDS:
            self._flush(kind)
        return _joined([*parts, *self._parts])

    # -- for formats

    def content(self, text: str) -> None:
        """Text of the answer."""
        self._say("content", text)

    def reasoning(self, text: str) -> None:
        """Text of its thoughts."""
        self._say("reasoning", text)

    def call(self, name: str) -> None:
        """A call begins."""
        self.scanner.drop()
        self._flush("content")
        self._parts.append(Part("call", name, self.calls))
        self._arguments = []
        self.calls += 1
        self.said = True

    def remark(self, text: str) -> None:
        """Text between calls, where white space says nothing."""
        if text.strip():
            self.content(text)

    def beside(self, text: str) -> None:
        """Text in a call that is none of its arguments: said behind it."""
        self._beside += text

    def over(self) -> None:
        """The last call is over."""
        text, self._beside = self._beside, ""
        self.remark(text)

    def gap(self) -> None:
        """White space that comes next stands between marks."""
        self._flush("content")

    def arguments(self, text: str) -> None:
        """JSON text of the last call's arguments."""
        self._parts.append(Part("arguments", text, self.calls - 1))
        self._arguments.append(text)

    def properties(self, name: str) -> Mapping[str, Any]:
        """Schemas of a tool's parameters by their names, as far as it says them."""
        schema = self.schemas.get(name)
        found = resolved(schema, schema)
        known = found.get("properties") if isinstance(found, Mapping) else None
        return {key: opened(one, schema) for key, one in known.items()} if isinstance(known, Mapping) else {}

    @property
    def patient(self) -> bool:
        """Not too much was read in vain: brackets in brackets, each of which may begin a call, would be read over and over."""
        return self.scanner.returned < MAX_RETURNED

    # --

    def _go(self) -> list[Part]:
        if not self._over:
            try:
                next(self._steps)
            except StopIteration:
                self._over = True
        parts, self._parts = self._parts, []
        return _joined(parts) if len(parts) > 1 else parts

    def _say(self, kind: Literal["content", "reasoning"], text: str) -> None:
        if shown := self._texts[kind].add(text):
            self._parts.append(Part(kind, shown))
            self.said = self.said or kind == "content"

    def _flush(self, kind: Literal["content", "reasoning"]) -> None:
        """White space that was held back is a part of the answer after all, unless it stands alone."""
        if held := self._texts[kind].flush():
            self._parts.append(Part(kind, held))

    def _read(self) -> Steps[None]:
        tools = self._tools
        if tools is not None and tools.whole is not None:
            yield from tools.whole(self)
            return
        if self._thoughts is not None:
            yield from self._think(self._thoughts)
        while (mark := (yield from self.scanner.until(self._begins(), self.content))) is not None:
            assert tools is not None
            place, calls = self.scanner.keep(), self.calls
            if not (yield from tools.read(self, mark)) and self.calls == calls:
                self.scanner.rewind(place)
                self.content(mark)
            self.scanner.drop()

    def _begins(self) -> Sequence[str]:
        """What calls begin with. None, once too much looked like one and wasn't."""
        return self._tools.begins if self._tools and self.patient else ()

    def _think(self, form: ThoughtFormat) -> Steps[None]:
        place = self.scanner.keep()
        yield from self.scanner.space()
        if not (yield from self.scanner.literal(*form.begins)) and not (self._begun or form.always):
            self.scanner.rewind(place)
            return
        self.scanner.drop()
        calls = [mark for mark in (self._tools.begins if self._tools else ()) if len(mark) > _SHORT]
        mark = yield from self.scanner.until([form.end, *calls], self.reasoning)
        if mark in calls:  # some models call without ending their thoughts
            self.scanner.skip(-len(mark))
        self._texts["reasoning"].held = []
        self._texts["content"].strip = True


def read_answer(reader: AnswerReader, text: str) -> list[Part]:
    """All parts of a whole text."""
    return _joined([*reader.feed(text), *reader.finish()])


def text_of(parts: Sequence[Part], kind: Kind) -> str:
    """What the parts of one kind say together."""
    return "".join(part.text for part in parts if part.kind == kind)


@dataclass(slots=True)
class CalledTool:
    """One call, put together."""

    name: str
    arguments: str = ""
    number: int = 0
    """Among those of its answer."""


@dataclass(slots=True)
class ReadAnswer:
    """An answer in one piece."""

    content: str = ""
    reasoning: str = ""
    calls: list[CalledTool] = field(default_factory=list)
    cut: bool = False
    """It ends inside the last call."""

    def add(self, parts: Sequence[Part]) -> None:
        """More of it."""
        for part in parts:
            if part.kind == "content":
                self.content += part.text
            elif part.kind == "reasoning":
                self.reasoning += part.text
            elif part.kind == "call":
                self.calls.append(CalledTool(part.text, number=part.call))
            else:
                self.calls[part.call].arguments += part.text


def _closed(arguments: Sequence[str]) -> bool:
    """These pieces are an object to its end."""
    scanner, text = Scanner(), "".join(arguments).lstrip()
    scanner.feed(text)
    scanner.end()
    try:
        next(scanner.value(lambda _: None))
    except StopIteration as found:
        return bool(found.value) and text.startswith("{")
    return False


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    found: list[Part] = []
    for (kind, call), some in groupby(parts, lambda part: (part.kind, part.call)):
        if kind == "call":
            found += some
        else:
            found.append(Part(kind, "".join(part.text for part in some), call))
    return found
