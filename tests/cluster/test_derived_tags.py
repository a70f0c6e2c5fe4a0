"""Formats with a tag for each argument that nobody wrote a reader for: derived from the chat template, they read what it shows,
however it is cut, and hold forced calls to their schemas."""

from __future__ import annotations

import jsonschema
import pytest
from grammar_walk import accepts, calls_of, matcher_of, walk
from grammar_walk import read as read_answer

from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer
from kvasir.cluster.derived_format import derived_format, shown_calls, taught_differs
from kvasir.cluster.tool_formats import TOOL_FORMATS, model_formats, taught_tools
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.chat_template import ChatTemplates

HEAD = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}"
TAIL = "</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}"
ITEMS = "{% for k, v in c.function.arguments|items %}"
VALUE = "{{ v if v is string else v|tojson }}"
ESCAPED = "{{ v|e if v is string else v|tojson }}"
SECTION = (
    """{{ "<![CDATA[" + v + "]]>" if v is string and ("<" in v or "\n" in v) else v if v is string else v|tojson }}"""
)
DO, WITH, DONE = '<do what="{{ c.function.name }}">', '<with name="{{ k }}">', "</with>{% endfor %}</do>{% endfor %}"
TEMPLATES = {
    "a name in each tag": CALLS + "<call>\n<fn={{ c.function.name }}>\n" + ITEMS
        + "<arg={{ k }}>\n" + VALUE + "\n</arg>\n{% endfor %}</fn>\n</call>{% endfor %}",
    "two tags": CALLS + "<use>{{ c.function.name }}\n" + ITEMS + "<k>{{ k }}</k>\n<v>" + VALUE
        + "</v>\n{% endfor %}</use>\n{% endfor %}",
    "two tags, bare": CALLS + "<use>{{ c.function.name }}" + ITEMS + "<k>{{ k }}</k><v>" + VALUE
        + "</v>{% endfor %}</use>{% endfor %}",
    "a list": "{% if m.tool_calls %}<calls>\n" + CALLS + DO + "\n" + ITEMS + WITH + VALUE
        + "</with>\n{% endfor %}</do>\n{% endfor %}</calls>{% endif %}",
    "types told": CALLS + DO + ITEMS + '<with name="{{ k }}" text="{{ "yes" if v is string else "no" }}">' + VALUE + DONE,
    "escaped": CALLS + DO + ITEMS + WITH + ESCAPED + DONE,
    "sections": CALLS + DO + ITEMS + WITH + SECTION + DONE,
    "quoted": CALLS + DO + ITEMS + WITH + "{{ v|tojson }}" + DONE,
}  # fmt: skip
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "where": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "where"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "ping"}},
]
GIVEN = [
    ("get_weather", {"city": "Oslo,\nBygdøy", "days": 2, "where": {"name": "</v> & <k>"}, "unit": "c"}),
    ("ping", {}),
    ("get_weather", {"city": "7", "where": {"name": ""}}),
]
ANSWER = "Let me see. <b>"


