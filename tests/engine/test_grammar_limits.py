"""What grammars cost: the limits of their work and of what is kept of them, and who waits for whom."""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import re
import threading
import time

import numpy as np
import pytest
from fuzzing import examples
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from waiting import until

from kvasir.engine import SamplingParams
from kvasir.engine.constraint import Constraint
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar import BASE_BYTES, CHARACTER_BYTES, Compiled, Grammar, Grammars
from kvasir.engine.grammar_queue import WAIT_LIMIT_S, Compiling
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.masks import Constraints
from kvasir.engine.request import Request, StructuredOutput
from kvasir.engine.schema import COMPILE_LIMIT_S
from kvasir.engine.step import NewSequence


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutput(json=json.dumps({"enum": [f"{i:x}" * 9 for i in range(27_000)]})),
        StructuredOutput(regex="(a|aa)*(b|[a-c]{1,900}){1,900}" * 20),
        StructuredOutput(regex="((a{1,100}){1,100}){1,100}"),
        StructuredOutput(json=json.dumps({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})),
    ],
)
def test_a_pathological_grammar_costs_little(write, wanted):
    write(None, max_tokens=5)
    began = time.process_time()  # of all threads; what else the machine does isn't in it
    with contextlib.suppress(ClientError):
        write(wanted, max_tokens=5)
    assert time.process_time() - began < 2.0  # a twentieth of it on an idle core


def test_a_grammar_is_waited_for_by_its_sender_only(llm, monkeypatch):
    """Others are answered, however long it is compiled."""
    grammars, before = llm.engine._grammars, llm.engine.stats().generation_tokens
    compile_one = grammars._compile

    def compiled(wanted):
        until(lambda: llm.engine.stats().generation_tokens >= before + 9)
        return compile_one(wanted)

    monkeypatch.setattr(grammars, "_compile", compiled)
    constrained = SamplingParams(max_tokens=5, structured_outputs=StructuredOutput(regex="waited [a-z]+"))
    free = SamplingParams(max_tokens=9, ignore_eos=True)
    waited, _ = llm.generate(["Hello"] * 2, [constrained, free], use_tqdm=False)
    assert waited.outputs[0].text.startswith("w")


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
