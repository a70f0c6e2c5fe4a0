"""What a model says that only looks like a call stays text: nothing is dropped, nothing invented, however the answer is cut."""

from __future__ import annotations

import random
import re

import pytest
from grammar_walk import calls_of, read

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.tool_formats import TOOL_FORMATS

N = "]<]minimax[>["
SCHEMAS = {"f": {"type": "object", "properties": {"a": {"type": "string"}}}}
SHOWN = 'all\nTry this:\n>>> show(d)\n{"a": 1}\nDone.'
DSML = "<｜DSML｜tool_calls>no call here</｜DSML｜tool_calls> tail"
K3 = "<|open|>tools<|sep|>no call here<|close|>tools<|sep|> tail"
ATEM = '<atem:function_calls><atem:invoke name="f"></atem:invoke></atem:function_calls>'
COMMENTARY = "<|channel|>commentary<|message|>{}"
CALL = '{"tool_name": "f", "parameters": {}}'
TEXTS = [
    ("functionary_v32", None, SHOWN, SHOWN.removeprefix("all\n")),
    ("functionary_v32", None, 'f\n{"a": "1"}', 'f\n{"a": "1"}'),
    ("functionary_v32", None, ">>>all\nSay >>>all\ntwice", "Say >>>all\ntwice"),
    ("functionary_v32", SCHEMAS, SHOWN, SHOWN.removeprefix("all\n")),
    ("functionary_v32", SCHEMAS, 'g\n{"a": "1"}', 'g\n{"a": "1"}'),
    ("muse_glimmer", None, "Write the mail to=bob please", "Write the mail to=bob please"),
    ("muse_glimmer", None, "text first<|eom|><|start|>assistant to=user<|message|>Hi", "text firstHi"),
    ("muse_glimmer", None, " to=user<|message|>Hi<|start|>all over<|eot|>", "Hi<|start|>all over"),
    ("muse_glimmer", None, " to=two words<|message|>Hi", " to=two words<|message|>Hi"),
    ("muse_glimmer", SCHEMAS, " to=bob<|message|>no call here<|eot|>", " to=bob<|message|>no call here"),
    ("hy_v3", SCHEMAS, "<tool_calls>\nno call here</tool_calls> tail", "<tool_calls>\nno call here</tool_calls> tail"),
    ("deepseek_v4", SCHEMAS, DSML, DSML),
    ("minimax_m3", SCHEMAS, f"{N}<tool_call>no call{N}</tool_call> tail", f"{N}<tool_call>no call{N}</tool_call> tail"),
    ("kimi_k3", SCHEMAS, K3, "no call here tail"),
    ("solar_open", None, "Hello <|begin|>assistant lost text", "Hello  lost text"),
    ("solar_open", None, "Hello <|begin|>assistants<|end|> and all", "Hello assistants and all"),
    ("inkling", None, "Hello <|message_model|>lost text", "Hello lost text"),
    ("ernie45", SCHEMAS, "Use the <response> tag and </response>", "Use the <response> tag and </response>"),
    ("ernie45", SCHEMAS, "<response>Write </response> and <response> so.</response>\n", "Write </response> and <response> so.\n"),
    ("ernie45", SCHEMAS, "<response>no <tool_call>call", "no <tool_call>call"),
    ("openai", None, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
     "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"),
    ("openai", None, f"So.<|end|><|start|>assistant to=functions.f{COMMENTARY}<|call|>", "So.<|start|>assistant to=functions.f{}"),
    ("cohere", None, f"<|START_ACTION|>[{CALL}]<|END_ACTION|>", f"[{CALL}]"),
    ("muse_glimmer", None, f" to=f<|message|>{ATEM}<|eot|>", f" to=f<|message|>{ATEM}"),
    ("inkling", None, '<|content_invoke_tool_json|>{"name": "f", "args": {}}<|end_message|>', '{"name": "f", "args": {}}'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "schemas", "text", "content"), TEXTS)
def test_what_only_looks_like_a_call_stays_text(name, schemas, text, content):
    form = TOOL_FORMATS[name]
    whole = read(form, text, schemas)
    assert (whole.content, whole.reasoning, whole.calls) == (content, "", [])
    assert read(form, text, schemas, cuts=range(1, len(text))) == whole
    for at in range(len(text)):
        assert read(form, text, schemas, cuts=[at]) == whole, at


CALLED = [
    ("minimax_m3", f'{N}<tool_call>{N}<invoke name="f">{N}<a>a{N}<b>c{N}</b>d{N}</a>{N}</invoke>{N}</tool_call>',
     {"a": f"a{N}<b>c{N}</b>d"}, ""),
    ("muse_glimmer", f" to=f<|message|>{ATEM} told<|eom|><|start|>assistant to=user<|message|>Hi", {}, " toldHi"),
    ("ernie45", '<response>Hm.</response>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', {}, "Hm.\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "arguments", "content"), CALLED)
def test_what_stands_beside_and_inside_of_calls(name, text, arguments, content):
    form = TOOL_FORMATS[name]
    whole = read(form, text, SCHEMAS)
    assert (calls_of(whole), whole.content) == ([("f", arguments)], content)
    for at in range(len(text)):
        assert read(form, text, SCHEMAS, cuts=[at]) == whole, at


def test_text_without_a_head_is_streamed():
    """Muse Glimmer's, word by word."""
    reader = AnswerReader(TOOL_FORMATS["muse_glimmer"], None)
    assert [part.text for word in ("Once", " upon", " a") for part in reader.feed(word)] == ["Once", " upon", " a"]


def marks_of(form):
    """What stands in its calls, thoughts and answers, whole calls too."""
    found = {*form.begins, *form.inner, *form.call, *form.wrap, *form.befores, *form.answer}
    found.update(*form.blocks)
    arguments = '{"a": "b"}'
    if (style := form.arguments) is not None and style.texts == "nested":
        arguments = "".join((style.key[0], "a", style.key[1], "b", style.end, "a", style.again[1]))
        found.add(arguments)
    elif style is not None:
        arguments = "".join((style.key[0], "a", style.key[1], style.quote, "b", style.quote, style.end))
        found.update((arguments, style.key[0], style.key[1], style.end, *style.marks))
    found.update((f"{form.call[0]}{arguments}{form.call[1]}", f"{form.wrap[0]}{form.call[0]}{arguments}"))
    told = {mark.replace("NAME", "f").replace("{number}", "0").replace("{id}", "x") for mark in found}
    return sorted(mark for mark in told - {"<|constrain|>"} if mark.strip())


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_no_word_is_lost(name):
    """Words between marks of the format, in any order, with tools and without; in pieces the same."""
    form = TOOL_FORMATS[name]
    marks = marks_of(form)
    for seed in range(60):
        dice, words = random.Random(seed), iter(f"w{number}w" for number in range(9))
        pieces = [
            next(words) + dice.choice(["", " ", "\n"]) if dice.random() < 0.5 else dice.choice(marks)
            for _ in range(dice.randint(2, 8))
        ]
        text = "".join(pieces)
        for schemas in (None, SCHEMAS) if form.whole is not None else (SCHEMAS,):
            answer = read(form, text, schemas)
            assert read(form, text, schemas, cuts=range(1, len(text))) == answer, text
            assert schemas or not answer.calls, text
            calls = "".join(call.name + call.arguments for call in answer.calls)
            said = answer.content + answer.reasoning + calls
            assert [word for word in re.findall(r"w\dw", text) if word not in said] == [], text
