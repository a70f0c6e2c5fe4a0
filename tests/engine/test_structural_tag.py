"""Structural tags: grammars in them, and nothing in them is overlooked."""

from __future__ import annotations

import contextlib
import re

import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.request import StructuredOutput
from kvasir.engine.structural_tag import _FIELDS, tag_grammar

TAG = {"begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}


@pytest.mark.parametrize("grammar", ['root ::= "x" [0-9]+ "}"', 'start: "x" /[0-9]+/ "}"\n%ignore " "\n'])
def test_a_grammar_in_a_tag(grammar):
    """As xgrammar has it, and in Lark: what it ignores is ignored in it alone."""
    form = {"type": "tag", "begin": "<g> ", "content": {"type": "grammar", "grammar": grammar}, "end": "</g>"}
    text = grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for said, holds in (("<g> x12}</g>", True), ("<g> x}</g>", False), ("<g>x12}</g>", False), ("<g> x12</g>", False)):
        ids, one = list(said.encode()), matcher.deep_copy()
        assert (one.try_consume_tokens(ids) == len(ids) and one.is_accepting()) is holds, said


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ({"type": "regex", "pattern": "a", "excludes": ["b"]}, "excludes of regex"),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "style of json_schema"),
        ({"type": "triggered_tags", "triggers": ["<a"], "tags": [{**TAG, "x": 1}]}, "x of tag"),
        ({"type": "tags_with_separator", "tags": [{**TAG, "x": 1}], "separator": ","}, "x of tag"),
        ({**TAG, "type": "tag", "max": 3}, "max of tag"), ({**TAG, "type": "tag", "end": ["a", 1]}, "end must be a text"),
    ],
)  # fmt: skip
def test_fields_that_would_change_something_are_refused_by_name(form, word):
    with pytest.raises(ClientError, match=word):
        grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"format": {"type": "any_text"}, "begin": "a"}, "begin of a structural tag"),
        ({"structures": [{"begin": "<a>", "end": "", "x": 1}], "triggers": ["<a"]}, "x of structures"),
        ({"structures": [{"begin": "<a>", "end": ""}, "b"], "triggers": ["<a"]}, "tags must be objects, got 'b'"),
    ],
)
def test_so_are_those_around_them(spec, word):
    with pytest.raises(ClientError, match=word):
        grammar_text(StructuredOutput(structural_tag=spec), {})


def test_fields_that_say_nothing_pass():
    form = {"type": "or", "elements": [
        {"type": "any_text", "excludes": []},
        {"type": "json_schema", "json_schema": {}, "style": "json", "any_order": False},
    ]}  # fmt: skip
    assert "%json" in grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})


@pytest.mark.parametrize(
    ("option", "name"), [("temperature=0.5", "temperature"), ('stop="b"', "stop"), ('lazy, stop = "b"', "stop")]
)
def test_what_a_lark_rule_asks_of_a_sampler_is_refused(option, name):
    with pytest.raises(UnsupportedError, match=f"line 2: {name}"):
        grammar_text(StructuredOutput(grammar=f"start: x\nx[{option}]: /[a-z]+/"), {})


SPECIAL = ("<think>", "</think>", "<tool>")


class Bytes:
    """Tokens are bytes, the end and SPECIAL."""

    bos_token_id, eos_token_id = None, 256
    tokens = (*(bytes([one]) for one in range(256)), *(b"\xff" + name.encode() for name in ("end", *SPECIAL)))
    special_token_ids = tuple(range(256, len(tokens)))

    def __call__(self, text):
        return [*text.encode()]


VOCABULARY = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=len(Bytes.tokens), eos_token=256)


