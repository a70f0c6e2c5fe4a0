"""POST /v1/decisions: what the model would answer, as probabilities. Nothing is drawn: each answer that may be given is
scored as the model's own, with the end of its turn, and the scores are shared out among them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from kvasir.cluster.call import Call, Conversation, Text, check_variables, thinking_variables
from kvasir.cluster.caller import Answer, Caller
from kvasir.cluster.decisions_schema import DecisionAsk, Question, parse_decisions
from kvasir.cluster.decisions_turn import Turn
from kvasir.cluster.desk import Desk
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_json, until_gone, warning_header
from kvasir.cluster.responses_reply import usage_json
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.service_fields import in_session, priority
from kvasir.cluster.timing import CallTiming
from kvasir.engine.errors import ClientError
from kvasir.engine.transcript import Usage

Json = dict[str, Any]
AT_ONCE = 16
"""Questions of one call that are scored at a time."""
ANSWERS_AT_ONCE = 128
"""And their answers, each of which is a request to an engine: a call mustn't fill its queue by itself."""
PORTION = 64
"""Of one question's answers, so that several questions share in them."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A question's answers."""

    probabilities: Sequence[float]
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


class _Seats:
    """Taken several at a time, by turns: nobody holds a part of what he needs while another does."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        held = 0
        try:
            async with self._turn:
                while held < count:
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()


class Decisions:
    """The route, an ASGI application by itself."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_decisions(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id = request_id_of(scope, headers, ask.fields.get("request_id"))
        caller = Caller(principal=scope["state"]["principal"], request_id=request_id, headers=headers)
        await until_gone(receive, self._answer(ask, caller, send))

    async def _answer(self, ask: DecisionAsk, caller: Caller, send: Send) -> None:
        answer = await decided(self._desk, ask, caller)
        timing = [answer.timing.header()] if answer.timing else []
        await send_json(send, 200, answer.body, [*timing, *warning_header(answer.warnings)])


async def decided(desk: Desk, ask: DecisionAsk, caller: Caller) -> Answer:
    """The whole answer, timed. Raises a KvasirError."""
    headers = in_session(caller.headers, ask.fields.get("prompt_cache_key", ""))
    began, timings = time.monotonic(), list[CallTiming]()
    with desk.work():
        body = await decide(desk, ask, caller.request_id, headers, timings, caller.deadline_s)
    timing = CallTiming.together(timings, total_s=time.monotonic() - began)
    if ask.fields.get("return_timing"):
        body["timing"] = timing.json()
    return Answer(body=body, warnings=ask.warnings, timing=timing)


async def decide(
    desk: Desk,
    ask: DecisionAsk,
    request_id: str,
    headers: Mapping[str, str],
    timings: list[CallTiming] | None = None,
    deadline_s: float | None = None,
) -> Json:
    """The whole answer. Raises a KvasirError. Where the time went is added to `timings`."""
    ends = None if deadline_s is None else time.monotonic() + deadline_s
    model = desk.model(ask.model)
    room, seats = asyncio.Semaphore(AT_ONCE), _Seats(ANSWERS_AT_ONCE)
    turn = await Turn.of(model, _asked(ask, ask.questions[0]), desk.info(model).eos_token_ids)
    scoring = _Scoring(desk, model, ask, headers, seats, turn, timings, ends)

    async def one(number: int) -> Scored:
        async with room:
            return await scoring.score(ask.questions[number], f"{request_id}-{number}", begun=number > 0)

    first = await one(0)  # alone: the others find what they have in common in the cache
    tasks = [asyncio.ensure_future(one(number)) for number in range(1, len(ask.questions))]
    try:
        scored = [first, *(await asyncio.gather(*tasks))]
    finally:
        for task in tasks:
            task.cancel()
    return {
        "id": f"dec_{request_id}",
        "object": "decision",
        "created_at": int(time.time()),
        "model": model.name,
        "answers": [_told(question, found) for question, found in zip(ask.questions, scored, strict=True)],
        "usage": _usage(scored),
    }


