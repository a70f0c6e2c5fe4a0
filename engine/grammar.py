"""Grammars: a `StructuredOutput` compiled for one vocabulary, and what a sequence may say next under it.

llguidance does the parsing: on the official JSON Schema suite it accepts no invalid instance and names the keywords that
it can't enforce; masks are computed lazily, so that compiling stays cheap (benchmarks/grammar.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.request import StructuredOutput
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.words import Words

KEPT_BYTES = 256 << 20
"""What grammars that nobody uses any more hold in all; the least recently used goes first."""
BASE_BYTES, CHARACTER_BYTES, TOKEN_BYTES, STATES_BYTES = 1 << 20, 64, 1 << 10, 20 << 20
"""What one holds, by estimate: what the first masks bring, something for each character, and for each token that was said under
it what the states of its lexer come to, up to a limit. 138 schemas of JSONSchemaBench with 620 tokens each held 51 MB where
this says 256, and none more than 1.3 times what it says."""
THREADS = 2
"""Grammars that are compiled at once: a heavy one leaves a thread to the others."""
MARK = "\x02"
"""A character that joins with no other."""
LONGEST = 64
"""Bytes of the longest token that is looked for, characters of the longest text whose tokens are remembered."""
FORCED = 4096
"""Texts whose tokens are remembered."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""What bounds a grammar's work in compilation (about 40 ms of regex building) and in each step."""

UNNAMED = {
    "patternProperty regexes": "patternProperties",
    "regex parse error": "pattern",
    "for float range": "minimum/maximum/exclusiveMinimum/exclusiveMaximum",
    "for integer range": "minimum/maximum/exclusiveMinimum/exclusiveMaximum",
    "anyOf is empty": "enum/anyOf",
    "in a registry": "$ref/$schema",
    "Anchor ": "$ref",
    "circular references": "$ref",
    "intersection stack": "allOf/$ref",
}
"""What the library's reasons for a schema are about, by a phrase of those that don't name it."""