def accepts(form, said, special=()):
    """Does a format let this whole output through? `special`: those names are tokens of their own."""
    names = {name: 257 + SPECIAL.index(name) for name in special}
    text = grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), names)
    matcher = LLMatcher(VOCABULARY, LLMatcher.grammar_from_lark(text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    parts = re.split(f"({'|'.join(map(re.escape, special))})", said) if special else [said]
    ids = [token for part in parts for token in ([names[part]] if part in names else part.encode())]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def several(*elements, kind="sequence"):
    return {"type": kind, "elements": [*elements]}


def const(value):
    return {"type": "const_string", "value": value}


def regex(pattern):
    return {"type": "regex", "pattern": pattern}


TEXT = {"type": "any_text"}
JSON = {"type": "json_schema", "json_schema": {"type": "object"}}
CALLS = {
    "type": "triggered_tags",
    "triggers": ["<f="],
    "tags": [tag("<f=a>", JSON, "</f>"), tag("<f=b>", TEXT, "</f>")],
}
LIST = {"type": "tags_with_separator", "tags": CALLS["tags"], "separator": ","}
THOUGHTS = tag("<think>", TEXT, "</think>")
A, AB = "<f=a>{}</f>", "<f=a>{}</f>,<f=b>x</f>"
TALK = {"type": "dispatch", "rules": [["<a>", JSON], ["<b>", const("x")]]}


@pytest.mark.parametrize(
    ("form", "held", "others"),
    [
        (tag("<a>", TEXT, "</a>"), ["<a></a>", "<a>é\n</a>"], ["<a>x", "<a>x</a>y", "<a>x</a></a>"]),
        (tag("<a>", TEXT, ["</a>", "</b>"]), ["<a>x</a>", "<a>x</b>"], ["<a>x</c>", "<a></a></b>"]),
        (tag("<a>", JSON, ["</a>", "</b>"]), ["<a>{}</a>", "<a>{}</b>"], ["<a>{}", "<a>{}</c>"]),
        (tag("<a>", {**TEXT, "excludes": ["<", "yes"]}, "</a>"), ["<a>ye</a>"], ["<a>yes</a>", "<a><</a>"]),
        ({**TEXT, "excludes": ["no"]}, ["", "n o"], ["no", "a no b"]),
        (tag("<a>", CALLS, "</a>"), [f"<a>x{A}y</a>", "<a></a>"], ["<a>x", "<a></a></a>", "<a><f=c></a>"]),
        (tag("<a>", several(const("b"), TEXT), "</a>"), ["<a>b</a>", "<a>bc</a>"], ["<a>c</a>", "<a>b</a></a>"]),
        (tag("<a>", several(JSON, TEXT), "</a>"), ["<a>{}x</a>"], ["<a>x</a>", "<a>{}x</a></a>"]),
        (tag("<a>", several(JSON, TEXT, kind="or"), "</a>"), ["<a>{}</a>", "<a>x</a>"], ["<a>{}", "<a>x</a>y"]),
        (tag("<a>", {"type": "optional", "content": TEXT}, "</a>"), ["<a></a>", "<a>x</a>"], ["<a>", "<a></a>x"]),
        (tag("<a>", tag("b", TEXT, ""), "</a>"), ["<a>bx</a>"], ["<a>x</a>", "<a>bx"]),
        (several(THOUGHTS, JSON), ["<think>x</think>{}"], ["<think>x</think>x", "<think>x", "{}"]),
        (several(THOUGHTS, CALLS), ["<think></think>", f"<think>x</think>y{A}z"], ["x", "<think></think><f=c>"]),
        (several(TEXT, const("X")), ["X", "aXX"], ["a", ""]),
        (several(TEXT, tag("<a>", JSON, "</a>"), JSON), ["x<a>{}</a>{}"], ["x<a>{}</a>", "x{}"]),
        (several(TEXT, tag("<a>", JSON, "</a>")), ["<a>{}</a>", "x<a>{}</a>"], ["x", "x<a>x</a>"]),
        (several(CALLS, several(tag("<a>", JSON, "</a>"), const("."))), [f"x{A}y<a>{{}}</a>."], [A, "<a>{}</a>.."]),
        (several(regex("[a-z]+"), const("x")), ["ax"], ["a", "x"]),
        (tag("<a>", regex(".*"), "</a>"), ["<a>x</a>"], ["<a>x"]),
        (several(tag("<a>", regex(".*"), "</a>"), JSON), ["<a>x</a>{}"], ["<a>x</a>", "<a>x</a></a>{}"]),
        ({**CALLS, "tags": [tag("<f=a>", regex("(?s:.)+"), "</f>")]}, ["<f=a>x</f>\ny"], ["<f=a>x", "<f=a></f>"]),
        ({**CALLS, "tags": [tag("<f=b>", several(TEXT, const("x")), "</f>")]}, ["<f=b>yx</f>z"], ["<f=b>y</f>"]),
        (several(TEXT, const("X"), JSON), ["aX{}"], ["aX", "a{}"]),
        (several(const("a"), TEXT, const("X"), regex("[0-9]"), JSON), ["abX1{}"], ["aX{}", "X1{}"]),
        (several(regex("a/b|c"), regex(r"\/\\/")), ["a/b/\\/", "c/\\/"], ["a/b"]),
        (several(regex(""), const("")), [""], ["a"]),
        (several({"type": "regex"}, {"type": "const_string"}, JSON), ["{}"], ["a{}"]),
        (CALLS, ["", f"x{A}y{A}z", "<f=b>x</f>"], ["<f=c>", "<f=a>x</f>", "<f=b>x"]),
        ({**CALLS, "stop_after_first": True}, ["x", f"x{A}"], [f"{A}x"]),
        ({**CALLS, "at_least_one": True}, [A, f"{A}x{A}"], ["", f"x{A}"]),
        ({**CALLS, "at_least_one": True, "stop_after_first": True}, [A], ["", f"x{A}", f"{A}x"]),
        ({**CALLS, "excludes": ["no"]}, [f"n{A}o", "<f=b>no</f>"], ["no", f"{A}no", f"no{A}"]),
        (LIST, ["", A, AB], [f"{A}{A}", f"{A},", "x"]),
        ({**LIST, "stop_after_first": True}, ["", A], [AB]),
        ({**LIST, "at_least_one": True, "stop_after_first": True}, [A], ["", AB]),
        (TALK, ["", "x<a>{}y<b>xz"], ["<a>x", "<b>z"]),
        ({**TALK, "loop": False, "excludes": ["no"]}, ["x", "x<a>{}"], ["<a>{}y", "no"]),
        ({"type": "star", "content": const("ab")}, ["", "abab"], ["aba"]),
        ({"type": "plus", "content": JSON}, ["{}", "{}{}"], ["", "{"]),
        ({"type": "optional", "content": JSON}, ["", "{}"], ["{}{}"]),
        ({"type": "repeat", "min": 1, "max": 2, "content": const("a")}, ["a", "aa"], ["", "aaa"]),
        ({"type": "repeat", "min": 2, "max": -1, "content": JSON}, ["{}{}", "{}{}{}"], ["{}"]),
        (
            {"type": "qwen_xml_parameter", "json_schema": {"type": "object", "properties": {"n": {"type": "integer"}},
             "required": ["n"], "additionalProperties": False}},
            ["<parameter=n>\n12\n</parameter>", "<parameter=n>12</parameter>"], ["<parameter=n>x</parameter>", ""],
        ),
    ],
)  # fmt: skip
def test_formats(form, held, others):
    assert [said for said in held if not accepts(form, said)] == []
    assert [said for said in others if accepts(form, said)] == []


@pytest.mark.parametrize(
    ("form", "held", "others"),
    [
        (several(THOUGHTS, JSON), ["<think>x</think>{}"], ["<think>x</think>x", "<think>x"]),
        (tag({"type": "token", "token": "<tool>"}, JSON, {"type": "token", "token": 258}), ["<tool>{}</think>"], ["{}"]),
        (tag("<a>", TEXT, ["\n<tool>", "</a>"]), ["<a>x</a>", "<a>x\n<tool>"], ["<a>x<tool>", "<a></a>\n<tool>"]),
        (several(TEXT, {"type": "token", "token": "<tool>"}, JSON), ["x<tool>{}", "<tool>{}"], ["x{}", "<tool>x"]),
        (
            {"type": "token_triggered_tags", "trigger_tokens": ["<tool>"], "exclude_tokens": ["<think>"],
             "tags": [tag({"type": "token", "token": "<tool>"}, JSON, ";")]},
            ["", "x<tool>{};y", "<tool>{};<tool>{};"], ["<tool>x", "<think>"],
        ),
        (tag("<a>", regex("[a-z]+"), "</think>"), ["<a>b</think>"], ["<a></think>", "<a>b"]),
        (tag("<a>", several(const("b"), TEXT), "</think>"), ["<a>bc</think>"], ["<a>c</think>", "<a>b"]),
        (several(const("b"), TEXT, const("<tool>"), JSON), ["b<tool>{}", "bc<tool>{}"], ["<tool>{}", "bc{}"]),
        ({"type": "token_dispatch", "rules": [[259, JSON]]}, ["x<tool>{}y"], ["<tool>x"]),
    ],
)  # fmt: skip
def test_formats_with_special_tokens(form, held, others):
    assert [said for said in held if not accepts(form, said, SPECIAL)] == []
    assert [said for said in others if accepts(form, said, SPECIAL)] == []


@pytest.mark.parametrize(
    ("form", "word"),
    [
        (several(TEXT, JSON), "nothing tells where any_text ends before json_schema"),
        (several(TEXT, regex("a"), JSON), "nothing tells where any_text ends before regex"),
        (several(regex("a.*"), JSON), "nothing tells where regex 'a.*' ends before json_schema; put it into a tag with an end"),
        (several(const("a"), regex("(?s:.*)"), JSON), "nothing tells where regex"),
        (several(CALLS, JSON), "nothing tells where triggered_tags ends before json_schema"),
        ({"type": "star", "content": CALLS}, "content of star"),
        ({"type": "repeat", "min": 2, "max": 1, "content": TEXT}, "min and max of repeat"),
        (tag("<a>", TEXT, ["</a>", ""]), "one of several ends"),
        ({"type": "token", "token": "x"}, "'x' is no special token"), ({"type": "token", "token": 7}, "7 is no special"),
        ({"type": "dispatch", "rules": [["<a>"]]}, "rules are pairs"),
        ({"type": "token_triggered_tags", "trigger_tokens": 1, "tags": [TAG]}, "trigger_tokens must be a list"),
        ({"type": "token_dispatch", "rules": [[1, JSON]], "exclude_tokens": 1}, "exclude_tokens must be a list"),
        ({**CALLS, "triggers": ["<f=", 1]}, "triggers must be a list of texts"),
        ({**CALLS, "tags": ["a"]}, "tags must be objects"), ({**LIST, "tags": [1]}, "tags must be objects"),
        ({**TEXT, "excludes": [""]}, "excludes must be a list of texts"), ({"type": "any_tokens"}, "'any_tokens'"),
    ],
)  # fmt: skip
def test_what_a_format_cant_say(form, word):
    with pytest.raises(ClientError, match=word):
        accepts(form, "")


ODD = st.sampled_from([None, 1, "", "x", [], ["a", 1], {}, {"type": "token"}])
MARKS = st.sampled_from(["<a>", "", "x<tool>", "<tool>"])
BOUNDS = MARKS | st.just({"type": "token", "token": 257})
ENDS = BOUNDS | st.just(["</a>", "b"])
FIELDS = {
    "content": st.deferred(lambda: FORMS), "elements": st.lists(st.deferred(lambda: FORMS), min_size=1, max_size=3),
    "tags": st.lists(
        st.fixed_dictionaries({"begin": BOUNDS, "content": st.deferred(lambda: FORMS), "end": ENDS}), min_size=1, max_size=2
    ),
    "rules": st.lists(st.tuples(MARKS, st.deferred(lambda: FORMS)).map(list), min_size=1, max_size=2),
    "triggers": st.just(["<a", "<tool>"]), "trigger_tokens": st.just(["<tool>"]), "excludes": st.just(["no"]),
    "value": MARKS, "separator": MARKS, "begin": BOUNDS, "end": ENDS, "token": MARKS, "min": st.integers(-1, 2),
    "max": st.integers(-1, 2), "pattern": st.sampled_from(["a/b", ".*", "", "["]), "loop": st.booleans(),
    "at_least_one": st.booleans(), "stop_after_first": st.booleans(), "json_schema": st.just({"type": "object"}),
    "grammar": st.just('root ::= "x"'),
}  # fmt: skip


@st.composite
def some_format(draw):
    kind = draw(st.sampled_from([*_FIELDS]))
    names = [name for name in _FIELDS[kind] if name in FIELDS]
    return {"type": kind, **{name: draw(ODD if draw(st.integers(0, 19)) == 0 else FIELDS[name]) for name in names}}


FORMS = some_format() | ODD


@given(some_format())
@settings(max_examples=examples(150))
def test_any_format_gives_a_grammar_or_is_the_callers_fault(form):
    for special in ((), SPECIAL):
        with contextlib.suppress(ClientError):
            tag_grammar({"format": form}, {name: 257 + number for number, name in enumerate(special)})


ANYTHING, WIDE = regex("(?s:.*)"), tag("<a>", regex("(?s:.*)"), "</a>")
W, WW = "<a>x</a>", "<a>x</a><a>y</a>"
NUMBER = {"type": "json_schema", "json_schema": {"type": ["integer", "null"]}}
LETTERS = {"type": "grammar", "grammar": 'root ::= "x" [a-z]+'}


@pytest.mark.parametrize(
    ("form", "held", "others"),
    [
        (several(ANYTHING, const("X"), JSON), ["X{}", "aXbX{}"], ["aX", "a{}", "aX{}X{}"]),
        (several(ANYTHING, several(const("X"), JSON)), ["X{}", "aX{}"], ["aX", "a{}"]),
        (several(ANYTHING, const("X"), NUMBER), ["aXbX5", "aXnull"], ["aX", "aX5X5"]),
        (several(ANYTHING, const("X"), {"type": "json_schema"}), ['aX""', "aX[1]", "aXtrue"], ["aX", "aXa{"]),
        (several(ANYTHING, const("X"), several(JSON, NUMBER, kind="or")), ["aX{}", "aX5"], ["aX"]),
        (several(ANYTHING, const("X"), {"type": "plus", "content": JSON}), ["aX{}{}"], ["aX"]),
        (several(ANYTHING, const("X"), LETTERS), ["aXxa"], ["aXaXxa", "aX"]),
        (several(ANYTHING, tag("<a>", JSON, "</a>")), ["<a>{}</a>", "a<b<a>{}</a>"], ["a", "<a>x</a>"]),
        (several(regex(r"[0-9]+(\.[0-9]+)?"), const("."), JSON), ["1.{}", "1.5.{}"], ["1.5{}"]),
        (several(regex(r"a\.*"), JSON), ["a{}", "a..{}"], ["a"]),
        (several(regex("[^<]*"), const("."), LIST), ["a.b.", f"a.b.{A}"], ["a", A]),
        (several({"type": "plus", "content": WIDE}, JSON), [f"{W}{{}}", f"{WW}{{}}"], [W, "{}", f"{W}</a>{{}}"]),
        (several({"type": "plus", "content": WIDE}, LETTERS), [f"{W}xa", f"{WW}xa"], [W, "xa", f"{W}</a>xa"]),
        (several({"type": "optional", "content": WIDE}, JSON), ["{}", f"{W}{{}}"], [W, f"{WW}{{}}"]),
        (several(several(WIDE, const("b"), kind="or"), JSON), ["b{}", f"{W}{{}}"], [W, "{}", f"{W}</a>{{}}"]),
        (several({"type": "star", "content": {"type": "optional", "content": WIDE}}, JSON), ["{}", f"{WW}{{}}"], [W]),
        (several(tag("b", {"type": "plus", "content": WIDE}, ""), JSON), [f"b{WW}{{}}"], [f"b{W}", "b{}"]),
        (several(regex("(?s:.){0,2000}"), const("X"), JSON), ["aX{}"], ["aX", "a{}"]),
        (several(const("b"), {"type": "plus", "content": WIDE}, JSON), [f"b{WW}{{}}"], [f"b{W}", "b{}"]),
    ],
)  # fmt: skip
def test_patterns_that_fit_what_stands_behind_them_come_to_their_end(form, held, others):
    test_formats(form, held, others)


@pytest.mark.parametrize("given", ["false", 0, None])
@pytest.mark.parametrize(
    ("form", "name"),
    [(CALLS, "at_least_one"), (CALLS, "stop_after_first"), (LIST, "at_least_one"), (LIST, "stop_after_first"), (TALK, "loop")],
)  # fmt: skip
def test_flags_are_true_or_false(form, name, given):
    with pytest.raises(ClientError, match=f"{name} must be true or false, got {given!r}"):
        accepts({**form, name: given}, "")


def test_long_sequences_are_flat():
    assert accepts(several(*[const("a")] * 3000), "a" * 3000)
