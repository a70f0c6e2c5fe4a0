"""Grammars that another rank compiles: ready before a step needs them, in threads beside the steps."""

from __future__ import annotations

import threading

import pytest
from waiting import until

from kvasir.engine.errors import ServerError, UnsupportedError
from kvasir.engine.grammar import Grammars
from kvasir.engine.llm import LLM
from kvasir.engine.remote_grammars import GrammarServer, RemoteGrammars
from kvasir.engine.request import StructuredOutput

WANTED = [StructuredOutput(regex=f"{number}") for number in range(4)]


class Pair:
    """Both sides, and a compiler that waits to be let go on."""

    def __init__(self) -> None:
        self.go_on, self.error = threading.Event(), UnsupportedError("no tokenizer", param="structured_outputs")
        self.there = Grammars(self._tokenizer, 10, [0])
        self.here = RemoteGrammars(self.there.words, lambda frame: self.server.take(frame))
        self.server = GrammarServer(self.there, self.here.told)

    def _tokenizer(self):
        assert self.go_on.wait(60)
        raise self.error

    def end(self) -> None:
        self.go_on.set()
        self.here.shutdown()
        self.there.shutdown()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.end()


def test_begun_ended_and_why(pair):
    held = [pair.here.hold(one) for one in WANTED]
    assert pair.here.hold(WANTED[3]) is held[3]
    assert until(lambda: held[0].begun and held[1].begun)
    assert held[2].begun is None  # two at once
    pair.here.release(WANTED[2])
    pair.here.release(WANTED[3])
    assert held[2].future.cancelled()
    assert until(lambda: len(pair.there._used) == 3)
    assert not any(grammar.future.done() for grammar in (held[0], held[1], held[3]))
    pair.go_on.set()
    for grammar in (held[0], held[1], held[3]):
        with pytest.raises(UnsupportedError, match="no tokenizer") as caught:
            grammar.future.result(60)
        assert caught.value.param == "structured_outputs"
    for one in (WANTED[0], WANTED[1], WANTED[3]):
        pair.here.release(one)
    assert until(lambda: not pair.there._used)
    assert not pair.here._used
    assert not pair.here._asked


def test_a_compiler_that_breaks_is_told(pair):
    pair.error = RuntimeError("broken")
    held = pair.here.hold(WANTED[0])
    pair.go_on.set()
    with pytest.raises(ServerError, match="the grammar's compiler failed: broken"):
        held.future.result(60)


def test_what_is_let_go_while_it_compiles_is_nobodys(pair):
    held = pair.here.hold(WANTED[0])
    assert until(lambda: held.begun)
    pair.here.release(WANTED[0])
    again = pair.here.hold(WANTED[0])
    assert again is not held
    assert until(lambda: again.begun), "its time is limited, too"
    pair.go_on.set()
    with pytest.raises(UnsupportedError):
        again.future.result(60)


def test_let_go_after_the_end(pair):
    held = pair.here.hold(WANTED[0])
    pair.here.shutdown()
    pair.here.release(WANTED[0])
    assert held.future.cancelled()


def test_a_sequence_finds_what_was_compiled():
    """The rank that samples compiles nothing when a sequence enters."""
    with LLM("skald", max_num_seqs=2) as llm:
        there = llm.engine._grammars
        here = RemoteGrammars(there.words, lambda frame: server.take(frame))
        server = GrammarServer(there, here.told)
        assert here.hold(WANTED[1]).future.result(60) is None
        there._compile = None  # nothing more
        assert there.compiled(WANTED[1]).matcher.validate_tokens(there.vocabulary()("1")) == 1
        here.release(WANTED[1])
        here.shutdown()
