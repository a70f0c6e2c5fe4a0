"""What OpenAI's dialect knows and another one doesn't: a constraint isn't ignored only because it is said in a wrong place."""

from __future__ import annotations

from collections.abc import Collection

from kvasir.cluster.openai_fields import CHAT_HONOURED, CHAT_REFUSED, Neutral

_HARMLESS = frozenset({"model", "stream", "stream_options", "request_id", "priority", "return_token_ids",
                       "service_tier", "store", "metadata", "prompt_cache_key", "session_id"})  # fmt: skip
"""They change nothing about the text, or who may learn of it: where they aren't known a warning will do."""


def foreign_constraints(known: Collection[str]) -> Neutral:
    """Fields of OpenAI's chat body that would change the answer or keep tenants apart, but for those in `known`: name -> neutral
    values."""
    fields: Neutral = {**dict.fromkeys(CHAT_HONOURED, ()), **CHAT_REFUSED}
    return {name: neutral for name, neutral in fields.items() if name not in known and name not in _HARMLESS}
