"""Many answers to many questions: none is lost between portions, and a call leaves room for others."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest

from kvasir.cluster.decisions_api import ANSWERS_AT_ONCE, decide
from kvasir.cluster.decisions_schema import MAX_CHOICES, parse_decisions
from kvasir.engine.errors import OverloadedError

END = 1000


class Model:
    """Reads a character as a token."""

    name = "m"

    async def encode(self, conversation):
        return [0] * 5 if conversation.add_generation_prompt else [0, END]

    def need_tokenizer(self, what):
        return SimpleNamespace(encode=lambda text, add_special_tokens: [ord(one) for one in text])


class Desk:
    """A token's log probability is its number / -100. `refuse_at`: that call to `begin` fails."""

    def __init__(self, refuse_at=None):
        self.running = self.peak = self.begun = 0
        self.refuse_at = refuse_at
        self.portions = []

    def model(self, name):
        return Model()

    def info(self, model):
        return SimpleNamespace(eos_token_ids=[END])

    async def begin(self, call, request_id, headers):
        self.begun += 1
        if self.begun == self.refuse_at:
            raise OverloadedError("full")
        self.portions.append(request_id)
        self.running += len(call.prompts)
        self.peak = max(self.peak, self.running)
        return Generation(call.prompts)

    def end(self, generation):
        self.running -= len(generation.transcripts)


class Generation:
    def __init__(self, prompts):
        self.transcripts = [
            SimpleNamespace(prompt_logprobs=[SimpleNamespace(logprob=one / -100) for one in ids], cached_tokens=3)
            for ids in prompts
        ]

    async def __aiter__(self):
        for _ in range(3):
            await asyncio.sleep(0)
            yield None


def ask(questions):
    one = {"type": "choice", "instructions": "Which?", "choices": [f"c{n}" for n in range(MAX_CHOICES)]}
    few = {"type": "predicate", "instructions": "Is it?"}
    return parse_decisions({"model": "m", "input": "a", "questions": [one, few] * questions})


def test_answers_in_flight_are_bounded():
    desk = Desk()
    found = asyncio.run(decide(desk, ask(20), "r", {}))
    assert desk.running == 0
    assert ANSWERS_AT_ONCE // 2 < desk.peak <= ANSWERS_AT_ONCE
    assert len(set(desk.portions)) == len(desk.portions)
    weights = [math.exp(sum(map(ord, f"c{n}")) / -100) for n in range(MAX_CHOICES)]
    for answer in found["answers"][::2]:
        shares = [one["probability"] for one in answer["probabilities"]]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights])
        assert [one["value"] for one in answer["probabilities"]] == [f"c{n}" for n in range(MAX_CHOICES)]
    assert len(found["answers"]) == 40
    assert found["usage"]["input_tokens"] == 40 * 5
    assert found["usage"]["input_tokens_details"]["cached_tokens"] == 40 * 3


@pytest.mark.parametrize("at", [1, 2, 7, 30])
def test_a_refusal_ends_all_of_it(at):
    desk = Desk(refuse_at=at)

    async def run():
        with pytest.raises(OverloadedError):
            await decide(desk, ask(20), "r", {})
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 10)

    asyncio.run(run())
    assert desk.running == 0
