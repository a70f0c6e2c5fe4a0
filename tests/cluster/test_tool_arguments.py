"""Arguments that aren't one JSON object: whatever a model writes under their grammars, its reader finds calls that fit."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from fuzzing import examples
from grammar_walk import PLAIN, Bytes, accepts, matcher_of, read, walk

from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.argument_check import check_arguments
from kvasir.engine.argument_style import style_json, style_of
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.raw_values import kinds_of, typed
from kvasir.engine.structural_tag import tag_grammar

TAGGED = [name for name, form in TOOL_FORMATS.items() if form.arguments is not None]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "unit": {"enum": ["c", "f", "a&b"]},
        "note": {"type": ["string", "null"]},
        "code": {"type": "string", "minLength": 2, "maxLength": 4},
        "zip": {"type": "string", "pattern": "^[0-9]{3}$"},
        "when": {"type": "string", "format": "date"},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        "on": {"type": "boolean"},
        "ratio": {"anyOf": [{"type": "number"}, {"type": "string", "enum": ["auto", "null"]}, {"type": "null"}]},
        "mixed": {"enum": [1, "one", None]},
    },
    "required": ["city", "place", "mixed"],
    "$defs": {"place": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ping"}},
]


def check(answer, tools, form, text):
    """There are calls, and they fit."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    assert answer.calls, (form.name, text)
    for call in answer.calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("specials", [False, True])
def test_forced_calls_fit_their_schemas(name, specials):
    """Also where marks are special tokens, as most vocabularies have them."""
    form = TOOL_FORMATS[name]
    vocabulary = Bytes(sorted({mark for mark in (*form.begins, *form.inner) if len(mark) > 1})) if specials else PLAIN
    use = tool_use(TOOLS, "required")
    assert use.held(form).form is form
    matcher, ended = matcher_of(use, form, vocabulary), 0
    for seed in range(examples(16)):
        if (text := walk(matcher, form, seed, vocabulary)) is not None:
            check(read(form, text, use.schemas), TOOLS, form, text)
            ended += 1
        if ended == examples(5):
            break
    assert ended


GOOD = {
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\nBygdøy\n</parameter>\n<parameter=place>\n"
    '{"name": "</parameter>"}\n</parameter>\n<parameter=mixed>\none\n</parameter>\n</function>\n</tool_call>',
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo\nBygdøy</arg_value>\n<arg_key>place</arg_key>\n"
    '<arg_value>{"name": "</parameter>"}</arg_value>\n<arg_key>mixed</arg_key>\n<arg_value>one</arg_value>\n</tool_call>',
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">'
    'Oslo\nBygdøy</｜DSML｜parameter>\n<｜DSML｜parameter name="place" string="false">{"name": "</parameter>"}</｜DSML｜parameter>'
    '\n<｜DSML｜parameter name="mixed" string="true">one</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "gemma4": '<|tool_call>call:weather{city:<|"|>Oslo\nBygdøy<|"|>,place:{name:<|"|></parameter><|"|>},'
    'mixed:<|"|>one<|"|>}<tool_call|>',
    "pythonic": '[weather(city="Oslo\\nBygdøy", place={"name": "</parameter>"}, mixed="one")]',
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_models_write_is_let_through(name):
    form, use = TOOL_FORMATS[name], tool_use(TOOLS, "auto")
    (call,) = read(form, GOOD[name], use.schemas).calls
    assert json.loads(call.arguments) == {"city": "Oslo\nBygdøy", "place": {"name": "</parameter>"}, "mixed": "one"}
    free, forced = matcher_of(use, form), matcher_of(tool_use(TOOLS, "required"), form)
    wrong = GOOD[name].replace("one", "two")
    assert accepts(forced, GOOD[name])
    assert not accepts(forced, wrong)
    assert accepts(free, "Let me see. [1] " + GOOD[name])
    assert accepts(free, "It rains in [Bergen].")
    assert not accepts(free, "Let me see. " + wrong)
    assert not accepts(matcher_of(tool_use(TOOLS, "required", parallel=False), form), GOOD[name] * 2)


def test_a_call_without_its_outer_tag_is_held_too():
    """Qwen3-Coder leaves it out now and then."""
    form = TOOL_FORMATS["qwen3_coder"]
    free = matcher_of(tool_use(TOOLS, "auto"), form)
    inner = GOOD["qwen3_coder"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert accepts(free, "Well. " + inner)
    assert not accepts(free, "Well. " + inner.replace("one", "two"))


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello"),
        ("openai", "Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.ping <|constrain|>json<|message|>{}"),
        ("openai", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.ping<|channel|>commentary "
         "<|constrain|>json<|message|>{}"),
        ("cohere", "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Hello<|END_RESPONSE|>"),
        ("cohere", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "ping", "parameters": {}}]<|END_ACTION|>'),
        ("cohere", "Hello"),
    ],
)  # fmt: skip
def test_formats_of_the_whole_answer_hold_free_calls(name, good):
    form = TOOL_FORMATS[name]
    marks = {
        mark for mark in form.inner if mark in "".join([*form.call, *form.wrap, *sum(form.blocks, ()), *form.answer])
    }
    vocabulary = Bytes(sorted(marks))
    strict = [{"type": "function", "function": {**one["function"], "strict": True}} for one in TOOLS]
    matcher = matcher_of(tool_use(strict, "auto"), form, vocabulary)
    assert accepts(matcher, good, vocabulary)
    assert not accepts(matcher, good.replace("ping", "weather"), vocabulary) or "ping" not in good


