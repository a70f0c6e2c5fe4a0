"""Formats of families since 2025, and what every shared chat template shows: read however it is cut, held when forced."""

from __future__ import annotations

import itertools
import json

import jsonschema
import pytest
from grammar_walk import PLAIN, Bytes, accepts, calls_of, matcher_of, read, walk

from kvasir.cluster.answer_parts import MAX_RETURNED, AnswerReader, ReadAnswer
from kvasir.cluster.derived_format import derived_thoughts, shown_calls, shows_tools
from kvasir.cluster.reading import constraints, reading
from kvasir.cluster.tool_formats import THOUGHT_FORMATS, TOOL_FORMATS, model_formats, taught_thoughts
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ConfigError

N = "]<]minimax[>["
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}}}},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ping"}},
]
SCHEMAS = {"get_weather": PARAMETERS, "ping": None}
GIVEN = [("get_weather", {"city": "Oslo <b> & 7", "days": 2, "where": {"names": ["5", "x"]}}), ("ping", {})]
JSON = json.dumps(GIVEN[0][1])


def args(text, **kinds):
    """The arguments, each written as `text` is, with KEY, VALUE and what stands for its type."""
    written = [
        ("city", "Oslo <b> & 7", "texts"),
        ("days", "2", "numbers"),
        ("where", '{"names": ["5", "x"]}', "objects"),
    ]
    return "".join(
        text.replace("KEY", key).replace("VALUE", value).replace("KIND", kinds.get(kind, ""))
        for key, value, kind in written
    )


def dsml(section, space):
    invoke, parameter = f"｜DSML｜{space}invoke", f"｜DSML｜{space}parameter"
    arguments = args(
        f'<{parameter} name="KEY" string="KIND">VALUE</{parameter}>\n', texts="true", numbers="false", objects="false"
    )
    calls = f'<{invoke} name="get_weather">\n{arguments}</{invoke}>\n<{invoke} name="ping">\n</{invoke}>\n'
    return f"<｜DSML｜{section}>\n{calls}</｜DSML｜{section}>"


def objects(name, arguments):
    """Both calls as objects."""
    return f'{{"{name}": "get_weather", "{arguments}": {JSON}}}', f'{{"{name}": "ping", "{arguments}": {{}}}}'


