"""Requests whose grammars are being compiled: they hold no seat, and nobody waits for them."""

from __future__ import annotations

from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Event, Failed
from kvasir.engine.grammar import COMPILE_LIMIT_S, Grammars
from kvasir.engine.request import Request


class Compiling:
    """Filled by the threads that submit and emptied by the engine's, under the engine's lock."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._held: dict[str, tuple[Request, float]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request: Request, now: float) -> None:
        """The request waits for its grammar, up to its own deadline."""
        limit = COMPILE_LIMIT_S if request.deadline_s is None else min(COMPILE_LIMIT_S, request.deadline_s)
        self._held[request.request_id] = (request, now + limit)

    def pop(self, request_id: str) -> Request | None:
        """It need not wait any longer: it is about to be ended."""
        held = self._held.pop(request_id, None)
        return held and held[0]

    def take(self, now: float) -> tuple[list[Request], list[Event]]:
        """(requests whose grammars are ready, the ends of those whose grammars can't be)."""
        ready: list[Request] = []
        events: list[Event] = []
        for request, limit in list(self._held.values()):
            outcome = self._outcome(request, limit, now)
            if outcome is None:
                continue
            del self._held[request.request_id]
            if isinstance(outcome, Failed):
                events.append(outcome)
            else:
                ready.append(outcome)
        return ready, events

    def _outcome(self, request: Request, limit: float, now: float) -> Request | Failed | None:
        """None: it isn't known yet."""
        wanted = request.sampling.structured_outputs
        assert wanted is not None
        future = self._grammars.compile(wanted)
        if future.done():
            error = future.exception()
            if error is None:
                return request
            if isinstance(error, KvasirError):
                return Failed(request.request_id, error.code, error.message)
            return Failed(request.request_id, "internal_error", f"the grammar's compiler failed: {error}")
        if now < limit:
            return None
        if request.deadline_s is not None and request.deadline_s < COMPILE_LIMIT_S:
            return Failed(request.request_id, "deadline_exceeded", "the deadline passed while the grammar was compiled")
        message = f"structured output: compiling took over {COMPILE_LIMIT_S:.0f} s; simplify the grammar or schema"
        return Failed(request.request_id, "invalid_request_error", message)
