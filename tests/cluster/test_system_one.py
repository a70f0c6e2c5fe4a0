"""System One's words for decisions."""

from __future__ import annotations

import functools

import httpx
import pytest

from kvasir.cluster.system_one import parse_system_one
from kvasir.engine.errors import ClientError

NOUL = {"type": "noul", "instructions": "She is angry.", "criteria": {"true": "She says so."}}
CHOICE = {"type": "choice", "instructions": "What is it?", "criteria": {"refund": "money back", "help": None}}
SCORE = {"type": "score", "instructions": {"ask": "How urgent?"}, "criteria": ["calm", {"level": "angry"}]}


def ask(**fields):
    return parse_system_one({"state": "Ann waits.", "questions": {"q": NOUL}, **fields})


def test_questions_in_our_words():
    found = ask(questions={"a": NOUL, "b": CHOICE, "c": SCORE}, instructions="Be fair.", keep_alive="5m")
    assert [message["role"] for message in found.messages] == ["system", "user"]
    assert [(one.name, one.kind, list(one.answers)) for one in found.questions] == [
        ("a", "predicate", [("Yes", True), ("No", False)]),
        ("b", "choice", [("refund", "refund"), ("help", "help")]),
        ("c", "score", [("0", 0), ("1", 1)]),
    ]
    assert "- Yes: She says so.\n" in found.questions[0].text
    assert "- refund: money back\n- help" in found.questions[1].text
    assert '{"ask":"How urgent?"}' in found.questions[2].text
    assert found.questions[2].labels == ["calm", '{"level":"angry"}']
    assert found.warnings == ("keep_alive",)
    assert ask(state={"mood": ["grim"]}).messages[-1]["content"] == '{"mood":["grim"]}'


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"state": None}, "state", "state must be"),
        ({"state": 5}, "state", "state must be"),
        ({"state": functools.reduce(lambda inner, _: [inner], range(500), [])}, "state", "nested too deeply"),
        ({"questions": []}, "questions", "1 to 400"),
        ({"questions": {"q": {"type": "noul"}}}, "questions", "questions.q.instructions"),
        ({"questions": {"q": {**NOUL, "type": "vote"}}}, "questions", "questions.q.type"),
        ({"questions": {"q": {**NOUL, "criteria": {"maybe": "x"}}}}, "questions", "questions.q.criteria"),
        ({"questions": {"q": {**NOUL, "weight": 2}}}, "questions", "questions.q.weight isn't supported"),
        ({"questions": {"q": {**CHOICE, "criteria": {"one": None}}}}, "questions", "2 to 256"),
        ({"questions": {"q": {**CHOICE, "criteria": {"a": None, " a": None}}}}, "questions", "the same"),
        ({"questions": {"q": {**SCORE, "criteria": {"a": 1}}}}, "questions", "2 to 256"),
        ({"images": ["x"]}, "images", "images isn't supported"),
        ({"videos": ["x"]}, "videos", "videos isn't supported"),
        ({"temperature": 0.5}, "temperature", "temperature isn't supported"),
    ],
)  # fmt: skip
def test_what_is_refused(fields, param, said):
    with pytest.raises(ClientError, match=said) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_answers_in_theirs(gateway):
    body = {"model": "bytes", "state": "Ann waits.", "questions": {"a": NOUL, "b": CHOICE, "c": SCORE}}
    reply = httpx.post(gateway.url + "/v1/systemone", json={**body, "colour": "red"}, timeout=60)
    assert reply.headers["x-kvasir-warning"] == "ignored: colour"
    found = reply.json()
    assert found.keys() == {"model", "answers", "usage"}
    assert found["usage"].keys() == {"input_tokens", "output_tokens"}
    a, b, c = (found["answers"][name] for name in "abc")
    assert a == {"type": "noul", "noul": pytest.approx(a["noul"])}
    assert 0 <= a["noul"] <= 1
    assert (b["type"], b["choice"] in b["probabilities"], b["probabilities"].keys()) == (
        "choice",
        True,
        {"refund", "help"},
    )
    assert (c["type"], c["legend"]) == ("score", {"0": "calm", "1": '{"level":"angry"}'})
    assert c["score"] == pytest.approx(c["probabilities"]["1"])
    for one in (b, c):
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["confidence"] == pytest.approx(2 * max(one["probabilities"].values()) - 1)
