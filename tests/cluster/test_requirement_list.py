"""What becomes of every sampling parameter, request field and option that Kvasir must know, in each dialect: typed out here,
sent to the dialect's parser, and looked for in what the parser understood. Nothing is accepted and ignored silently."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvasir.cluster import anthropic_schema, ollama_schema, openai_schema, pooling_schema, responses_schema
from kvasir.cluster.open_inference_schema import parse_inference
from kvasir.engine.errors import ClientError
from kvasir.engine.prompt_cut import WHAT_FITS
from kvasir.engine.request import SamplingParams, StructuredOutput
from kvasir.proto import open_inference_pb2 as pb

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
FORMAT = {"type": "json_object"}


def kserve(fields):
    request = pb.ModelInferRequest(model_name="m")
    for name, value in (("text_input", "Hi"), ("sampling_parameters", json.dumps(fields))):
        request.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(value.encode())
    return parse_inference(request).ask


PARSERS = {
    "chat": lambda fields: openai_schema.parse_chat({"messages": USER, **fields}),
    "text": lambda fields: openai_schema.parse_completion({"prompt": "Hi", **fields}),
    "responses": lambda fields: responses_schema.parse_response({"input": "Hi", **fields}),
    "anthropic": lambda fields: anthropic_schema.parse_messages({"max_tokens": 9, "messages": USER, **fields}),
    "options": lambda fields: ollama_schema.parse_chat({"messages": USER, "options": fields}),
    "kserve": kserve,
    "generate": lambda fields: ollama_schema.parse_generate({"prompt": "Hi", **fields}),
    "ollama chat": lambda fields: ollama_schema.parse_chat({"messages": USER, **fields}),
    "embed": lambda fields: ollama_schema.parse_embed({"input": "Hi", **fields}),
    "api embeddings": lambda fields: ollama_schema.parse_embeddings({"prompt": "Hi", **fields}),
    "embeddings": lambda fields: pooling_schema.parse_embeddings({"input": "Hi", **fields}),
}
SAMPLING_DIALECTS = ("chat", "text", "responses", "anthropic", "options", "kserve")
"""Of the first table; D: done, R: refused by name, W: named in a warning."""
SAMPLING_NAMES = """
temperature                   0.5                        D D D D D D
top_p                         0.5                        D D D D D D
top_k                         5                          D D D D D D
min_p                         0.5                        D D D R D D
frequency_penalty             0.5                        D D D R D D
presence_penalty              0.5                        D D D R D D
repetition_penalty            1.5                        D D D R R D
max_tokens                    7                          D D R D R D
max_completion_tokens         7                          D R R R R R
stop                          ["x"]                      D D D R D D
seed                          5                          D D D R D D
n                             2                          D D R R R D
best_of                       2                          D D R R D D
use_beam_search               true                       D D R R D D
length_penalty                2.0                        D D R R D D
early_stopping                true                       D D R R D D
logprobs                      true                       D R R R R R
prompt_logprobs               3                          D D R R R R
skip_special_tokens           false                      D D R R D D
spaces_between_special_tokens false                      D D R R D D
guided_json                   {"type":"object"}          D D R R R D
guided_regex                  "a"                        D D R R R D
guided_choice                 ["a"]                      D D R R R D
guided_grammar                "root::=\\"a\\""           D D R R R D
structured_outputs            {"regex":"a"}              D D R R R D
structural_tag                {"type":"structural_tag"}  D D R R R D
response_format               {"type":"json_object"}     D D R R R D
top_logprobs                  5                          D R D R R R
extra_body                    {"top_k":5}                D D D D D R
stream                        true                       D D D D W R
tools                         "TOOLS"                    D R D D R R
tool_choice                   "CHOICE"                   D R D D R R
stop_token_ids                [5]                        D D D R D D
ignore_eos                    true                       D D D R D D
min_tokens                    2                          D D R R D D
include_stop_str_in_output    true                       D D R R D D
logit_bias                    {"5":1.0}                  D D R R D D
allowed_token_ids             [5]                        D D R R D D
bad_words                     ["x"]                      D D R R D D
logprob_token_ids             [5]                        R R R R R R
prompt_logprob_start          2                          D D R R D D
flat_logprobs                 true                       R R R R R R
truncate_prompt_tokens        9                          D D R R D D
truncation_side               "right"                    D D R R D D
return_token_ids              true                       D D W W W R
return_offsets                true                       R R R R R R
thinking_token_budget         9                          D R D R R R
reasoning_effort              "low"                      D R R R R R
repetition_detection          {"a":1}                    R R R R R R
priority                      3                          D D D W W D
cache_salt                    "s"                        D D D D D D
session_id                    "s"                        D D W W W R
request_id                    "r"                        D D D W W R
vllm_xargs                    {"a":1}                    R R R R R R
kv_transfer_params            {"a":1}                    R R R R R R
watermarking                  true                       R R R R R R
stream_interval               5                          W W W W W R
skip_reading_prefix_cache     true                       W W W W W R
prompt_embeds                 "x"                        R R R R R R
echo                          true                       D D R R R R
add_generation_prompt         false                      D R R R R R
continue_final_message        true                       D R R R R R
documents                     [{"a":"b"}]                R R R R R R
chat_template                 "x"                        R R R R R R
chat_template_kwargs          {"a":1}                    D R D R R R
mm_processor_kwargs           {"a":1}                    R R R R R R
repeat_penalty                1.5                        R R R R D R
num_predict                   7                          R R R R D R
repeat_last_n                 3                          D D R R D D
num_ctx                       77                         R R R R D R
num_gpu                       1                          W W W W W R
num_thread                    1                          W W W W W R
num_batch                     1                          W W W W W R
mirostat                      2                          D D R R D D
mirostat_eta                  0.2                        D D R R D D
mirostat_tau                  4.0                        D D R R D D
tfs_z                         0.5                        D D R R D D
typical_p                     0.5                        D D R R D D
use_mlock                     true                       W W W W W R
num_keep                      4                          D D R R D D
penalize_newline              false                      D D R R D D
main_gpu                      1                          W W W W W R
use_mmap                      true                       W W W W W R
draft_num_predict             4                          W W W W W R
suffix                        "x"                        W D W W W R
"""
REQUEST_DIALECTS = ("generate", "ollama chat", "embed", "api embeddings", "embeddings")
"""Of the second: what stands beside a prompt, at its places in Ollama's dialect and at /v1/embeddings."""
REQUEST_NAMES = """
model              "m"                D D D D D
prompt             "Ho"               D R R D W
messages           "MESSAGES"         R D R R R
stream             false              D D W W W
options            {"top_k":5}        D D W W W
format             "json"             D D W W W
images             ["x"]              R R R R R
tools              "TOOLS"            R D W W W
input              ["Ho"]             W W D R D
think              true               D D W W W
keep_alive         "5m"               W W W W W
raw                true               D R W W W
suffix             "x"                D R W W W
context            [5]                D R W W W
system             "x"                D R W W W
template           "{%x%}messages"    D R W W W
truncate           true               D D D W W
shift              true               W W W W W
logprobs           true               D D W W W
top_logprobs       5                  D D W W W
dimensions         5                  W W D W D
_debug_render_only true               R R R R W
temperature        0.5                R R R R W
stop               ["x"]              R R R R W
"""
VALUES = {"TOOLS": [TOOL], "CHOICE": "required", "MESSAGES": [{"role": "user", "content": "Ho"}]}
"""Stand for values with blanks."""
VALUES_OF = {
    ("tools", "anthropic"): [{"name": "f", "input_schema": {"type": "object"}}],
    ("tools", "responses"): [{"type": "function", "name": "f"}],
    ("tool_choice", "anthropic"): {"type": "any"},
}
BESIDE = {
    "best_of": {"seed": 3},
    "length_penalty": {"use_beam_search": True},
    "early_stopping": {"use_beam_search": True},
    "mirostat_eta": {"mirostat": 2},
    "mirostat_tau": {"mirostat": 2},
    "top_logprobs": {"logprobs": True},
    "truncation_side": {"truncate_prompt_tokens": 9},
    "num_keep": {"truncate_prompt_tokens": 9},
    "include_stop_str_in_output": {"stop": ["x"]},
}
"""What a field means nothing without."""
BESIDE_OF = {("top_logprobs", "responses"): {"include": ["message.output_text.logprobs"]}}
BECOMES = {
    "max_completion_tokens": ("max_tokens", 7),
    "num_predict": ("max_tokens", 7),
    "repeat_penalty": ("repetition_penalty", 1.5),
    "stop": ("stop", ("x",)),
    "early_stopping": ("early_stopping", "yes"),
    "guided_json": ("structured_outputs", StructuredOutput(json='{"type": "object"}')),
    "guided_regex": ("structured_outputs", StructuredOutput(regex="a")),
    "guided_choice": ("structured_outputs", StructuredOutput(choice=("a",))),
    "guided_grammar": ("structured_outputs", StructuredOutput(grammar='root::="a"')),
    "structured_outputs": ("structured_outputs", StructuredOutput(regex="a")),
    "structural_tag": ("structured_outputs", StructuredOutput(structural_tag='{"type": "structural_tag"}')),
    "response_format": ("structured_outputs", StructuredOutput(json_object=True)),
    "format": ("structured_outputs", StructuredOutput(json_object=True)),
    "logprobs": ("logprobs", 0),
    "top_logprobs": ("logprobs", 5),
    "prompt_logprobs": ("prompt_logprobs", 3),
    "extra_body": ("top_k", 5),
    "options": ("top_k", 5),
    "logit_bias": ("logit_bias", {5: 1.0}),
    "session_id": ("session", "s"),
    "thinking_token_budget": ("thinking_budget", 9),
    "chat_template_kwargs": ("a", 1),
    "think": ("thinks", True),
    "tool_choice": ("required", True),
    "tools": ("names", ("f",)),
    "template": ("chat_template", "{%x%}messages"),
    "prompt": ("messages", [{"role": "user", "content": "Ho"}]),
    "system": ("messages", [{"role": "system", "content": "x"}, *USER]),
    "messages": ("messages", [{"role": "user", "content": "Ho"}]),
    "raw": ("text", "Hi"),
}
"""Name -> (where it is found, as what); others are found by their own name as they were sent."""
BECOMES_OF = {
    ("truncate", "generate"): ("truncate_prompt_tokens", WHAT_FITS),
    ("truncate", "ollama chat"): ("truncate_prompt_tokens", WHAT_FITS),
    ("input", "embed"): ("texts", ["Ho"]),
    ("prompt", "api embeddings"): ("texts", ["Ho"]),
    ("input", "embeddings"): ("text", "Ho"),
}


