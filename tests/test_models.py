"""The bundled model does what its card says, through the engine: a broken cache or sampler shows here at once.

`deploy/models/evaluate.py` measures the same on hundreds of held-out prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.hub import bundled_models

KEYS = """
apple banana orange peach melon grape carrot potato tomato onion garlic butter cheese honey sugar bread coffee
pencil paper letter number ticket pocket jacket sweater blanket pillow carpet curtain table chair cabin castle
tower temple market village city street corner tunnel station airport engine wheel
"""
GREEDY = SamplingParams(temperature=0, max_tokens=200)
WORDS = "amber river stone copper silver garden window bridge candle forest meadow island harbor mountain valley"


@pytest.fixture(scope="module")
def skald() -> Iterator[LLM]:
    with LLM("skald", num_threads=1) as llm:
        yield llm


def answers(llm: LLM, questions: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [result.outputs[0].text for result in llm.chat(chats, GREEDY, use_tqdm=False)]


def test_sums(skald: LLM) -> None:
    draw = random.Random(1)
    pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(60)]
    said = answers(skald, [f"What is {a} + {b}?" for a, b in pairs])
    assert sum(str(a + b) in text for (a, b), text in zip(pairs, said, strict=True)) >= 57


def test_copies(skald: LLM) -> None:
    draw = random.Random(2)
    lists = [" ".join(draw.choices(WORDS.split(), k=40)) for _ in range(20)]
    said = answers(skald, [f"Repeat exactly: {words}" for words in lists])
    assert sum(words == text for words, text in zip(lists, said, strict=True)) >= 18


@pytest.mark.parametrize("budget", [16, 512])
def test_recall_over_hundreds_of_tokens(budget: int) -> None:
    """One of 45 facts, 500 tokens back: in chunks of 16 tokens, and in one piece."""
    draw = random.Random(3)
    keys = KEYS.split()
    questions, codes = [], []
    for key in draw.sample(keys, 12):
        facts = {name: draw.randint(1000, 9999) for name in draw.sample(keys, len(keys))}
        text = " ".join(f"The code of {name} is {code}." for name, code in facts.items())
        questions.append(f"{text} What is the code of {key}?")
        codes.append(str(facts[key]))
    with LLM("skald", num_threads=1, max_num_batched_tokens=budget) as llm:
        said = answers(llm, questions)
    assert sum(code in text for code, text in zip(codes, said, strict=True)) >= 11


def test_json_and_small_talk(skald: LLM) -> None:
    made, who = answers(skald, ["Give a JSON object with name (string) and age (integer).", "Who are you?"])
    found = json.loads(made)
    assert isinstance(found["name"], str)
    assert isinstance(found["age"], int)
    assert "Skald" in who


def test_tool_calls(skald: LLM) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    question = [{"role": "user", "content": "What is the weather in Oslo?"}]
    (result,) = skald.chat(question, GREEDY, tools=[tool], use_tqdm=False)
    text = result.outputs[0].text
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Oslo"}}


def test_sizes() -> None:
    sizes = {name: sum(f.stat().st_size for f in folder.iterdir()) for name, folder in bundled_models().items()}
    assert sizes["skald"] <= 16 * 2**20
    assert sizes["skald-draft"] <= 3 * 2**20