def plain(schema):
    """BFCL writes Python's types."""
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key not in ("default", "format", "optional")}
    names = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    if isinstance(found.get("type"), str):
        found["type"] = names.get(found["type"].lower(), found["type"].lower())
    if found.get("type") not in ("object", "array", "string", "integer", "number", "boolean"):
        found.pop("type", None)
    if isinstance(found.get("properties"), dict):
        found["properties"] = {key: plain(value) for key, value in found["properties"].items()}
    return {**found, "items": plain(found["items"])} if "items" in found else found


@pytest.fixture(scope="module")
def questions(data):
    """Of the Berkeley leaderboard, of all its categories."""
    return [
        line for file in sorted(data("tools-bfcl/questions").glob("*.json*")) for line in file.read_text().splitlines()
    ]


def functions(questions, seed, count):
    for line in random.Random(seed).sample(questions, count):
        given = json.loads(line).get("function") or []
        tools = [
            {"type": "function", "function": {"name": f["name"], "parameters": plain(f["parameters"])}}
            for f in (given if isinstance(given, list) else [given])
        ]
        if tools and len({tool["function"]["name"] for tool in tools}) == len(tools):
            yield tools


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_bfcl_forced_in_every_format(questions, name):
    """Every output of a model of random weights that ends is a call that fits; each format has questions of its own."""
    form, ended, own = TOOL_FORMATS[name], 0, 0
    for number, tools in enumerate(functions(questions, name, examples(5))):
        use = tool_use(tools, "required")
        written = use.held(form).form
        matcher = matcher_of(use, form)
        for seed in range(2):
            if (text := walk(matcher, written, 100 * number + seed)) is not None:
                check(read(written, text, use.schemas), tools, written, text)
                ended += 1
                own += written is form
    assert ended >= 2
    assert own >= 0.5 * ended