def rows(table, dialects):
    """(name, value, dialect, fate) of each."""
    for line in table.split("\n"):
        if line:
            name, value, *fates = line.split()
            assert len(fates) == len(dialects), line
            value = json.loads(value)
            value = VALUES.get(value, value) if isinstance(value, str) else value
            for dialect, fate in zip(dialects, fates, strict=True):
                yield pytest.param(name, VALUES_OF.get((name, dialect), value), dialect, fate, id=f"{dialect}-{name}")


def facts(found):
    """All that a parser understood, by name: of its answer, the call, the conversation, the sampling."""
    flat = {}
    parts = [found]
    while parts:
        part = parts.pop(0)
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        for name in ("variables", "sampling"):
            fields |= fields.pop(name, None) or {}
        parts += [value for value in fields.values() if dataclasses.is_dataclass(value)]
        inner = [*(fields.get("prompts") or ()), *(fields.get("inputs") or ())]
        parts += [value for value in inner if dataclasses.is_dataclass(value)]
        flat = {**fields, **flat}
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    sampling = SamplingParams(**{name: value for name, value in sampling_of(found).items() if name in known})
    return flat | {name: getattr(sampling, name) for name in sampling_of(found)}


def sampling_of(found):
    return getattr(found, "sampling", None) or getattr(getattr(found, "call", None), "sampling", None) or {}