ONE, OTHER = objects("name", "arguments")
XTML = '<|open|>argument key="KEY" type="KIND"<|sep|>VALUE<|close|>argument<|sep|>'
ATEM = '<atem:parameter name="KEY">VALUE</atem:parameter>\n'
TEXTS = {
    "minimax_m3": f'{N}<tool_call>\n{N}<invoke name="get_weather">{N}<city>Oslo <b> & 7{N}</city>{N}<days>2{N}</days>{N}<where>'
    f"{N}<names>{N}<item>5{N}</item>{N}<item>x{N}</item>{N}</names>{N}</where>{N}</invoke>\n"
    f'{N}<invoke name="ping">{N}</invoke>\n{N}</tool_call>',
    "kimi_k3": '<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
    + args(XTML, texts="string", numbers="number", objects="object")
    + '<|close|>call<|sep|><|open|>call tool="ping" index="2"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>',
    "solar_open": f"<|tool_calls|><|tool_call:begin|>c-1<|tool_call:name|>get_weather<|tool_call:args|>{JSON}<|tool_call:end|>"
    "<|tool_call:begin|>c-2<|tool_call:name|>ping<|tool_call:args|>{}<|tool_call:end|><|calls|>",
    "inkling": "<|end_message|><|message_model|>".join(
        f"<|content_invoke_tool_json|>{one}" for one in objects("name", "args")
    ) + "<|end_message|>",
    "muse_glimmer": ' to=get_weather<|message|><atem:function_calls>\n<atem:invoke name="get_weather">\n' + args(ATEM)
    + "</atem:invoke>\n</atem:function_calls><|eom|><|start|>assistant to=ping<|message|><atem:function_calls>\n"
    '<atem:invoke name="ping">\n</atem:invoke>\n</atem:function_calls>',
    "functionary_v32": f"get_weather\n{JSON}>>>ping\n{{}}",
    "apertus": f'<|tools_prefix|>[{{"get_weather": {JSON}}}, {{"ping": {{}}}}]<|tools_suffix|>',
    "ernie45": f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>",
    "longcat": f"<longcat_tool_call>\n{ONE}\n</longcat_tool_call>\n<longcat_tool_call>\n{OTHER}\n</longcat_tool_call>",
    "gigachat3": f"<|function_call|>{ONE}\n<|function_call|>{OTHER}",
    "hy_v3": "<tool_calls>\n<tool_call>get_weather<tool_sep>\n"
    + args("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n")
    + "</tool_call>\n<tool_call>ping<tool_sep></tool_call>\n</tool_calls>",
    "solar_open2": "<|tool_call:start|>get_weather\n"
    + args("<|tool_arg:start|>KEY<|tool_arg:value|>VALUE<|tool_arg:end|>\n")
    + "<|tool_call:end|>\n<|tool_call:start|>ping\n<|tool_call:end|>",
    "minicpm5": '<function name="get_weather">' + args('<param name="KEY">VALUE</param>')
    + '</function>\n<function name="ping"></function>',
    "deepseek_v41": dsml(" calls", " "),
    "deepseek_v4": dsml("tool_calls", ""),
    "command_r_plus": "Action:\n```json\n[" + ",\n".join(objects("tool_name", "parameters")) + "]```",
}  # fmt: skip
CHANNELS = {
    "kimi_k3": (
        "<|open|>think<|sep|>",
        "Hm.<|close|>think<|sep|><|open|>response<|sep|>Hello",
        "<|close|>response<|sep|>",
    ),
    "solar_open": ("", "<|think|>Hm.<|end|><|begin|>assistant<|content|>Hello", "<|end|>"),
    "inkling": ("", "<|content_thinking|>Hm.<|end_message|><|message_model|><|content_text|>Hello", "<|end_message|>"),
    "muse_glimmer": ("", " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Hello", "<|eot|>"),
    "cohere": ("<|START_THINKING|>", "Hm.<|END_THINKING|><|START_RESPONSE|>Hello", "<|END_RESPONSE|>"),
    "openai": (
        "",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello",
        "<|return|>",
    ),
}


def test_every_recent_format_has_a_text():
    from kvasir.cluster.recent_formats import RECENT_FORMATS

    assert {form.name for form in RECENT_FORMATS} == {*TEXTS}


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read_at_every_split_and_let_through(name):
    form, text = TOOL_FORMATS[name], TEXTS[name]
    whole = read(form, text, SCHEMAS)
    assert calls_of(whole) == GIVEN
    assert not whole.content.strip()
    assert read(form, text, SCHEMAS, cuts=range(1, len(text))) == whole
    for at in range(len(text)):
        assert read(form, text, SCHEMAS, cuts=[at]) == whole, at
    marks = sorted({mark for mark in (*form.begins, *form.inner) if "|" in mark or "[" in mark or "｜" in mark})
    for vocabulary in (PLAIN, Bytes([mark for mark in marks if "\n" not in mark])):
        forced = matcher_of(tool_use(TOOLS, "required"), form, vocabulary)
        assert accepts(forced, text, vocabulary)
        assert not accepts(forced, text.replace("city", "town"), vocabulary)
        assert not accepts(matcher_of(tool_use(TOOLS, "required", parallel=False), form, vocabulary), text, vocabulary)
        assert accepts(matcher_of(tool_use(TOOLS, "auto"), form, vocabulary), text, vocabulary)


@pytest.mark.parametrize("name", ["functions.intersect", "ns.f:1", "functions.a:0", "function"])
def test_tools_whose_names_look_like_what_formats_put_around_names(name):
    """In every format, what it may write is read."""
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    use = tool_use([{"type": "function", "function": {"name": name, "parameters": empty}}], "required", parallel=False)
    for form in TOOL_FORMATS.values():
        matcher = matcher_of(use, form)
        text = next(filter(None, (walk(matcher, form, seed) for seed in itertools.count())))
        assert calls_of(read(form, text, use.schemas)) == [(name, {})], (form.name, text)


@pytest.mark.parametrize("name", TEXTS)
def test_half_a_call_is_what_was_said_of_it(name):
    """A text that is cut off: no error, and the same in pieces."""
    form, text = TOOL_FORMATS[name], TEXTS[name]
    for end in range(0, len(text), 3):
        assert read(form, text[:end], SCHEMAS) == read(form, text[:end], SCHEMAS, cuts=range(1, end))


