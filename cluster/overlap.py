"""Overlap: tokens that one group has delivered, and that the next one makes once more before it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvasir.engine.event import Event, Failed, Token


class Differs(Exception):  # noqa: N818
    """The next group goes on otherwise than the one before."""


class Overlap:
    """`tokens`: continuation -> what was delivered of it since the next group was asked. False once all came again."""

    def __init__(self, tokens: Mapping[int, Sequence[int]]) -> None:
        self._tokens = {index: [*ids] for index, ids in tokens.items() if ids}

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def __contains__(self, index: int) -> bool:
        """Some of what was delivered of this continuation hasn't come again."""
        return index in self._tokens

    def fresh(self, event: Event) -> Event | None:
        """What is new in an event of the next group, if anything. Raises Differs."""
        known = self._tokens.get(event.index)
        if known is None or isinstance(event, Failed):
            return event
        ids = [*event.token_ids] if isinstance(event, Token) else []
        count = min(len(ids), len(known))
        if not isinstance(event, Token) or ids[:count] != known[:count]:
            raise Differs
        self._tokens[event.index] = known[count:]
        if count == len(known):
            del self._tokens[event.index]
        if count == len(ids):
            return None
        scores = event.logprobs[count:] if event.logprobs else event.logprobs
        return replace(event, token_ids=ids[count:], logprobs=scores, prompt_logprobs=None)