@pytest.mark.parametrize(
    ("name", "value", "dialect", "fate"),
    [*rows(SAMPLING_NAMES, SAMPLING_DIALECTS), *rows(REQUEST_NAMES, REQUEST_DIALECTS)],
)
def test_what_becomes_of(name, value, dialect, fate):
    parse = PARSERS[dialect]
    if fate == "R":
        with pytest.raises(ClientError) as caught:
            facts(parse({name: value}))
        assert caught.value.param == name
        assert name in caught.value.message
        return
    beside = BESIDE_OF.get((name, dialect), BESIDE.get(name, {})) if fate == "D" else {}
    if name == "tool_choice" and fate == "D":
        beside = {"tools": VALUES_OF.get(("tools", dialect), [TOOL])}
    found = parse({**beside, name: value})
    warned = [text for text in found.warnings if name in text]
    if fate == "W":
        assert warned
        return
    assert not warned or name == "reasoning_effort"  # it depends on the template
    where, wanted = BECOMES_OF.get((name, dialect), BECOMES.get(name, (name, value)))
    got = facts(found)[where]
    assert (list(got) if isinstance(got, tuple) else got) == (list(wanted) if isinstance(wanted, tuple) else wanted)


@pytest.mark.parametrize(
    ("dialect", "fields", "said"),
    [
        ("chat", {"length_penalty": 2.0}, "length_penalty (needs use_beam_search)"),
        ("text", {"early_stopping": True, "use_beam_search": False}, "early_stopping (needs use_beam_search)"),
        ("options", {"mirostat_tau": 4.0}, "options.mirostat_tau (needs mirostat)"),
        ("kserve", {"mirostat_eta": 0.2}, "mirostat_eta (needs mirostat)"),
        ("chat", {"parallel_tool_calls": True}, "parallel_tool_calls (needs tools)"),
        ("responses", {"parallel_tool_calls": True}, "parallel_tool_calls (needs tools)"),
        ("text", {"truncation_side": "left"}, "truncation_side (needs truncate_prompt_tokens)"),
        ("options", {"num_keep": 5}, "options.num_keep (needs truncate_prompt_tokens)"),
        ("chat", {"include_stop_str_in_output": True}, "include_stop_str_in_output (needs stop)"),
        ("chat", {"use_beam_search": True, "best_of": 2, "temperature": 0.5}, "temperature (beams aren't drawn)"),
        ("options", {"mirostat": 2, "use_beam_search": True, "best_of": 2}, "options.mirostat (beams aren't drawn)"),
    ],
)
def test_what_means_nothing_beside_the_others_is_told(dialect, fields, said):
    assert PARSERS[dialect](fields).warnings == (said,)


