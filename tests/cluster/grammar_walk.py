"""Grammars of calls over a vocabulary of bytes: what they let through, and what a model of random weights writes under them."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer
from kvasir.engine.structural_tag import tag_grammar

END = 256


class Bytes:
    """A vocabulary of bytes and of `special` tokens."""

    bos_token_id = None
    eos_token_id = END

    def __init__(self, special=()):
        self.names = {name: END + 1 + number for number, name in enumerate(special)}
        self.tokens = [bytes([one]) for one in range(256)] + [b"\xff<end>"]
        self.tokens += [b"\xff<" + name.encode() + b">" for name in special]
        self.special_token_ids = [END, *self.names.values()]
        self.compiled = LLTokenizer(TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=END)

    def __call__(self, text):
        return list(text.encode())

    def ids(self, text):
        """Special tokens as such."""
        found = []
        while text:
            name = max((one for one in self.names if text.startswith(one)), key=len, default=None)
            found += [self.names[name]] if name else list(text[0].encode())
            text = text[len(name or text[0]) :]
        return found

    def text(self, ids):
        back = {number: name.encode() for name, number in self.names.items()}
        return b"".join(back.get(one) or bytes([one]) for one in ids).decode(errors="replace")


PLAIN = Bytes()


def matcher_of(use, form, vocabulary=PLAIN):
    """The grammar of a request's tools in a format."""
    grammar = tag_grammar(json.loads(use.held(form).grammar.structural_tag), vocabulary.names)
    found = LLMatcher(vocabulary.compiled, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not found.is_error(), (form.name, found.get_error())
    return found


def accepts(matcher, text, vocabulary=PLAIN):
    """As a whole output."""
    ids, matcher = vocabulary.ids(text), matcher.deep_copy()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def walk(matcher, form, seed, vocabulary=PLAIN):
    """What a model of random weights might write, fond of marks; None when it doesn't come to an end."""
    draw, out, style = random.Random(seed), [], form.arguments
    mask = allocate_token_bitmask(1, vocabulary.compiled.vocab_size)
    fond = ['"', "}", "]", "\n", "null", "true", '"a', "{", "[", "a", " ", "<", "&amp;", "1", *form.inner]
    fond += [*style.marks, style.end, style.end, style.end, style.quote] if style else []
    fond = [ids for text in fond if (ids := vocabulary.ids(text))]
    matcher = matcher.deep_copy()
    for _ in range(900):
        if matcher.is_stopped() or (matcher.is_accepting() and draw.random() < 0.5):
            break
        ids = draw.choice(fond)
        if draw.random() > 0.7 or matcher.validate_tokens(ids) < len(ids):
            fill_next_token_bitmask(matcher, mask)
            open_ = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            ids = [draw.choice([token for token in open_ if 32 <= token < 127] or open_)]
        if ids == [END]:
            break
        matcher.consume_tokens(ids)
        out += ids
    return vocabulary.text(out) if matcher.is_accepting() else None


def read(form, text, schemas=None, *, cuts=(), opening="", thoughts=None, begun=False):
    """The answer, fed in the pieces that `cuts` make."""
    may_call = schemas is not None
    reader = AnswerReader(form, thoughts, begun=begun, schemas=schemas, may_call=may_call)
    answer = ReadAnswer()
    reader.feed(opening)
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        answer.add(reader.feed(text[start:end]))
    answer.add(reader.finish())
    answer.cut = reader.cut
    return answer


def calls_of(answer):
    """(name, arguments) of each call."""
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]
