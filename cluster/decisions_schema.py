"""Bodies of /v1/decisions: questions about a text or a conversation, each with the answers that it may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.described import Check
from kvasir.cluster.foreign_fields import foreign_constraints
from kvasir.cluster.openai_fields import CHAT_HONOURED, Neutral, later, string
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.responses_items import input_items, messages, unread
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]
MAX_QUESTIONS = 400
MAX_CHOICES = 256
TYPES = ("predicate", "choice", "score")
_YES_NO = (("Yes", True), ("No", False))
HONOURED: dict[str, Check] = {
    "model": string,
    "input": later,
    "instructions": string,
    "questions": CHAT_HONOURED["messages"],
    "prompt_cache_key": string,
    **{name: CHAT_HONOURED[name] for name in ("cache_salt", "chat_template_kwargs", "priority", "request_id")},
    "service_tier": CHAT_HONOURED["service_tier"],
    "return_timing": CHAT_HONOURED["return_timing"],
}
IGNORED: Neutral = {"safety_identifier": (), "prompt_cache_options": ({},), "prompt_cache_retention": (), "user": ()}
REFUSED: Neutral = {**foreign_constraints({*HONOURED, *IGNORED}), "images": ([],), "stream": (False,)}
_QUESTION: dict[str, Check] = {
    "type": later, "name": string, "instructions": string, "choices": later, "levels": later,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, and what may be answered: the texts among which the model's probability is shared out."""

    kind: str
    name: str | None
    text: str
    """What the model reads."""
    answers: Sequence[tuple[str, Any]]
    """(text, the value that it stands for)"""
    labels: Sequence[str | None] = ()
    """Of a score's levels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionAsk:
    """A body understood."""

    model: str
    messages: Sequence[Json]
    questions: Sequence[Question]
    fields: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def parse_decisions(body: Mapping[str, Any]) -> DecisionAsk:
    """Body of POST /v1/decisions. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, HONOURED, IGNORED, REFUSED)
    given = fields.get("questions")
    if not given or len(given) > MAX_QUESTIONS:
        count = len(given or ())
        raise ClientError(f"questions must hold 1 to {MAX_QUESTIONS} questions, got {count}", param="questions")
    return DecisionAsk(
        model=fields.get("model", ""),
        messages=messages(input_items(fields.get("input")), fields.get("instructions")),
        questions=[_question(one, f"questions[{number}]") for number, one in enumerate(given)],
        fields=fields,
        warnings=(*warnings, *unread(fields.get("input"))),
    )


def _question(given: Mapping[str, Any], at: str) -> Question:
    try:
        fields, unknown = sort_fields(given, _QUESTION, {}, {})
    except ClientError as error:
        raise ClientError(f"{at}.{error.message}", param="questions") from error
    if unknown:
        raise UnsupportedError(f"{at}.{unknown[0]:.60} isn't supported", param="questions")
    kind, instructions = fields.get("type"), fields.get("instructions", "").strip()
    if kind not in TYPES:
        raise ClientError(f"{at}.type must be {', '.join(TYPES)}; got {kind!r:.60}", param="questions")
    if not instructions:
        raise ClientError(f"{at}.instructions must say what is asked", param="questions")
    for name, of in (("choices", "choice"), ("levels", "score")):
        if name in fields and kind != of:
            raise ClientError(f"{at}.{name} is for questions of type {of}", param="questions")
    labels: Sequence[str | None] = ()
    if kind == "predicate":
        answers: Sequence[tuple[str, Any]] = _YES_NO
        text = f"{instructions}\nAnswer with Yes or No, and nothing else."
    elif kind == "choice":
        answers = [
            _choice(one, f"{at}.choices[{n}]") for n, one in enumerate(_list(fields.get("choices"), f"{at}.choices"))
        ]
        text = f"{instructions}\nAnswer with one of these, and nothing else:\n{_lines(answers)}"
    else:
        levels = [
            _level(one, n, f"{at}.levels[{n}]") for n, one in enumerate(_list(fields.get("levels"), f"{at}.levels"))
        ]
        answers, labels = [(number, value) for number, value, _ in levels], [label for _, _, label in levels]
        shown = "\n".join(f"- {number}" + (f": {label}" if label else "") for number, _, label in levels)
        text = f"{instructions}\nAnswer with one of these numbers, and nothing else:\n{shown}"
    if len({text for text, _ in answers}) != len(answers):
        raise ClientError(f"{at}: two answers are the same", param="questions")
    return Question(kind=kind, name=fields.get("name"), text=text, answers=answers, labels=labels)


def _list(given: Any, at: str) -> list[Any]:
    if not isinstance(given, list) or not 2 <= len(given) <= MAX_CHOICES:
        raise ClientError(f"{at} must be a list of 2 to {MAX_CHOICES}, got {given!r:.60}", param="questions")
    return given


def _choice(given: Any, at: str) -> tuple[str, Any]:
    value = given.get("value") if isinstance(given, dict) else given
    if isinstance(given, dict) and (other := [name for name in given if name != "value"]):
        raise UnsupportedError(f"{at}.{other[0]:.60} isn't supported", param="questions")
    if isinstance(value, bool):
        return ("Yes" if value else "No"), value
    if not isinstance(value, str) or not value.strip():
        raise ClientError(
            f"{at}.value must be a text that isn't empty, or true or false; got {value!r:.60}", param="questions"
        )
    return value.strip(), value


def _level(given: Any, number: int, at: str) -> tuple[str, float, str | None]:
    """(what the model writes, value, label): a number, a label, or an object with both."""
    fields = given if isinstance(given, dict) else {"label": given} if isinstance(given, str) else {"value": given}
    if other := [name for name in fields if name not in ("value", "label")]:
        raise UnsupportedError(f"{at}.{other[0]:.60} isn't supported", param="questions")
    value, label = fields.get("value", number), fields.get("label")
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not (label is None or isinstance(label, str))
    ):
        raise ClientError(
            f"{at} must be a number, a label, or both by value and label; got {given!r:.60}", param="questions"
        )
    return _digits(value), value, label


def _digits(value: float) -> str:
    """All of them, and no more."""
    return str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)


def _lines(answers: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f"- {text}" for text, _ in answers)