@dataclass(frozen=True, slots=True)
class _Scoring:
    """Scores questions."""

    desk: Desk
    model: ServedModel
    ask: DecisionAsk
    headers: Mapping[str, str]
    seats: _Seats
    turn: Turn
    timings: list[CallTiming] | None
    ends: float | None
    """When it has to be done, by the monotonic clock."""

    async def score(self, question: Question, request_id: str, *, begun: bool) -> Scored:
        """The answers, each as a prompt's end. begun: others were asked before."""
        before = await self.turn.before(self.model, _asked(self.ask, question))
        prompt = await self.model.encode(Text(text=before.rstrip(" "), add_special_tokens=False))
        texts = [text for text, _ in question.answers]
        answers = self.turn.answers(self.model.need_tokenizer("questions"), before, texts)
        if any(len(ids) == len(self.turn.end) for ids in answers):
            raise ClientError("an answer has no tokens", param="questions")
        totals, cached = [], 0
        for start in range(0, len(answers), PORTION):
            portion = answers[start : start + PORTION]
            async with self.seats.taken(len(portion)):
                found, known = await self._totals(prompt, portion, f"{request_id}-{start}", begun or start > 0)
            totals += found
            cached = cached if start else known  # later ones find what the first ones have left
        return Scored(_shares(totals), len(prompt), min(cached, len(prompt)), sum(map(len, answers)))

    async def _totals(
        self, prompt: Sequence[int], answers: Sequence[Sequence[int]], request_id: str, begun: bool
    ) -> tuple[list[float], int]:
        """(each answer's log probability, tokens that were in the cache)."""
        call = Call(
            model=self.ask.model,
            prompts=[[*prompt, *ids] for ids in answers],
            sampling={
                "prompt_logprobs": 0,
                "prompt_logprob_start": len(prompt),
                "max_tokens": 1,
                "temperature": 0.0,
                "n": 1,
            },
            priority=priority(self.ask.fields),
            cache_salt=self.ask.fields.get("cache_salt", ""),
            deadline_s=None if self.ends is None else max(0.0, self.ends - time.monotonic()),
        )
        begin = self.desk.begin_next if begun else self.desk.begin
        generation = await begin(call, request_id, self.headers)
        try:
            async for _ in generation:
                pass
            totals = [_total(t.prompt_logprobs, len(prompt)) for t in generation.transcripts]
            cached = max(transcript.cached_tokens for transcript in generation.transcripts)
            if self.timings is not None:
                self.timings.append(generation.timing)
        finally:
            self.desk.end(generation)
        return totals, cached


def _asked(ask: DecisionAsk, question: Question) -> Conversation:
    """The conversation with the question as the user's last words, to be answered without thoughts."""
    said = [dict(message) for message in ask.messages]
    last = said[-1] if said else None
    if last is not None and last["role"] == "user":
        last["content"] = f"{last['content']}\n\n{question.text}"
    else:
        said.append({"role": "user", "content": question.text})
    variables = ask.fields.get("chat_template_kwargs", {})
    check_variables(variables, "chat_template_kwargs")
    return Conversation(messages=said, variables={**thinking_variables("none"), **variables})


def _total(scores: Sequence[Any] | None, start: int) -> float:
    """Log probability of the tokens from `start` on."""
    return math.fsum(score.logprob for score in (scores or ())[start:] if score is not None)


def _shares(totals: Sequence[float]) -> list[float]:
    best = max(totals)
    weights = [math.exp(total - best) for total in totals]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]


def _told(question: Question, scored: Scored) -> Json:
    """An answer in the shape of its question."""
    named = {"type": question.kind, "name": question.name, "refusal": None}
    shares, values = scored.probabilities, [value for _, value in question.answers]
    if question.kind == "predicate":
        return {**named, "probability": shares[0]}
    likeliest = max(range(len(shares)), key=shares.__getitem__)
    confidence = {"confidence": shares[likeliest]}
    if question.kind == "choice":
        found = [{"value": value, "probability": share} for value, share in zip(values, shares, strict=True)]
        return {**named, "choice": values[likeliest], **confidence, "probabilities": found}
    found = [
        {"value": value, "label": label, "probability": share}
        for value, label, share in zip(values, question.labels, shares, strict=True)
    ]
    mean = math.fsum(value * share for value, share in zip(values, shares, strict=True))
    return {**named, "score": mean, **confidence, "probabilities": found}


def _usage(scored: Sequence[Scored]) -> Json:
    read, cached, written = (
        sum(getattr(one, name) for one in scored) for name in ("prompt_tokens", "cached_tokens", "answer_tokens")
    )
    return usage_json(Usage(read, cached, written), 0)
