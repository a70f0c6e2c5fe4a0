"""Structured output through the real engine: what ends fits, what can't be enforced is refused, nobody else waits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.constraint import Constraint
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar import BASE_BYTES, CHARACTER_BYTES, Compiled, Grammar, Grammars, Vocabulary
from kvasir.engine.grammar_queue import WAIT_LIMIT_S, Compiling
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.masks import Constraints
from kvasir.engine.request import Request, StructuredOutput
from kvasir.engine.schema import COMPILE_LIMIT_S
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


@pytest.fixture(scope="module")
def llm():
    with LLM("skald", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def write(llm):
    """`write(StructuredOutput | None, ...)`: outputs of one request at temperature 1."""

    def run(wanted, **given):
        sampling = SamplingParams(**{"max_tokens": 150, "seed": 1, **given}, structured_outputs=wanted)
        return llm.generate(["Hello"], sampling, use_tqdm=False)[0].outputs

    return run


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


def test_max_tokens_cuts_and_raw_logprobs_stay(write):
    (output,) = write(StructuredOutput(regex="[a-z]{80}"), max_tokens=3, logprobs=2)
    assert output.finish_reason == "length"
    assert len(output.logprobs) == 3
    assert any(len(entry) == 3 for entry in output.logprobs)  # what was likely without the grammar is told, too


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


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutput(json=json.dumps({"enum": [f"{i:x}" * 9 for i in range(30_000)]})),
        StructuredOutput(regex="(a|aa)*(b|[a-c]{1,900}){1,900}" * 20),
        StructuredOutput(regex="((a{1,100}){1,100}){1,100}"),
        StructuredOutput(json=json.dumps({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})),
    ],
)
def test_a_pathological_grammar_costs_its_sender_only(llm, write, wanted):
    write(None, max_tokens=5)
    done, slowest = threading.Event(), [0.0]

    def watch():
        while not done.wait(0.05):
            slowest.append(time.monotonic() - llm.engine.heartbeat)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with contextlib.suppress(ClientError):
        write(wanted, max_tokens=5)
    done.set()
    watcher.join()
    assert max(slowest) < 1.0  # the loop went on turning: its idle turn takes 0.2 s


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


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_output_whose_grammar_leaves_its_limits_doesn_t_seem_to_be_whole(llm, write, monkeypatch, temperature):
    """A mask that can't be made any more has the model's end alone."""
    limits = LLParserLimits(step_max_items=60, max_lexer_states=50_000, verbose_errors=False)
    monkeypatch.setattr("kvasir.engine.grammar.LIMITS", limits)
    ambiguous = StructuredOutput(grammar=f'start: s "b"\ns: s s | "a" | "a" s | /x{{{temperature}}}/')
    going_on = {llm.get_tokenizer().encode("b", add_special_tokens=False)[0]: -100.0}
    with pytest.raises(ClientError, match=r"can't go on: .*Too many items"):
        write(ambiguous, temperature=temperature, logit_bias=going_on)


def test_what_all_requests_with_a_grammar_have_come_to_does_not_use_up_the_limit_of_each(llm, write, monkeypatch):
    """Copies of a grammar share their lexer's states, of which there are 2 ** 13 here, 40 or so of them new in each output."""
    monkeypatch.setattr("kvasir.engine.grammar.LIMITS", LLParserLimits(max_lexer_states=500, verbose_errors=False))
    grammars = llm.engine._grammars
    compiled, compile_one = [], grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda wanted: compiled.append(wanted) or compile_one(wanted))
    wanted = StructuredOutput(regex="[ab]*a[ab]{12}c")
    going_on = {llm.get_tokenizer().encode("c", add_special_tokens=False)[0]: -100.0}
    for seed in range(21):
        (output,) = write(wanted, temperature=(1, 1, 0)[seed % 3], seed=seed, max_tokens=60, logit_bias=going_on)
        assert (set(output.text) <= {"a", "b"}, len(output.token_ids)) == (True, 60)
    assert len(compiled) > 2


BYTES = LLTokenizer("byte")
SPENDING = "[ab]*a[ab]{12}c"
"""A regular expression of 2 ** 13 states."""


def _beginning(states):
    """(begin of a Constraint under SPENDING, all copies of which may come to so many states together; what it compiled)"""
    wanted, compiled = StructuredOutput(regex=SPENDING), []
    limits = LLParserLimits(max_lexer_states=states, verbose_errors=False)

    def begin(spent, alone):
        if alone or not compiled or spent is compiled[-1]:
            made = Compiled(LLMatcher(BYTES, grammar_text(wanted, {}), log_level=0, limits=limits))
            if alone:
                return made
            compiled.append(made)
        return compiled[-1]

    return begin, compiled