def template_of(text):
    return ChatTemplates({"default": text}, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(params=TEMPLATES)
def template(request):
    return template_of(HEAD + TEMPLATES[request.param] + TAIL)


def read(form, pieces):
    """(calls, content), whole or in pieces."""
    text = "".join(pieces)
    cuts = (
        [sum(map(len, pieces[:number])) for number in range(1, len(pieces))]
        if isinstance(pieces, list)
        else range(1, len(text))
    )
    answer = read_answer(form, text, {"get_weather": WEATHER}, cuts=cuts)
    return calls_of(answer), answer.content


def test_what_the_template_shows_is_read_at_every_split(template):
    form = derived_format(template)
    assert form.name == "derived"
    text = ANSWER + shown_calls(template, GIVEN).strip()
    whole = read(form, [text])
    assert whole == (GIVEN, ANSWER)
    assert read(form, text) == whole
    for at in range(len(text)):
        assert read(form, [text[:at], text[at:]]) == whole, at


def test_half_a_call_is_what_was_said_of_it(template):
    """Text that ends in the midst of a call: its arguments so far, and never an error."""
    form, text = derived_format(template), shown_calls(template, GIVEN[:1])
    for at in range(len(text)):
        reader = AnswerReader(form, None, schemas={"get_weather": WEATHER})
        answer = ReadAnswer()
        answer.add([*reader.feed(text[:at]), *reader.finish()])
        assert len(answer.calls) <= 1


def test_its_own_calls_are_let_through_and_others_are_not(template):
    form = derived_format(template)
    free, forced = (matcher_of(tool_use(TOOLS, choice), form) for choice in ("auto", "required"))
    arguments = {"city": "Oslo", "days": 2, "where": {"name": "</v> & <k>"}, "unit": "c"}
    cases = [
        ("get_weather", arguments, True),
        ("get_whether", arguments, False),
        ("get_weather", {**arguments, "unit": "k"}, False),
    ]
    for name, given, fits in cases:
        said = shown_calls(template, [(name, given)]).strip()
        assert accepts(forced, said) == accepts(free, ANSWER + said) == fits, said


def test_forced_calls_of_random_weights_fit(template):
    form, ended = derived_format(template), 0
    use = tool_use(TOOLS, "required")
    assert use.held(form).form is form
    matcher = matcher_of(use, form)
    for seed in range(12):
        if (text := walk(matcher, form, seed)) is None:
            continue
        ended += 1
        calls, _ = read(form, [text])
        assert calls
        for name, arguments in calls:
            jsonschema.validate(arguments, WEATHER if name == "get_weather" else {"type": "object"})
    assert ended


def test_known_families_derived_anew_read_the_same(data):
    """What the readers that were written for a family read is what the derived ones read, in their own templates."""
    seen = set()
    for file in sorted(data("chat-templates").rglob("*.jinja*")):
        templates = template_of(file.read_text())
        form, taught = derived_format(templates), taught_tools([file.read_text()])
        if form is None or form.arguments is None:
            continue
        flat = [(name, {key: value for key, value in given.items() if key != "where"}) for name, given in GIVEN]
        shown = shown_calls(templates, flat)
        expected = flat if shown else flat[:1]  # some show one call at most
        shown = shown or shown_calls(templates, expected)
        assert read(form, shown)[0] == expected, file.name
        assert read(form, shown) == read(form, [shown]), file.name
        if taught is None or taught_differs(templates, taught):
            seen.add(file.name)
        elif taught.whole is None:
            assert read(taught, [shown])[0] == expected, file.name
    assert {"tencent-Hy3.jinja", "deepseek-ai-DeepSeek-V4.jinja"} <= seen


def test_a_template_that_shows_another_format_than_its_words_say(data):
    """DeepSeek V4 has V3.2's marks, and another one around them."""

    class Tokens:
        templates = template_of(next(data("chat-templates").rglob("deepseek-ai-DeepSeek-V4.jinja")).read_text())

    tools, _ = model_formats("auto", "auto", Tokens())
    assert tools.begins == ("<｜DSML｜tool_calls>",)
    tools, _ = model_formats("deepseek_v32", "auto", Tokens())
    assert tools is TOOL_FORMATS["deepseek_v32"]


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.tool_calls }}",
        CALLS + "{{ c.function.name }}" + ITEMS + " {{ k }}: {{ v }}{% endfor %}{% endfor %}",
        CALLS + "<do {{ c.function.name }}>" + ITEMS + "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</do>{% endfor %}",
        CALLS + "<do>" + ITEMS + "<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}</do>{% endfor %}",
        CALLS + "<do>{{ c.function.name }}" + ITEMS + "<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}{% endfor %}",
        CALLS + "<do>{{ c.function.name }}" + ITEMS + "<k>{{ k|upper }}</k><v>{{ v }}</v>{% endfor %}</do>{% endfor %}",
        CALLS + "<do>{{ c.function.name }}" + ITEMS + "<k{{ loop.index }}>{{ k }}</k><v>{{ v }}</v>{% endfor %}</do>{% endfor %}",
    ],
)  # fmt: skip
def test_what_can_t_be_told_by_tags_isn_t_derived(shown):
    assert derived_format(template_of(HEAD + shown + TAIL)) is None
