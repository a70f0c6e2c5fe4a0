"""Requests whose grammars are being compiled: they hold no seat, and nobody waits for them."""

from __future__ import annotations

from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Event, Failed
from kvasir.engine.grammar import Grammar, GrammarSource
from kvasir.engine.request import Request, StructuredOutput
from kvasir.engine.schema import COMPILE_LIMIT_S

WAIT_LIMIT_S = 60.0
"""A request whose grammar's turn hasn't come after this fails."""


class Compiling:
    """Filled by the threads that submit and emptied by the engine's, under the engine's lock."""

    def __init__(self, grammars: GrammarSource) -> None:
        self._grammars = grammars
        self._held: dict[str, tuple[Request, Grammar, float]] = {}
        """Each with the time of its submission."""
        self._wanted: dict[str, StructuredOutput] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request: Request, wanted: StructuredOutput, now: float) -> Grammar:
        """The request waits for its grammar, up to its own deadline. The grammar stays until the request's `end`."""
        grammar = self._grammars.hold(wanted)
        self._wanted[request.request_id] = wanted
        self._held[request.request_id] = (request, grammar, now)
        return grammar

    def end(self, request_id: str) -> None:
        """The request is over."""
        if (wanted := self._wanted.pop(request_id, None)) is not None:
            self._grammars.release(wanted)

    def pop(self, request_id: str) -> Request | None:
        """It need not wait any longer: it is about to be ended."""
        held = self._held.pop(request_id, None)
        return held and held[0]

    def take(self, now: float) -> tuple[list[tuple[Request, float]], list[Event]]:
        """(requests whose grammars are ready, each with the time of its submission; the ends of those whose can't be)."""
        ready: list[tuple[Request, float]] = []
        events: list[Event] = []
        for request, grammar, submitted in list(self._held.values()):
            outcome = _outcome(request, grammar, submitted, now)
            if outcome is None:
                continue
            del self._held[request.request_id]
            if isinstance(outcome, Failed):
                events.append(outcome)
            else:
                ready.append((outcome, submitted))
        return ready, events


def _outcome(request: Request, grammar: Grammar, submitted: float, now: float) -> Request | Failed | None:
    """None: it isn't known yet."""
    name = request.request_id
    limit = WAIT_LIMIT_S if request.deadline_s is None else min(WAIT_LIMIT_S, request.deadline_s)
    if grammar.future.done():
        error = grammar.future.exception()
        if error is None:
            return request
        if isinstance(error, KvasirError):
            return Failed(name, error.code, error.message, param=error.param)
        return Failed(name, "internal_error", f"the grammar's compiler failed: {error}")
    if grammar.begun is not None and now >= grammar.begun + COMPILE_LIMIT_S:
        text = f"structured output: compiling took over {COMPILE_LIMIT_S:.0f} s; simplify the grammar or schema"
        return Failed(name, "invalid_request_error", text, param="structured_outputs")
    if now < submitted + limit:
        return None
    if request.deadline_s is not None and request.deadline_s <= WAIT_LIMIT_S:
        return Failed(name, "deadline_exceeded", "the deadline passed while the grammar was compiled")
    text = (
        f"structured output: others' grammars were compiled for {WAIT_LIMIT_S:.0f} s before this one; ask again later"
    )
    return Failed(name, "overloaded", text)
