"""POST /v1/systemone, as System One models have it: decisions in other words. A `noul` is a predicate, the `criteria` of a
choice or a score are its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from kvasir.cluster import decisions_schema
from kvasir.cluster.caller import Answer, Caller
from kvasir.cluster.decisions_api import decided
from kvasir.cluster.decisions_schema import MAX_CHOICES, MAX_QUESTIONS, DecisionAsk, Question
from kvasir.cluster.desk import Desk
from kvasir.cluster.foreign_fields import foreign_constraints
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_json, until_gone, warning_header
from kvasir.cluster.ollama_fields import keep_alive
from kvasir.cluster.openai_fields import Check, Neutral, later
from kvasir.cluster.openai_schema import sort_fields
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]
TYPES = ("noul", "choice", "score")
HONOURED: dict[str, Check] = {
    **{name: check for name, check in decisions_schema.HONOURED.items() if name not in ("input", "questions")},
    "instructions": later,
    "state": later,
    "questions": later,
    "keep_alive": keep_alive,
}
REFUSED: Neutral = {
    **foreign_constraints({*HONOURED, *decisions_schema.IGNORED}),
    **dict.fromkeys(("images", "audio", "videos"), ([],)),
    "stream": (False,),
}
_QUESTION: dict[str, Check] = dict.fromkeys(("type", "instructions", "criteria"), later)
_TRUTH = (("true", "Yes"), ("false", "No"))


class SystemOne:
    """The route, an ASGI application by itself."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_system_one(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id = request_id_of(scope, headers, ask.fields.get("request_id"))
        caller = Caller(principal=scope["state"]["principal"], request_id=request_id, headers=headers)
        await until_gone(receive, self._answer(ask, caller, send))

    async def _answer(self, ask: DecisionAsk, caller: Caller, send: Send) -> None:
        answer = await decided(self._desk, ask, caller)
        timing = [answer.timing.header()] if answer.timing else []
        await send_json(send, 200, _body(answer), [*timing, *warning_header(answer.warnings)])


