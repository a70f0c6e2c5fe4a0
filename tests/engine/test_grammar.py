"""Structured output through the real engine: what ends fits, what can't be enforced is refused, nobody else waits."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.constraint import Constraint
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar import Compiled, Vocabulary
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.masks import Constraints
from kvasir.engine.request import Request, StructuredOutput
from kvasir.engine.step import NewSequence
from kvasir.engine.thoughts import Thinking, Thoughts
from kvasir.engine.tokenizer import Tokenizer
from kvasir.kernels.bitmask import allow

SMALL = functools.partial(st.lists, st.integers(0, 3))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


TAGGED = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f="],
        "at_least_one": True,
        "stop_after_first": True,
        "tags": [
            {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": {"enum": [1, 2]}}, "end": "</f>"}
        ],
    },
}


def test_only_allowed_tokens_keep_their_logits():
    logits = torch.randn(3, 70)
    masks = torch.zeros(2, 3, dtype=torch.int32)
    masks[0, 0], masks[1, 2], masks[1, 0] = 1 << 5, 1 << 3, -(1 << 31)
    out = allow(logits, torch.tensor([2, 0]), masks)
    assert torch.equal(out[1], logits[1])
    assert (out[2] > -torch.inf).nonzero().flatten().tolist() == [5]
    assert (out[0] > -torch.inf).nonzero().flatten().tolist() == [31, 67]


def test_every_output_that_ends_fits_its_schema(write):
    ended = 0
    for seed in range(10):
        for output in write(StructuredOutput(json=json.dumps(PERSON)), seed=seed, n=2):
            if output.finish_reason == "stop":
                jsonschema.validate(json.loads(output.text), PERSON)
                ended += 1
    assert ended >= 10


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (StructuredOutput(regex="[0-9]{3}-[a-f]{4}"), "[0-9]{3}-[a-f]{4}"),
        (StructuredOutput(choice=["yes", 'n"ö"', "a|b"]), r'yes|n"ö"|a\|b'),
        (StructuredOutput(grammar='root ::= "a" [0-9] [0-9] "z"'), "a[0-9]{2}z"),
        (StructuredOutput(grammar='start: "k" /[0-9]{4}/'), "k[0-9]{4}"),
        (StructuredOutput(structural_tag=json.dumps(TAGGED)), "(.|\n)*"),
        (StructuredOutput(regex=""), ""),
    ],
)
@pytest.mark.parametrize(
    "given", [{}, {"min_tokens": 30}, {"ignore_eos": True}, {"temperature": 0}, {"repetition_penalty": 1.3}]
)
def test_kinds_and_combinations(write, wanted, pattern, given):
    for output in write(wanted, n=2, **given):
        tagged = wanted.structural_tag is not None
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.text)
            assert not tagged or re.search("<f=a>[12]</f>", output.text)
        else:
            assert tagged


def test_special_tokens_are_never_produced_inside(llm, write):
    special = set(llm.get_tokenizer().added_tokens) - set(llm.engine.info.eos_token_ids)
    bias = dict.fromkeys(special, 100.0)
    (output,) = write(StructuredOutput(regex="(.|\n){40}"), logit_bias=bias)
    assert not special & set(output.token_ids)


def test_max_tokens_cuts_and_raw_logprobs_stay(llm, write):
    (output,) = write(StructuredOutput(regex="[a-z]{80}"), max_tokens=3, logprobs=2)
    assert output.finish_reason == "length"
    assert len(output.logprobs) == 3
    assert any(len(entry) == 3 for entry in output.logprobs)  # what was likely without the grammar is told, too
    told = [llm.get_tokenizer().token_bytes(token) for entry in output.logprobs for token in entry]
    assert not all(re.fullmatch(b"[a-z]+", text) for text in told)


@pytest.mark.parametrize("given", [{}, {"ignore_eos": True}, {"min_tokens": 1}])
def test_nothing_is_cut_off_where_the_last_token_ends_it(write, given):
    wanted = StructuredOutput(regex="[0-9]{3}-[a-f]{4}")
    (whole,) = write(wanted, **given)
    for limit, reason in ((len(whole.token_ids), "stop"), (len(whole.token_ids) - 1, "length")):
        (output,) = write(wanted, **given | {"max_tokens": limit})
        assert (output.token_ids, output.finish_reason) == (whole.token_ids[:limit], reason)


def test_stop_strings_end_it_before_the_grammar_does(write):
    (output,) = write(StructuredOutput(choice=["one two three"]), stop=["two"])
    assert (output.text, output.finish_reason) == ("one ", "stop")


def test_a_grammar_begins_behind_the_thoughts(llm, write):
    going_on = dict.fromkeys(llm.engine.info.eos_token_ids, -100.0)
    free = write(None, max_tokens=12, logit_bias=going_on)[0].token_ids
    marker = free[4:6]
    (output,) = write(StructuredOutput(choice=["!done!"]), thoughts=Thoughts(end=marker), logit_bias=going_on)
    assert list(output.token_ids[:6]) == list(free[:6])
    assert llm.get_tokenizer().decode(output.token_ids[6:]) == "!done!"
    assert output.finish_reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        (StructuredOutput(json='{"type": "array", "uniqueItems": true}'), UnsupportedError, "uniqueItems"),
        (StructuredOutput(json='{"if": {"type": "string"}, "then": false}'), UnsupportedError, "if"),
        (StructuredOutput(json='{"x-guidance": {"lenient": true}}'), ClientError, "x-guidance"),
        (StructuredOutput(json='{"oneOf": [{}, {}]}'), UnsupportedError, "oneOf constraints are not supported.$"),
        (StructuredOutput(json='{"maximum": 1e30}'), ClientError, "maximum"),
        (StructuredOutput(json='{"pattern": "(?=a)"}'), UnsupportedError, "pattern: .*look-ahead"),
        (StructuredOutput(json='{"patternProperties": {"a": {}, "b": {}}}'), ClientError, "patternProperties: "),
        (StructuredOutput(json='{"$ref": "http://localhost/a"}'), ClientError, r"\$ref"),
        (StructuredOutput(json='{"enum": []}'), ClientError, "enum"),
        (StructuredOutput(json="{"), ClientError, "isn't JSON"),
        (StructuredOutput(json="[" * 100_000), ClientError, "isn't JSON"),
        (StructuredOutput(json='{"items":' * 90 + "{}" + "}" * 90), ClientError, "levels"),
        (StructuredOutput(regex="(a"), ClientError, "unclosed"),
        (StructuredOutput(regex="(?=a)b"), ClientError, "look-around"),
        (StructuredOutput(grammar='root ::= "a'), ClientError, "grammar"),
        (StructuredOutput(structural_tag="{}"), ClientError, "structures"),
        (
            StructuredOutput(structural_tag='{"elements":[' * 400 + "]}" * 400),
            ClientError,
            "structural tag is nested 128",
        ),
        (StructuredOutput(structural_tag='{"format": {"type": "x"}}'), UnsupportedError, "type 'x'"),
    ],
)
def test_what_cant_be_enforced_is_refused_by_name(write, wanted, error, text):
    with pytest.raises(ClientError, match=text) as caught:
        write(wanted)
    assert isinstance(caught.value, error)


def test_a_count_may_be_written_as_a_float(write):
    """2.0 is 2 in JSON Schema, and some clients (protobuf's Struct) know no integers."""
    (output,) = write(StructuredOutput(json='{"type": "string", "minLength": 2.0, "maxLength": 2.0}'))
    assert len(json.loads(output.text)) == 2


def test_preemption_and_resumption_give_the_same_tokens(llm, write):
    wanted = StructuredOutput(json=json.dumps(PERSON))
    (whole,) = write(wanted, seed=5)
    ids = list(whole.token_ids)
    sampling = SamplingParams(max_tokens=150, seed=5, structured_outputs=wanted)
    prompt = llm.get_tokenizer().encode("Hello")
    request = Request(request_id="r", prompt_token_ids=prompt, sampling=sampling, resume_token_ids=ids[:4])
    (resumed,) = llm._run([(request, None)], False)
    assert list(resumed.outputs[0].token_ids) in (ids, ids[4:])
    cache = llm.engine._executor.loaded.cache
    room = 13 * cache.arena.nbytes // cache.num_blocks
    with LLM("skald", max_num_seqs=8, kv_cache_memory_bytes=room, max_model_len=190) as small:
        wanted = StructuredOutput(regex="([a-z]{2} ){40}")
        many = SamplingParams(max_tokens=150, seed=5, n=6, structured_outputs=wanted)
        crowded = small.generate(["Hello"], many, use_tqdm=False)[0].outputs
        assert small.engine._scheduler.stats().preemptions > 0
    alone = write(wanted, seed=5, n=6)
    assert [o.token_ids for o in crowded] == [o.token_ids for o in alone]


@given(drafted=st.lists(st.sampled_from([ord(c) for c in 'ab"{}:1 ']), max_size=6), data=st.data())
def test_what_is_drafted_fits_as_far_as_the_masks_say(drafted, data):
    """For speculation: asked at once, and one token after the other."""
    wanted = StructuredOutput(
        json=json.dumps({"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]})
    )
    said = '{"a": "b"}'[: data.draw(st.integers(0, 10))].encode()
    thoughts = data.draw(
        st.sampled_from([None, Thoughts(end=[ord("b"), ord("1")], budget=3), Thoughts(begin=[1], end=[2])])
    )
    sampling = SamplingParams(structured_outputs=wanted, thoughts=thoughts)
    new = NewSequence(0, (0, *said), 1, sampling, 0, ())
    tokenizer, grammar = _byte_grammar(wanted)
    constraint, trial, taking = (
        Constraint(new, lambda spent, alone: Compiled(grammar), tokenizer.eos_token) for _ in range(3)
    )
    fits = 0
    for token in drafted:
        words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
        if (matcher := trial.lexing) is not None:
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if trial.holds:
            trial.close(words)
        else:
            words[:] = -1
        has = bool(words[token // 32] >> (token % 32) & 1)
        assert trial.fits(token) == has or trial.over or trial.why is not None or (has and token == tokenizer.eos_token)
        if trial.over or trial.why is not None or not words[token // 32] >> (token % 32) & 1:
            break
        if not taking.take(token):
            assert not trial.fits(token)
            taking.advance(token)
        trial.advance(token)
        assert (taking.over, taking.why, taking.may_end) == (trial.over, trial.why, trial.may_end)
        fits += 1
    if fits < len(drafted) and not trial.over:
        assert not taking.take(drafted[fits])
    assert constraint.fitting(drafted) <= fits
    if thoughts is None:
        assert constraint.fitting(drafted) == fits
    assert constraint.fitting([*drafted, tokenizer.eos_token]) == constraint.fitting(drafted)


MIXED = [
    {"structured_outputs": StructuredOutput(json=json.dumps(PERSON))},
    {"structured_outputs": StructuredOutput(json=json.dumps(PERSON)), "repetition_penalty": 1.4},
    {"structured_outputs": StructuredOutput(regex="[a-z ]*"), "min_tokens": 20},
    {"structured_outputs": StructuredOutput(regex="[a-z ]*"), "logprobs": 2, "stop_token_ids": [300]},
    {"structured_outputs": StructuredOutput(regex="([a-z]+ )*"), "bad_words": ["the"]},
    {"structured_outputs": StructuredOutput(regex="([a-z]+ )*"), "use_beam_search": True, "n": 2, "best_of": 2},
    {"structured_outputs": StructuredOutput(choice=["yes", "no"]), "thoughts": Thoughts(end=[265], budget=5)},
    {"structured_outputs": StructuredOutput(json=json.dumps(PERSON)), "temperature": 0.7, "seed": 3},
    {"structured_outputs": StructuredOutput(regex="[a-z ]*"), "mirostat": 2, "temperature": 0.8, "seed": 3},
    {},
]


@pytest.mark.parametrize("hot", [False, True])
def test_a_likeliest_token_that_fits_is_what_a_mask_would_leave(llm, monkeypatch, hot):
    """Greedy sequences whose token fits need no mask: token for token as with one, alone and among others."""
    sampling = [SamplingParams(**({"temperature": 0, "max_tokens": 40} | more)) for more in MIXED]
    sampling = sampling if hot else [one for one in sampling if one.temperature == 0]
    filled, fill = [], Constraints._fill

    def counted(self, seats):
        filled.append(len(seats))
        return fill(self, seats)

    monkeypatch.setattr(Constraints, "_fill", counted)
    prompts = [f"{number} times" for number in range(len(sampling))]

    def outputs():
        filled.clear()
        found = llm.generate(prompts, sampling, use_tqdm=False)
        return [[(one.token_ids, one.finish_reason) for one in each.outputs] for each in found], sum(filled)

    lazy, few = outputs()
    monkeypatch.setattr(Constraints, "looks", False)
    masked, many = outputs()
    assert lazy == masked
    assert few < many * 0.7


@functools.cache
def _byte_grammar(wanted):
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar_text(wanted, {}), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return tokenizer, matcher


def test_without_a_tokenizer_it_is_refused():
    with (
        LLM("skald", skip_tokenizer_init=True) as llm,
        pytest.raises(UnsupportedError, match="skip_tokenizer_init"),
    ):
        llm.generate([[1, 2]], SamplingParams(structured_outputs=StructuredOutput(json_object=True)), use_tqdm=False)


def test_a_text_s_first_space_is_no_part_of_what_is_forced(data: Callable[[str], Path]) -> None:
    """SentencePiece writes one before every text; inside of a grammar it would be a token that doesn't fit."""
    tokenizer = Tokenizer.load(data("model-stories260k/hf"))
    vocabulary = Vocabulary(tokenizer, 512, (2,))
    assert [tokenizer.token_bytes(token) for token in vocabulary("{")] == [b"{"]
    assert vocabulary.compiled.tokenize_str("{") == vocabulary("{")
    assert b"".join(tokenizer.token_bytes(token) for token in vocabulary._longest(b'{"once": 1}')) == b'{"once": 1}'


def test_thoughts_come_first_or_not_at_all(llm, write):
    """Where a model may think or not, its answer is held to the grammar in either case, and it can't end in its thoughts."""
    tokenizer = llm.get_tokenizer()
    begin, end = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("{", "}"))
    thoughts = Thoughts(begin=[begin], end=[end])
    wanted = StructuredOutput(choice=["yes", "no"])
    (plain,) = write(wanted, thoughts=thoughts, logit_bias={begin: -100.0})
    assert plain.text in ("yes", "no")
    eos = llm.engine.info.eos_token_ids
    (thinking,) = write(
        wanted, thoughts=thoughts, max_tokens=60, logit_bias={begin: 100.0, end: -100.0} | dict.fromkeys(eos, 90.0)
    )
    assert thinking.token_ids[0] == begin
    assert thinking.finish_reason == "length"
    (ended,) = write(wanted, thoughts=thoughts, logit_bias={begin: 50.0, end: 60.0})
    assert tokenizer.decode(ended.token_ids[2:]) in ("yes", "no")
    assert list(ended.token_ids[:2]) == [begin, end]


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_ends_thoughts(llm, write, budget):
    tokenizer = llm.get_tokenizer()
    end = tokenizer.encode("The end", add_special_tokens=False)
    going_on = dict.fromkeys(llm.engine.info.eos_token_ids, -100.0)
    (free,) = write(None, max_tokens=30, thoughts=Thoughts(end=end, budget=budget), logit_bias=going_on)
    assert list(free.token_ids[budget : budget + len(end)]) == end
    assert len(free.token_ids) > budget + len(end)
    (held,) = write(StructuredOutput(choice=["yes", "no"]), thoughts=Thoughts(end=end, budget=budget))
    assert tokenizer.decode(held.token_ids[budget + len(end) :]) in ("yes", "no")


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_thinking_is_a_search_for_its_marks(tokens, begin, end):
    """Against the plain definition over the whole list."""
    thinking, answer = Thinking(Thoughts(begin=begin, end=end)), []
    for token in tokens:
        if thinking.over:
            answer.append(token)
        else:
            answer += thinking.advance(token)
    rest = tokens
    if tokens[: len(begin)] == begin[: len(tokens)]:
        places = [at for at in range(len(begin), len(tokens) - len(end) + 1) if tokens[at : at + len(end)] == end]
        rest = tokens[places[0] + len(end) :] if places else []
    assert answer == rest