def _constraint(begin, said=()):
    """Of a sequence that said these bytes."""
    sampling = SamplingParams(structured_outputs=StructuredOutput(regex=SPENDING))
    return Constraint(NewSequence(0, (0, *said), 1, sampling, 0, ()), begin, BYTES.eos_token)


def test_a_token_that_does_not_fit_compiles_nothing():
    begin, compiled = _beginning(300)
    constraint = _constraint(begin, b"a" * 70)
    constraint.advance(ord("z"))
    assert constraint.why == "structured output: token 122 does not fit the grammar"
    assert len(compiled) == 1


@pytest.mark.parametrize("taking", [False, True])
def test_a_grammar_s_last_token_is_taken_though_others_used_up_the_limit(taking):
    """After the mask that allowed it was made."""
    begin, compiled = _beginning(300)
    constraint = _constraint(begin, b"b" * 70 + b"a" * 13)
    other, drawn = compiled[0].matcher.deep_copy(), random.Random(1)
    constraint.matcher.compute_bitmask()
    while not other.is_error():
        other.compute_bitmask()
        other.try_consume_tokens([drawn.choice(b"ab")])
    assert not taking or not constraint.take(ord("c"))
    constraint.advance(ord("c"))
    assert (constraint.over, constraint.why, len(compiled)) == (True, None, 2)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(examples(4)))