def parse_system_one(body: Mapping[str, Any]) -> DecisionAsk:
    """Its questions are named by their ids. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, HONOURED, decisions_schema.IGNORED, REFUSED)
    if "state" not in fields:
        raise ClientError("state must be a text, an object or a list: what the questions are about", param="state")
    given = fields.get("questions")
    if not isinstance(given, dict) or not 1 <= len(given) <= MAX_QUESTIONS:
        text = f"questions must be an object of 1 to {MAX_QUESTIONS} questions by their names"
        raise ClientError(f"{text}, got {given!r:.60}", param="questions")
    said = [{"role": "user", "content": _text(fields["state"], "state")}]
    if "instructions" in fields:
        said.insert(0, {"role": "system", "content": _text(fields["instructions"], "instructions")})
    return DecisionAsk(
        model=fields.get("model", ""),
        messages=said,
        questions=[_question(name, one, f"questions.{name:.60}") for name, one in given.items()],
        fields=fields,
        warnings=(*warnings, *(("keep_alive",) if "keep_alive" in fields else ())),
    )


def _text(given: Any, at: str) -> str:
    """Of a text, or of what is said as JSON."""
    if isinstance(given, str):
        return given
    if not isinstance(given, (dict, list)):
        raise ClientError(f"{at} must be a text, an object or a list, got {given!r:.60}", param=at.partition(".")[0])
    try:
        return orjson.dumps(given).decode()
    except TypeError as error:  # its message speaks of recursion
        raise ClientError(f"{at} is nested too deeply", param=at.partition(".")[0]) from error


def _question(name: str, given: Any, at: str) -> Question:
    if not isinstance(given, dict):
        raise ClientError(f"{at} must be an object with type and instructions, got {given!r:.60}", param="questions")
    fields, unknown = sort_fields(given, _QUESTION, {}, {})
    if unknown:
        raise UnsupportedError(f"{at}.{unknown[0]:.60} isn't supported", param="questions")
    kind, criteria = fields.get("type"), fields.get("criteria")
    if kind not in TYPES:
        raise ClientError(f"{at}.type must be {', '.join(TYPES)}; got {kind!r:.60}", param="questions")
    instructions = _text(fields.get("instructions", ""), f"{at}.instructions").strip()
    if not instructions:
        raise ClientError(f"{at}.instructions must say what is asked", param="questions")
    if kind == "noul":
        return _noul(name, instructions, criteria, at)
    return (_choice if kind == "choice" else _score)(name, instructions, criteria, at)


def _noul(name: str, instructions: str, criteria: Any, at: str) -> Question:
    given = {} if criteria is None else criteria
    if not isinstance(given, dict) or not given.keys() <= dict(_TRUTH).keys():
        text = f"{at}.criteria must say what true and false mean"
        raise ClientError(f"{text}, got {criteria!r:.60}", param="questions")
    meant = [_line(word, given[key], f"{at}.criteria.{key}") for key, word in _TRUTH if given.get(key) is not None]
    text = "\n".join([instructions, *meant, "Answer with Yes or No, and nothing else."])
    return Question(kind="predicate", name=name, text=text, answers=(("Yes", True), ("No", False)))


def _choice(name: str, instructions: str, criteria: Any, at: str) -> Question:
    if not isinstance(criteria, dict) or not 2 <= len(criteria) <= MAX_CHOICES or not all(map(str.strip, criteria)):
        text = f"{at}.criteria must be an object of 2 to {MAX_CHOICES} labels, each with what it means or null"
        raise ClientError(f"{text}, got {criteria!r:.60}", param="questions")
    labels = [label.strip() for label in criteria]
    if len({*labels}) < len(labels):
        raise ClientError(f"{at}: two answers are the same", param="questions")
    shown = [_line(label.strip(), told, f"{at}.criteria.{label:.60}") for label, told in criteria.items()]
    text = "\n".join([instructions, "Answer with one of these, and nothing else:", *shown])
    return Question(kind="choice", name=name, text=text, answers=[(label.strip(), label) for label in criteria])


def _score(name: str, instructions: str, criteria: Any, at: str) -> Question:
    if not isinstance(criteria, list) or not 2 <= len(criteria) <= MAX_CHOICES:
        text = f"{at}.criteria must be a list of 2 to {MAX_CHOICES} levels, the lowest first"
        raise ClientError(f"{text}, got {criteria!r:.60}", param="questions")
    levels = [_text(level, f"{at}.criteria[{number}]") for number, level in enumerate(criteria)]
    shown = [f"- {number}: {level}" for number, level in enumerate(levels)]
    text = "\n".join([instructions, "Answer with one of these numbers, and nothing else:", *shown])
    answers = [(str(number), number) for number in range(len(levels))]
    return Question(kind="score", name=name, text=text, answers=answers, labels=levels)


def _line(answer: str, told: Any, at: str) -> str:
    return f"- {answer}" + (f": {_text(told, at)}" if told is not None else "")


def _body(answer: Answer) -> Json:
    body = answer.body
    usage = {name: body["usage"][name] for name in ("input_tokens", "output_tokens")}
    answers = {one["name"]: _told(one) for one in body["answers"]}
    timing = {"timing": body["timing"]} if "timing" in body else {}
    return {"model": body["model"], "answers": answers, "usage": usage, **timing}


def _told(one: Json) -> Json:
    if one["type"] == "predicate":
        return {"type": "noul", "noul": one["probability"]}
    shares, kind = one["probabilities"], one["type"]
    found: Json = {"type": kind, kind: one[kind], "confidence": _confidence(one["confidence"], len(shares))}
    if kind == "score":
        found["legend"] = {str(share["value"]): share["label"] for share in shares}
    return found | {"probabilities": {str(share["value"]): share["probability"] for share in shares}}


def _confidence(most: float, count: int) -> float:
    """0 where all answers are as likely, 1 where there is but one."""
    return max(0.0, (most - 1 / count) / (1 - 1 / count))