class Vocabulary:
    """The bytes of every token, as llguidance wants them. Added and special tokens stand outside of every text."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        self.size = size
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(token for token in tokenizer.added_tokens if token < size)
        self.names = {text: token for token, text in tokenizer.added_tokens.items() if token < size}
        self.eos_token_id = next((token for token in ends if token < size), self._none())
        self.bos_token_id = None
        for token in self.special_token_ids:
            self.tokens[token] = b"\xff<" + tokenizer.added_tokens[token].encode() + b">"
        self._tokenizer = tokenizer
        self._before = self._encode("")
        self._short = lru_cache(FORCED)(self._inside)
        self._ids: dict[bytes, int] = {}
        self.compiled = LLTokenizer(TokenizerWrapper(self), n_vocab=size, eos_token=self.eos_token_id)

    def _none(self) -> int:
        """A token that no text holds, for models without an end: the first special one."""
        return self.special_token_ids[0] if self.special_token_ids else self.size - 1

    def __call__(self, text: str) -> list[int]:
        """Inside of a text: SentencePiece begins every text with a space, which must not be taken for a part of it.

        What a grammar forces, an object's keys, is asked for by every mask before it: 33 of the 50 us that one took."""
        return self._short(text) if len(text) <= LONGEST else self._inside(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(MARK + text, add_special_tokens=False)

    def _inside(self, text: str) -> list[int]:
        ids, before = self._encode(text), self._before
        return ids[len(before) :] if ids[: len(before)] == before else self._longest(text.encode())

    def _longest(self, data: bytes) -> list[int]:
        """Always the longest token that fits."""
        self._ids = self._ids or {data: token for token, data in enumerate(self.tokens)}
        found: list[int] = []
        while data:
            size = next((n for n in range(min(len(data), LONGEST), 0, -1) if data[:n] in self._ids), 0)
            if not size:
                return found
            found.append(self._ids[data[:size]])
            data = data[size:]
        return found


@dataclass(eq=False, slots=True)
class Compiled:
    """A grammar's beginning."""

    matcher: LLMatcher
    """To be copied, not to be advanced itself."""
    said: int = 0
    """Tokens that all copies have taken in: they share the states that their lexers come to."""


@dataclass(eq=False, slots=True)
class Grammar:
    """One that was asked for."""

    future: Future[None] = field(default_factory=Future)
    """Raises ClientError or UnsupportedError."""
    compiled: Compiled | None = None
    """None where another rank has it, too."""
    begun: float | None = None
    """time.time() when a thread took it up."""
    uses: int = 0

    @property
    def states_bytes(self) -> int:
        """About so many are held by the states that its lexer has come to."""
        return min(TOKEN_BYTES * self.compiled.said, STATES_BYTES) if self.compiled is not None else 0


class GrammarSource(Protocol):
    """What an engine needs of grammars."""

    words: Words

    def hold(self, wanted: StructuredOutput) -> Grammar: ...
    def release(self, wanted: StructuredOutput) -> None: ...
    def shutdown(self) -> None: ...


class Grammars:
    """Compiles off the caller's thread, each content once. `tokenizer` is called when the first grammar is asked for."""

    def __init__(self, tokenizer: Callable[[], Tokenizer | None], vocab: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, tuple(ends)
        self.words = Words(tokenizer)
        self._vocabulary: Vocabulary | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvasir-grammar")
        self._used: dict[StructuredOutput, Grammar] = {}
        self._kept: OrderedDict[StructuredOutput, tuple[Grammar, int]] = OrderedDict()
        """With the bytes that each holds beside its states: these grow, too, while it is used by who doesn't hold it."""
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self.on_begun: Callable[[StructuredOutput], None] = lambda wanted: None
        """Called by the thread that begins to compile one."""

    def hold(self, wanted: StructuredOutput) -> Grammar:
        """From now on it is compiled, or is being compiled, until `release`: as often as it was held."""
        with self._lock:
            found = self._used.get(wanted)
            if found is None:
                found = self._used[wanted] = self._kept.pop(wanted, (None,))[0] or Grammar()
                if found.begun is None:
                    self._threads.submit(self._work, wanted, found)
            found.uses += 1
        return found

    def release(self, wanted: StructuredOutput) -> None:
        """It isn't needed any more, but may be asked for again."""
        with self._lock:
            found = self._used[wanted]
            found.uses -= 1
            if not found.uses:
                del self._used[wanted]
                if found.begun is not None:
                    self._keep(wanted, found)
        if not found.uses and found.begun is None:  # its turn hasn't come; who is told so may take locks
            found.future.cancel()

    def compiled(self, wanted: StructuredOutput, spent: Compiled | None = None, alone: bool = False) -> Compiled:
        """The grammar's beginning: another than `spent`, whose copies have gone beyond its limits together; `alone`: nobody else
        gets it. Where nobody holds it, as on ranks apart, it is compiled now."""
        if alone:
            return self._compile(wanted)
        with self._lock:
            if (found := self._used.get(wanted)) is None and wanted in self._kept:
                found, _ = self._kept[wanted]
                self._kept.move_to_end(wanted)
                self._let_go()
        if found is None:
            found = Grammar()
            self._work(wanted, found)
            with self._lock:
                self._keep(wanted, found)
        found.future.result()
        if found.compiled is spent:
            found.compiled = self._compile(wanted)
        assert found.compiled is not None
        return found.compiled

    def _keep(self, wanted: StructuredOutput, found: Grammar) -> None:
        self._kept[wanted] = found, BASE_BYTES + CHARACTER_BYTES * len(repr(wanted))
        self._kept.move_to_end(wanted)
        self._let_go()

    def _let_go(self) -> None:
        """Of the least recently used, until the others keep to the limit."""
        over = sum(size + grammar.states_bytes for grammar, size in self._kept.values()) - KEPT_BYTES
        while over > 0 and self._kept:  # what they hold changes meanwhile
            _, (grammar, size) = self._kept.popitem(last=False)
            over -= size + grammar.states_bytes

    def _work(self, wanted: StructuredOutput, found: Grammar) -> None:
        """Compile it, unless everybody who wanted it has gone."""
        found.begun = time.time()
        if not found.future.set_running_or_notify_cancel():
            return
        self.on_begun(wanted)
        try:
            found.compiled = self._compile(wanted)
            found.future.set_result(None)
        except BaseException as error:  # whoever waits is told, whatever it is: the library's panics are no Exceptions
            found.future.set_exception(error)

    def shutdown(self) -> None:
        """No grammar is waited for any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def vocabulary(self) -> Vocabulary:
        """Built once."""
        with self._loading:
            if self._vocabulary is None:
                tokenizer = self._tokenizer()
                if tokenizer is None:
                    raise UnsupportedError(
                        "structured output needs the model's tokenizer, but skip_tokenizer_init is set",
                        param="structured_outputs",
                    )
                self._vocabulary = Vocabulary(tokenizer, self._vocab, self._ends)
            return self._vocabulary

    def _compile(self, wanted: StructuredOutput) -> Compiled:
        vocabulary = self.vocabulary()
        matcher = LLMatcher(vocabulary.compiled, grammar_text(wanted, vocabulary.names), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refusal(wanted, matcher.get_error())
        return Compiled(matcher)


def refusal(wanted: StructuredOutput, why: str) -> ClientError:
    """Of a grammar that can't be compiled: what it is, and the library's reason in one line."""
    reason = " ".join(why.split("<state>")[0].split(" Enable 'coerce_one_of'")[0].split())[:500]
    kinds = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    kind = next(name for name in kinds if getattr(wanted, name) not in (None, False, ()))
    if kind in ("json", "structural_tag"):
        reason = "".join(f"{keyword}: " for phrase, keyword in UNNAMED.items() if phrase in reason) + reason
    cause = UnsupportedError if "nimplemented" in reason or "not supported" in reason else ClientError
    return cause(f"structured output: this {kind} can't be enforced: {reason}", param="structured_outputs")
