"""Many answers to many questions: none is lost between portions, and a call leaves room for others."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import httpx
import pytest

from kvasir.cluster.decisions_api import ANSWERS_AT_ONCE, decide
from kvasir.cluster.decisions_schema import MAX_CHOICES, parse_decisions
from kvasir.cluster.tool_formats import taught_thoughts, taught_tools
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import OverloadedError, UnavailableError, UnsupportedError

END = 1000
PLAIN = (
    "{% for m in messages %}{{ 'Quest' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


class Model:
    """Reads a character as a token."""

    name, tools, thoughts = "m", None, None

    def __init__(self, source=PLAIN, eos=chr(END)):
        self.templates = ChatTemplates({"default": source}, {"eos_token": eos, "bos_token": "<s>"})
        self.rendered = 0

    async def render(self, conversation):
        self.rendered += 1
        asked = conversation.add_generation_prompt
        variables = dict(conversation.variables)
        return self.templates.render(conversation.messages, add_generation_prompt=asked, variables=variables)

    async def encode(self, prompt):
        return [ord(one) for one in prompt.text]

    def need_tokenizer(self, what):
        return SimpleNamespace(encode=lambda text, add_special_tokens: [ord(one) for one in text])


class Desk:
    """A token's log probability is its number / -100. `refuse_at`: that call to `begin` fails."""

    def __init__(self, refuse_at=None, model=None):
        self.served = model or Model()
        self.running = self.peak = self.begun = 0
        self.refuse_at = refuse_at
        self.portions, self.calls = [], []

    def model(self, name):
        return self.served

    def info(self, model):
        return SimpleNamespace(eos_token_ids=[END])

    async def begin(self, call, request_id, headers):
        self.begun += 1
        if self.begun == self.refuse_at:
            raise OverloadedError("full")
        self.portions.append(request_id)
        self.calls.append(call)
        self.running += len(call.prompts)
        self.peak = max(self.peak, self.running)
        return Generation(call.prompts)

    begin_next = begin

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
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 60)

    asyncio.run(run())
    assert desk.running == 0


BEHIND = {
    "llama.cpp/llama-cpp-deepseek-r1.jinja": "<｜Assistant｜>",
    "llama.cpp/MiniMax-M2.jinja": "]~b]ai\n",
    "llama.cpp/StepFun3.5-Flash.jinja": "assistant\n<think>\n\n</think>\n",
    "llama.cpp/Apriel-1.6-15b-Thinker-fixed.jinja": "<|begin_assistant|>\n",
    "llama.cpp/openai-gpt-oss-120b.jinja": "<|start|>assistant<|channel|>final<|message|>",
    "llama.cpp/CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja": "<|START_RESPONSE|>",
    "llama.cpp/Qwen-QwQ-32B.jinja": "<think>\n</think>",
    "llama.cpp/GLM-4.6.jinja": "<think></think>\n",
    "llama.cpp/google-gemma-4-31B-it.jinja": "model\n<|channel>thought\n<channel|>",
}
"""Template -> where an answer without thoughts stands."""


@pytest.mark.parametrize(("file", "behind"), BEHIND.items())
def test_answers_stand_where_the_model_writes_them(data, file, behind):
    """Neither in thoughts that the prompt begins, nor where a channel is to be chosen."""
    source = (data("chat-templates") / file).read_text()
    model = Model(source)
    model.tools, model.thoughts = taught_tools([source]), taught_thoughts([source])
    desk = Desk(model=model)
    asyncio.run(decide(desk, parse_decisions({"input": "a", "questions": [QUESTION]}), "r", {}))
    (call,) = desk.calls
    texts = ["".join(map(chr, ids)) for ids in call.prompts]
    start = call.sampling["prompt_logprob_start"]
    assert [text[start:].rstrip(chr(END)) for text in texts] == ["Yes", "No"]
    assert all(text[:start].endswith(behind) for text in texts), texts[0][start - 60 : start]


QUESTION = {"type": "predicate", "instructions": "Is it?"}


def test_the_space_in_front_of_an_answer_belongs_to_it():
    model = Model("{% for m in messages %}{{ 'Q:' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}")
    desk = Desk(model=model)
    asyncio.run(decide(desk, parse_decisions({"input": "a", "questions": [QUESTION] * 20}), "r", {}))
    call = desk.calls[0]
    assert ["".join(map(chr, ids)) for ids in call.prompts] == [f"Q: Yes{chr(END)}", f"Q: No{chr(END)}"]
    assert call.sampling["prompt_logprob_start"] == 2
    assert model.rendered == 20 + 2  # each question once


def test_a_template_that_hides_answers_is_refused():
    desk = Desk(model=Model("{{ messages[0].content }}:"))
    with pytest.raises(UnsupportedError, match="doesn't show what the model answered"):
        asyncio.run(decide(desk, parse_decisions({"input": "a", "questions": [QUESTION]}), "r", {}))


def test_levels_keep_their_digits():
    levels = [1234567, 1234568.0, 0.123456789, -2, 2.5, 1e-7]
    question = {"type": "score", "instructions": "How much?", "levels": levels}
    (found,) = parse_decisions({"input": "a", "questions": [question]}).questions
    assert [text for text, _ in found.answers] == ["1234567", "1234568", "0.123456789", "-2", "2.5", "1e-07"]
    assert "- 1234568\n" in found.text


def test_what_has_begun_outlives_drains(gateway, monkeypatch):
    """Of this gateway, and of the only group, until there is another one."""
    monkeypatch.setattr(gateway.desk, "_failover_timeout_s", 20.0)
    info, misses = gateway.desk.info, [1, 2, 3]

    def found(model):
        if gateway.group.requests and misses:
            misses.pop()
            raise UnavailableError("the group is draining")
        return info(model)

    def script(request, index):
        gateway.desk.draining = True
        return b"x"

    monkeypatch.setattr(gateway.desk, "draining", False)
    monkeypatch.setattr(gateway.desk, "info", found)
    monkeypatch.setattr(gateway.group, "script", script)
    body = {"input": "a", "questions": [QUESTION] * 3}
    place = gateway.url + "/v1/decisions"
    assert [httpx.post(place, json=body, timeout=60).status_code for _ in "ab"] == [200, 503]
    assert len(gateway.group.requests) == 6
    assert not misses
    assert not gateway.desk.running


def test_ids(gateway):
    body = {"input": "a", "questions": [QUESTION], "request_id": "mine"}
    reply = httpx.post(gateway.url + "/v1/decisions", json=body, timeout=60)
    assert (reply.headers["x-request-id"], reply.json()["id"]) == ("mine", "dec_mine")
    assert reply.headers["server-timing"].startswith("queue;dur=")
    assert 'group;desc="group-1"' in reply.headers["server-timing"]