@pytest.mark.parametrize("name", CHANNELS)
def test_thoughts_and_answers_in_channels(name):
    form, (opening, text, end) = TOOL_FORMATS[name], CHANNELS[name]
    assert form.opening("<user>Hi" + opening) == opening
    for at in range(len(text + end)):
        answer = read(form, text + end, cuts=[at], opening=opening)
        assert (answer.reasoning, answer.content.strip(), answer.calls) == ("Hm.", "Hello", [])
    answer = read(form, text, cuts=range(len(text)), opening=opening)
    assert (answer.reasoning, answer.content) == ("Hm.", "Hello")


def test_an_answer_before_calls_in_channels():
    """Kimi K3's responses stand before the calls."""
    text = "Hm.<|close|>think<|sep|><|open|>response<|sep|>Let me see." + TEXTS["kimi_k3"] + "<|close|>message<|sep|>"
    answer = read(TOOL_FORMATS["kimi_k3"], text, SCHEMAS, cuts=range(len(text)), opening="<|open|>think<|sep|>")
    assert (answer.reasoning, answer.content, calls_of(answer)) == ("Hm.", "Let me see.", GIVEN)
    answer = read(TOOL_FORMATS["functionary_v32"], "all\nSay >>> twice.>>>" + TEXTS["functionary_v32"], SCHEMAS)
    assert (answer.content, calls_of(answer)) == ("Say >>> twice.", GIVEN)


def test_lists_and_objects_in_pythons_spelling():
    """Some chat templates show no other, so that is what their models write."""
    value = "{'a': ['x<y>', None], 'b': True}"
    text = f"<seed:tool_call>\n<function=f>\n<parameter=o>{value}</parameter>\n</function>\n</seed:tool_call>"
    schemas = {"f": {"properties": {"o": {"type": "object"}}}}
    assert calls_of(read(TOOL_FORMATS["seed_oss"], text, schemas)) == [("f", {"o": {"a": ["x<y>", None], "b": True}})]


@pytest.mark.parametrize(
    ("name", "unit"),
    [("pythonic", "["), ("pythonic", "[f(a="), ("json", "{"), ("json", '{"name": "f", "arguments": {')],
)
def test_brackets_in_brackets_arent_read_over_and_over(name, unit):
    """Each may be a call's beginning; what is none is text, and found out in bounded time."""
    text = unit * 5000
    reader, answer = AnswerReader(TOOL_FORMATS[name], None, schemas={"f": None}), ReadAnswer()
    answer.add([*reader.feed(text), *reader.finish()])
    assert answer.content + "".join(call.arguments for call in answer.calls)
    assert reader.scanner.returned <= MAX_RETURNED + len(text)
    closed = f"[f(o={'[' * 3000}{']' * 3000})]"
    assert read(TOOL_FORMATS["pythonic"], closed, {"f": None}).content == closed