@pytest.mark.parametrize(
    ("dialect", "fields", "named"),
    [
        ("generate", {"raw": True, "think": True}, "think"),
        ("generate", {"suffix": "x", "think": "low"}, "think"),
        ("generate", {"raw": True, "system": "x"}, "system"),
        ("ollama chat", {"messages": [{**USER[0], "images": ["aGk="]}]}, "messages[0].images"),
        ("chat", {"top_logprobs": 5}, "top_logprobs"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ("chat", {"use_beam_search": True, "best_of": 1, "n": 2}, "best_of"),
        ("generate", {"top_logprobs": 5}, "top_logprobs"),
    ],
)
def test_what_contradicts_itself_is_refused(dialect, fields, named):
    with pytest.raises(ClientError) as caught:
        facts(PARSERS[dialect](fields))
    assert caught.value.param == named


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("generate", {"raw": True, "think": False}),
        ("options", {"num_predict": -1, "seed": -1}),
        ("options", {"num_predict": -2}),
        ("ollama chat", {"truncate": True, "options": {"num_keep": 5}}),
        ("text", {"tools": [], "tool_choice": "auto", "messages": []}),
        ("chat", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}),
    ],
)
def test_what_says_nothing_passes_in_silence(dialect, fields):
    found = PARSERS[dialect](fields)
    assert found.warnings == ()
    assert sampling_of(found).get("max_tokens") is None
    assert "seed" not in sampling_of(found)


@pytest.mark.parametrize(
    ("dialect", "name", "use"),
    [
        *((dialect, "num_predict", "max_tokens") for dialect in ("chat", "text")),
        *((dialect, "repeat_penalty", "repetition_penalty") for dialect in ("chat", "text", "responses")),
        ("responses", "num_predict", "max_output_tokens"),
        ("text", "tools", "/v1/chat/completions"),
        ("generate", "tools", "/api/chat"),
        ("generate", "messages", "/api/chat"),
        ("generate", "temperature", "options.temperature"),
        ("generate", "max_tokens", "options.num_predict"),
        ("ollama chat", "system", "a message of the role system"),
        ("embed", "images", "input, which takes texts"),
        ("api embeddings", "input", "prompt, which takes a text"),
    ],
)
def test_a_refusal_says_what_to_use(dialect, name, use):
    with pytest.raises(ClientError, match=f"{name} isn't supported.*; use {use}"):
        PARSERS[dialect]({name: [{"a": "b"}]})


RANGES = {
    "temperature": (-0.1, "warm"), "top_p": (-0.1, 1.1), "top_k": (-2, 0.5), "min_p": (-0.1, 1.1), "n": (0, 16385),
    "frequency_penalty": (-2.1, 2.1), "presence_penalty": (-2.1, 2.1), "repetition_penalty": (0, "x"), "seed": ("x", 0.5),
    "max_tokens": (-1, 0.5), "best_of": (0, "x"), "logprobs": (-1, 21), "prompt_logprobs": (-2, 21), "stop": (5, [5]),
    "skip_special_tokens": ("yes", 1), "use_beam_search": ("yes", 1), "guided_choice": ([], "a"), "min_tokens": (-1, 0.5),
}  # fmt: skip
"""Name -> values outside what it may be."""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RANGES.items() for value in values])
@pytest.mark.parametrize("dialect", ["text", "kserve"])
def test_ranges(dialect, name, value):
    with pytest.raises(ClientError) as caught:
        facts(PARSERS[dialect]({name: value}))
    assert caught.value.param == name