def test_sequences_with_one_grammar_are_told_what_each_is_told_alone(seed, apart):
    """Together they come to more states than are allowed, again and again; each alone to a part of them."""
    draw, begin, unbounded = random.Random(seed), _beginning(300)[0], _beginning(10**6)[0]
    together, alone = Constraints(8, BYTES.vocab_size, apart=apart), [_constraint(unbounded) for _ in range(8)]
    for seat in range(8):
        together.enter(seat, _constraint(begin))
    live = [*range(8)]
    for _ in range(60):
        likeliest = draw.choices([-1, *b"aabbz"], k=len(live))
        rows, masks = together.masks(np.array(live), None if apart else likeliest)
        made, tokens = dict(zip(rows.tolist(), masks, strict=True)), []
        for row, seat in enumerate(live):
            alone[seat].fill(words := np.zeros(-(-BYTES.vocab_size // 32), np.int32))
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            if row in made:
                assert made[row].tolist() == words.tolist()
            else:
                assert likeliest[row] in allowed
            ending = draw.random() < 0.1
            likely = [token for token in allowed if token != ord("c") or ending]
            tokens.append(draw.choice(likely) if row in made else likeliest[row])
            alone[seat].advance(tokens[-1])
        ended = together.advance(np.array(live), lambda tokens=tokens: tokens)
        assert (ended.result() if ended else {}) == {row: None for row, seat in enumerate(live) if alone[seat].over}
        live = [seat for seat in live if not alone[seat].over]


def test_a_panic_of_the_library_is_told_to_whoever_waits(llm, monkeypatch):
    class Panic(BaseException):
        pass

    def panics(wanted):
        raise Panic("byte 100 is within a letter")

    grammars, wanted = llm.engine._grammars, StructuredOutput(regex="panic")
    monkeypatch.setattr(grammars, "_compile", panics)
    assert isinstance(grammars.hold(wanted).future.exception(60), Panic)
    grammars.release(wanted)


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


def test_more_grammars_at_once_than_are_kept(llm, monkeypatch):
    """Those that wait push each other out of no cache, and each waits for its own turn alone."""
    monkeypatch.setattr("kvasir.engine.grammar.KEPT_BYTES", 20 << 20)
    sampling = [
        SamplingParams(max_tokens=8, structured_outputs=StructuredOutput(regex=f"{number}[a-z]"))
        for number in range(60)
    ]
    outputs = llm.generate(["Hello"] * 60, sampling, use_tqdm=False)
    for number, output in enumerate(outputs):
        assert re.fullmatch(f"{number}[a-z]", output.outputs[0].text)
    grammars = llm.engine._grammars
    assert not grammars._used
    assert 15 < len(grammars._kept) < 20


@pytest.fixture
def grammars(monkeypatch):
    """Of 8 MiB, without a compiler."""
    monkeypatch.setattr("kvasir.engine.grammar.KEPT_BYTES", 8 << 20)
    found = Grammars(lambda: None, 10, [0])
    monkeypatch.setattr(found, "_compile", lambda wanted: Compiled(wanted))
    yield found
    found.shutdown()


def test_what_is_kept_is_bounded_by_what_it_holds(grammars):
    """The least recently used go first, and none that is used."""

    def hold(name, said=0):
        found = grammars.hold(wanted := StructuredOutput(regex=name))
        found.future.result(60)
        found.compiled.said += said
        return wanted

    used = hold("used", said=10**6)
    for name in (*"abcdefgha", "x" * 2**15, "b"):
        grammars.release(hold(name))
    assert [wanted.regex for wanted in grammars._kept] == [*"gha", "x" * 2**15, "b"]
    grammars.release(hold("a", said=2**11))
    assert [wanted.regex for wanted in grammars._kept] == ["x" * 2**15, "b", "a"]
    assert grammars.compiled(used).matcher == used
    grammars.release(used)
    assert not grammars._kept


def test_what_is_used_and_held_by_nobody_counts_as_it_grows(grammars):
    """As on ranks apart."""
    a, b, c = (StructuredOutput(regex=name) for name in "abc")
    for wanted in (a, b, c, a):
        compiled = grammars.compiled(wanted)
    assert [*grammars._kept] == [b, c, a]
    compiled.said += 10**4
    assert grammars.compiled(b).matcher == b
    assert [*grammars._kept] == [b]
    assert grammars.compiled(a) is not compiled


class Allocated(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(f"field {number}", ctypes.c_size_t) for number in range(10)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library doesn't say what is allocated")
@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutput(json=json.dumps({"enum": [f"{i:x}" * 9 for i in range(3000)]})),
        StructuredOutput(regex="[ab]*a[ab]{15}c"),
    ],
)
def test_what_a_grammar_is_said_to_hold(llm, wanted):
    """Against the allocator: memory is what the limit is about."""
    allocated, vocabulary, drawn = ctypes.CDLL(None).mallinfo2, llm.engine._grammars.vocabulary(), random.Random(1)
    allocated.restype = Allocated

    def held():
        said = allocated()
        return getattr(said, "field 4") + getattr(said, "field 7")  # mapped, and in use

    before, compiled = held(), Compiled(LLMatcher(vocabulary.compiled, grammar_text(wanted, {}), log_level=0))
    words = np.zeros(-(-vocabulary.size // 32), np.int32)
    while compiled.said < 4000:
        matcher = compiled.matcher.deep_copy()
        for _ in range(50):
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            compiled.said += matcher.consume_token(
                int(drawn.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))))
            )
    said = BASE_BYTES + CHARACTER_BYTES * len(repr(wanted)) + Grammar(compiled=compiled).states_bytes
    assert 0.25 < (held() - before) / said < 1.5


def test_a_grammar_that_nobody_waits_for_any_more_isn_t_compiled():
    started, go_on = threading.Event(), threading.Event()

    def tokenizer():
        started.set()
        assert go_on.wait(60)
        raise UnsupportedError("no tokenizer", param="structured_outputs")

    grammars = Grammars(tokenizer, 10, [0])
    wanted = [StructuredOutput(regex=f"{number}") for number in range(4)]
    held = [grammars.hold(one) for one in wanted]
    assert grammars.hold(wanted[3]) is held[3]
    assert started.wait(60)
    grammars.release(wanted[2])
    grammars.release(wanted[3])
    assert held[2].future.cancelled()
    assert not held[3].future.done()
    go_on.set()
    for one in (held[0], held[1], held[3]):
        with pytest.raises(UnsupportedError):
            one.future.result(60)
    grammars.shutdown()


@pytest.mark.parametrize(
    ("begun", "deadline_s", "late", "code"),
    [
        (None, None, WAIT_LIMIT_S, "overloaded"),
        (None, 5.0, 5.0, "deadline_exceeded"),
        (1000.0, None, COMPILE_LIMIT_S, "invalid_request_error"),
        (1040.0, None, 40.0 + COMPILE_LIMIT_S, "invalid_request_error"),
    ],
)
def test_waiting_for_others_isn_t_compiling(begun, deadline_s, late, code):
    class Slow:
        def hold(self, wanted):
            return grammar

        def release(self, wanted):
            released.append(wanted)

    grammar, released, wanted = Grammar(), [], StructuredOutput(regex="a")
    grammar.begun = begun
    compiling = Compiling(Slow())
    sampling = SamplingParams(structured_outputs=wanted)
    request = Request(request_id="one", prompt_token_ids=[1], sampling=sampling, deadline_s=deadline_s)
    compiling.add(request, wanted, 1000.0)
    assert compiling.take(1000.0 + late - 0.1) == ([], [])
    _, (failed,) = compiling.take(1000.0 + late)
    assert failed.code == code
    compiling.end("one")
    compiling.end("one")
    assert released == [wanted]


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