NESTED = [
    ({"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}}, [{"a": 1.5}]),
    ({"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}, [[True], [], [False, True]]),
    ({"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]}, {"item": "7"}),
    ({"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]}, None),
    ({"type": ["string", "array"], "items": {"type": "string"}}, ["1"]),
    ({"type": ["string", "array"], "items": {"type": "string"}}, "[x"),
    ({"enum": [1, "one", None]}, "one"),
    ({"type": "object", "additionalProperties": {"type": "string"}}, {"x": "1"}),
    ({}, [1, "x"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), NESTED)
def test_tags_in_tags_hold_any_value(schema, value):
    """What MiniMax M3's chat template makes of a value is let through and read as that value, and what random weights make fits."""
    form = TOOL_FORMATS["minimax_m3"]
    shared = {"$defs": {"p": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"v": schema}, **shared, "required": ["v"]}},
        }
    ]
    use = tool_use(tools, "required")
    text = f'{N}<tool_call>\n{N}<invoke name="f">{N}<v>{spelled(value)}{N}</v>{N}</invoke>\n{N}</tool_call>'
    assert calls_of(read(form, text, use.schemas)) == [("f", {"v": value})]
    matcher, ended = matcher_of(use, form), 0
    assert accepts(matcher, text) == (not text.count("[x"))  # a text that might be the beginning of a list
    for seed in range(12):
        if (found := walk(matcher, form, seed)) is not None:
            ended += 1
            for _, given in calls_of(read(form, found, use.schemas)):
                jsonschema.validate(given, tools[0]["function"]["parameters"])
    assert ended


def spelled(value):
    if isinstance(value, dict):
        return "".join(f"{N}<{key}>{spelled(one)}{N}</{key}>" for key, one in value.items())
    if isinstance(value, list):
        return "".join(f"{N}<item>{spelled(one)}{N}</item>" for one in value)
    return value if isinstance(value, str) else json.dumps(value)


def test_tags_too_deep_are_text():
    form, levels = TOOL_FORMATS["minimax_m3"], 3000
    text = (
        f'{N}<tool_call>{N}<invoke name="f">'
        + f"{N}<a>" * levels
        + "x"
        + f"{N}</a>" * levels
        + f"{N}</invoke>{N}</tool_call>"
    )
    (call,) = read(form, text).calls
    assert json.loads(call.arguments)["a"]["a"]["a"]


# -- chat templates


def templates_in(data):
    for file in sorted(data("chat-templates").rglob("*.jinja*")):
        yield file.name, ChatTemplates({"default": file.read_text()}, {"bos_token": "<s>", "eos_token": "</s>"})


class Tokens:
    """A tokenizer, as far as formats go."""

    def __init__(self, templates):
        self.templates, self.tail, self.added_tokens = templates, "", {}

    def decode(self, ids, skip_special_tokens):
        return self.tail

    def encode(self, text, add_special_tokens):
        return [ord(text[0]), len(text)]


ONE_AT_MOST = {"Meta", "meta-llama", "tool_chat_template_llama3", "GigaChat3", "openai-gpt-oss"}
UNQUOTED = {"tool_chat_template_llama3.2_pythonic.jinja", "tool_chat_template_toolace.jinja"}
"""Show texts without quotes, by which not all can be told."""
PYTHONS = {
    "tool_chat_template_phi4_mini.jinja",  # shows Python's dicts where its instructions want JSON
}
UNSHOWN = {
    # their calls are known: these show none of ours because ids, or the model's own text, stand for them
    "granite-3.0-instruct.jinja", "Kimi-K2-Instruct.jinja", "Kimi-K2-Thinking.jinja", "LFM2-8B-A1B.jinja",
    "LFM2.5-Instruct.jinja", "ibm-granite-granite-3.3-2B-Instruct.jinja",
}  # fmt: skip


def test_every_template_with_tools_has_a_format_that_reads_its_calls(data):
    """How the template writes calls in a conversation is what a reader finds in an answer, at every split; forced, a grammar lets
    it through."""
    seen = []
    for name, templates in templates_in(data):
        if not shows_tools(templates):
            continue
        form, _ = model_formats("auto", "auto", Tokens(templates))
        assert form is not None, name
        if name in UNSHOWN | PYTHONS:
            assert form.name in ("granite", "kimi_k2", "lfm2", "phi4_mini_json"), name
            continue
        city = "Oslo" if name in UNQUOTED else "Oslo <b> & 7"
        flat = [("get_weather", {"city": city, "days": "two"}), ("ping", {"a": "b"})]
        for given in (flat, flat[:1]):
            text, opening = answered(templates, given, form)
            if text:
                break
        assert text, name
        assert len(given) == 2 or any(name.startswith(one) for one in ONE_AT_MOST), name
        schemas = {"get_weather": None, "ping": None}
        whole = read(form, text, schemas, opening=opening)
        assert calls_of(whole) == given, name
        for at in range(1, len(text), 7):
            assert read(form, text, schemas, opening=opening, cuts=[at]) == whole, (name, at)
        assert read(form, text, schemas, opening=opening, cuts=range(1, len(text))) == whole, name
        tools = [{"type": "function", "function": {"name": one}} for one in schemas]
        assert tool_use(tools, "required").held(form).form is form
        seen.append(name)
    assert len(seen) > 60


def answered(templates, given, form):
    """(an answer that is these calls, what of it the prompt has begun); empty where the template shows no such."""
    if form.whole is None:
        return shown_calls(templates, given), ""
    user = {"role": "user", "content": "Hello"}
    calls = [
        {"id": f"probe000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(given)
    ]
    parameters = {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": ["p"]}
    tools = [{"type": "function", "function": {"name": "t", "description": "d", "parameters": parameters}}]
    prompt = templates.render([user], tools, add_generation_prompt=True)
    for arguments in (dict, json.dumps):
        told = [
            {**one, "function": {**one["function"], "arguments": arguments(one["function"]["arguments"])}}
            for one in calls
        ]
        try:
            whole = templates.render(
                [user, {"role": "assistant", "content": "", "tool_calls": told}], tools, add_generation_prompt=False
            )
        except Exception:
            continue
        if all(name in whole for name, _ in given):
            shared = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
            )
            mark = prompt.rfind("<", 0, shared)
            shared = mark if mark > prompt.rfind(">", 0, shared) else shared  # in the midst of one
            return whole[shared:], form.opening(prompt[:shared])
    return "", ""


def test_derived_thoughts_are_the_known_ones(data):
    """Where a template shows thoughts, the marks that are found in it are those of its family."""
    found = {}
    for name, templates in templates_in(data):
        known = taught_thoughts([*templates.sources.values()])
        if (derived := derived_thoughts(templates)) is not None:
            found[name] = derived.end
            assert known is None or (known.end == derived.end and derived.begins[0] in known.begins), name
    assert len(found) > 20
    assert found["tencent-Hy3.jinja"] == "</think:opensource>"
    assert found["MiniMax-M3.jinja"] == THOUGHT_FORMATS["minimax_m3"].end


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.content }}",
        "<a>{{ m.reasoning }}<b>{{ m.content }}",
        "{{ m.reasoning }}{{ m.content }}",
        "<a>{{ m.reasoning }}<a>{{ m.content }}",
        "<a>{{ m.reasoning }}</a> so: {{ m.content }}",
    ],
)
def test_thoughts_that_cant_be_told_arent_derived(shown):
    source = "{% for m in messages %}<turn>" + shown + "</turn>{% endfor %}"
    assert derived_thoughts(ChatTemplates({"default": source}, {})) is None


VLLM = [
    "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "cohere_command3", "cohere_command4", "ernie45", "glm45",
    "glm47", "granite-20b-fc", "granite", "granite4", "hermes", "poolside_v1", "hunyuan_a13b", "hy_v3", "internlm", "jamba",
    "lfm2", "kimi_k2", "kimi_k3", "llama3_json", "llama4_json", "llama4_pythonic", "longcat", "mimo", "minimax",
    "minimax_m2", "minimax_m3", "minicpm5", "mistral", "olmo3", "openai", "phi4_mini_json", "pythonic", "qwen3_coder",
    "qwen3_xml", "seed_oss", "step3", "step3p5", "inkling", "xlam", "gigachat3", "functiongemma", "gemma4", "apertus",
    "solar_open2",
]  # fmt: skip


@pytest.mark.parametrize("name", VLLM)
def test_vllms_names_are_known(name):
    tools, _ = model_formats(name, "none", None)
    assert tools is not None


@pytest.mark.parametrize(
    "name", ["kimi_k3", "minimax_m3", "openai_gptoss", "hy_v3", "apertus", "ernie45", "step3p5", "inkling"]
)
def test_vllms_names_of_thoughts_are_known(name):
    assert model_formats("auto", name, None)
    with pytest.raises(ConfigError, match=name):
        model_formats("auto", "nonsense", None)


class Call:
    tools, thinks, thinking_budget, sampling = None, False, 5, {}


def test_a_prompt_that_has_begun_a_channel():
    """The budget of thoughts, and what is read first."""
    form, tokens = TOOL_FORMATS["kimi_k3"], Tokens(None)
    tokens.tail = '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>'
    found = reading(Call(), tokens, [1], (form, None))
    assert (found.begun, found.opening) == (True, "<|open|>think<|sep|>")
    assert not constraints(Call(), found, tokens, None)["thoughts"].begin
    reader = found.reader()
    assert [part.kind for part in [*reader.feed("Hm."), *reader.finish()]] == ["reasoning"]
    tokens.tail = "<|open|>response<|sep|>"
    found = reading(Call(), tokens, [1], (form, None))
    assert (found.begun, found.opening) == (False, "<|open|>response<|sep|>")
    with pytest.raises(Exception, match="no thoughts"):
        constraints(Call(), found, tokens, None)