ODD = [*"abzAZ09", *"_-.:/|@#%&=+*~^$!?,;()` \u00a0\u3000é日", "self", "user", "functions.", "null"]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_names_are_read_as_they_are_written_or_refused(name):
    """Where one can't be written, a forced call is written as JSON, which has them all."""
    form, dice, ended, own = TOOL_FORMATS[name], random.Random(2), 0, 0
    for number in range(14):
        tool = "".join(dice.choices(ODD, k=dice.randint(1, 5))).strip() if number else "self"
        tools = [{"type": "function", "function": {"name": tool or "user", "parameters": {"type": "object"}}}]
        use = tool_use(tools, "required")
        written = use.held(form).form
        if written is not form:
            with pytest.raises(UnsupportedError, match="can't be called so"):
                tool_use(tools, "auto").held(form)
        if (text := walk(matcher_of(use, form), written, number)) is not None:
            for cuts in ((), range(len(text))):
                answer = read(written, text, use.schemas, cuts=cuts)
                assert {call.name for call in answer.calls} == {*use.names}, text
                assert not answer.content.strip(), text
            ended, own = ended + 1, own + (written is form)
    assert ended >= 5
    assert own >= 3


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"allOf": [{"type": "string"}]}, "allOf"),
        ({"type": "string", "format": "idn-email"}, "idn-email"),
        ({"type": "string", "pattern": "^a|b$"}, "pattern"),
        ({"type": "string", "pattern": "a$b"}, "pattern"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "oneOf"),
        ({"enum": ["</parameter>"]}, "enum"),
    ],
)
def test_what_cant_be_held_is_named(schema, word):
    style = TOOL_FORMATS["qwen3_coder"].arguments
    with pytest.raises(UnsupportedError, match=word):
        check_arguments({"properties": {"a": schema}}, style, exact=True)
    with pytest.raises(UnsupportedError, match="name"):
        check_arguments({"properties": {"a>": {}}}, style, exact=True)
    with pytest.raises(UnsupportedError, match="minProperties"):
        check_arguments({"minProperties": 1}, style, exact=True)


def test_styles_come_back_from_structural_tags():
    for name in TAGGED:
        style = TOOL_FORMATS[name].arguments
        assert style_of(json.loads(json.dumps(style_json(style)))) == style
    for wrong in ({}, {"key": "ab"}, {"key": ["a", 1]}, {"key": ["a", "b"], "texts": "x"}, {"key": ["a"]}):
        with pytest.raises(ClientError):
            style_of(wrong)


def test_texts_are_read_by_their_types():
    assert typed("true", {"type": "string"}) == "true"
    assert typed("true", {"type": ["string", "null"]}) == "true"
    assert typed("null", {"type": ["string", "null"]}) is None
    assert typed("[1]", {"type": ["string", "object"]}) == "[1]"
    assert typed("12", {"type": ["string", "integer"]}) == "12"
    assert typed("True", {"type": "boolean"}) is True
    assert typed("[1]", {}) == [1]
    assert kinds_of({"anyOf": [{"type": "string"}, {"const": "x"}, {"type": ["null"]}]}) == {"string", "null"}


def wide(levels):
    """Each level refers to the next one twice: 2^levels objects."""
    defs = {
        f"d{n}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "ab"}}
        for n in range(levels)
    }
    return {"$defs": defs | {f"d{levels}": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/d0"}}}


def forced(schema):
    return tool_use([{"type": "function", "function": {"name": "f", "parameters": schema}}], "required")


@pytest.mark.parametrize("name", ["gemma4", "functiongemma"])
def test_what_is_referred_to_twice_is_written_once(name):
    form = TOOL_FORMATS[name]
    spec = json.loads(forced(wide(25)).held(form).grammar.structural_tag)
    assert len(tag_grammar(spec, {})) < 100_000
    assert forced(wide(3)).held(form).form is form
    matcher = matcher_of(forced(wide(2)), form)
    begin, end = form.call
    for text, right in (("a:{b:{a:QxQ,b:QyQ},a:{}}", False), ("a:{a:{},b:{a:QxQ,b:QyQ}}", True), ("a:{a:QxQ}", False)):
        written = begin.replace("NAME", "f") + text.replace("Q", form.arguments.quote) + end
        assert accepts(matcher, written) == right, text


def test_values_to_choose_from_stay_as_they_are():
    form = TOOL_FORMATS["gemma4"]
    matcher = matcher_of(
        forced({"properties": {"a": {"enum": [["b  c", [1, "d\te"]], "x  y"]}}, "required": ["a"]}), form
    )
    begin, end = form.call
    for text, right in (
        ("[Qb  cQ,[1,Qd\teQ]]", True),
        ("[Qb cQ,[1,Qd\teQ]]", False),
        ("Qx  yQ", True),
        ("Qx yQ", False),
    ):
        written = f"{begin.replace('NAME', 'f')}a:{text}{end}".replace("Q", form.arguments.quote)
        assert accepts(matcher, written) == right, text
