"""Grammars where another rank of a group samples than plans: that rank compiles them, between steps and beside them, before a
request that needs one takes part in a step.

Rank 0 says which ones are needed and which no longer; the other says when it begins with one, and how that went.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Any

from kvasir.engine.errors import ERRORS, KvasirError, ServerError
from kvasir.engine.grammar import Grammar, Grammars
from kvasir.engine.request import StructuredOutput
from kvasir.engine.words import Words

Send = Callable[[bytes], None]


class RemoteGrammars:
    """Rank 0's side: as `Grammars`, but for the compiled ones themselves. send(frame) may take its time."""

    def __init__(self, words: Words, send: Send) -> None:
        self.words = words
        self._send = send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvasir-grammar")
        self._numbers = count()
        self._used: dict[StructuredOutput, tuple[int, Grammar]] = {}
        self._asked: dict[int, Grammar] = {}
        self._lock = threading.Lock()

    def hold(self, wanted: StructuredOutput) -> Grammar:
        """As `Grammars.hold`."""
        with self._lock:
            if wanted not in self._used:
                number, grammar = next(self._numbers), Grammar()
                self._used[wanted], self._asked[number] = (number, grammar), grammar
                self._say(number, asdict(wanted))
            grammar = self._used[wanted][1]
            grammar.uses += 1
        return grammar

    def release(self, wanted: StructuredOutput) -> None:
        """As `Grammars.release`."""
        with self._lock:
            number, grammar = self._used[wanted]
            grammar.uses -= 1
            if grammar.uses:
                return
            del self._used[wanted], self._asked[number]
            with contextlib.suppress(RuntimeError):  # shut down: nobody is told
                self._say(number, None)
        grammar.future.cancel()

    def told(self, frame: bytes) -> None:
        """Any thread: what the other rank said."""
        said = json.loads(frame)
        with self._lock:
            grammar = self._asked.get(said["number"])
        if grammar is None:  # nobody needs it any more
            return
        if said["begun"]:
            grammar.begun = time.time()
        elif not grammar.future.set_running_or_notify_cancel():
            return
        elif (error := said["error"]) is None:
            grammar.future.set_result(None)
        else:
            kind = ERRORS.get(error["code"], ServerError)
            grammar.future.set_exception(kind(error["message"], param=error["param"]))

    def shutdown(self) -> None:
        """Nothing is said any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _say(self, number: int, wanted: dict[str, Any] | None) -> None:
        self._thread.submit(self._send, json.dumps({"number": number, "wanted": wanted}).encode())


class GrammarServer:
    """The side of the rank that samples. Its `grammars` compile in threads of their own."""

    def __init__(self, grammars: Grammars, send: Send) -> None:
        self._grammars, self._send = grammars, send
        self._held: dict[int, StructuredOutput] = {}
        grammars.on_begun = self._begun

    def take(self, frame: bytes) -> None:
        """What rank 0 said."""
        said = json.loads(frame)
        number = said["number"]
        if said["wanted"] is None:
            self._grammars.release(self._held.pop(number))
            return
        wanted = self._held[number] = StructuredOutput(**said["wanted"])
        found = self._grammars.hold(wanted)
        if found.begun is not None and not found.future.done():  # for somebody who has let it go since
            self._say_begun(number)
        found.future.add_done_callback(partial(self._done, number))

    def _begun(self, wanted: StructuredOutput) -> None:
        for number, held in [*self._held.items()]:
            if held == wanted:
                self._say_begun(number)

    def _say_begun(self, number: int) -> None:
        self._send(json.dumps({"number": number, "begun": True}).encode())

    def _done(self, number: int, future: Future[Any]) -> None:
        if future.cancelled():
            return
        error, said = future.exception(), None
        if isinstance(error, KvasirError):
            said = {"code": error.code, "message": error.message, "param": error.param}
        elif error is not None:
            text = f"the grammar's compiler failed: {error}"
            said = {"code": ServerError.code, "message": text, "param": None}
        self._send(json.dumps({"number": number, "begun": False, "error": said}).encode())
