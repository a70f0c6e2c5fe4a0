"""Frames whose constant parts are encoded once are byte for byte those that are encoded whole."""

from __future__ import annotations

import datetime
import gc
import math
import weakref
from types import SimpleNamespace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.cluster.ollama_reply import timestamp
from kvasir.cluster.openai_logprobs import LOWEST, ChatLogprobs, token_text
from kvasir.cluster.openai_reply import _Frames
from kvasir.cluster.responses_reply import _Call, _Message, _Thoughts, event
from kvasir.engine.event import TokenLogprob
from kvasir.engine.tokenizer import Tokenizer

TEXTS = ["", " a", 'ä"\\\n\x00', "\u2028\U0001f600"]


@pytest.mark.parametrize("usage", [False, True])
def test_chunks_of_text_and_tokens(usage):
    frames = _Frames({"id": "one", "object": "chunk"}, SimpleNamespace(include_usage=usage))
    for index, text in enumerate(TEXTS):
        for ids in (None, (), (3, 70000)):
            shown = {} if ids is None else {"token_ids": ids}
            rest = {"logprobs": None, "finish_reason": None, **shown}
            chat = {"index": index, "delta": {"content": text}, **rest}
            assert frames.content(index, text, ids) == frames.chunk(chat)
            assert frames.text(index, text, ids) == frames.chunk({"index": index, "text": text, **rest})
            scored = chat | {"logprobs": {"content": []}}
            assert frames.content(index, text, ids, b'{"content":[]}') == frames.chunk(scored)
            assert frames.said(index, {"content": text}, ids, b'{"content":[]}') == frames.chunk(scored)
            assert orjson.loads(frames.chunk(chat).removeprefix(b"data: "))["choices"] == [
                orjson.loads(orjson.dumps(chat))
            ]


def test_log_probabilities(byte_model):
    bytes_alone = Tokenizer.load(byte_model)
    best = TokenLogprob(-1e-7, 1, ((65, -1e-7), (200, -2.5), (9, -math.inf)))
    for tokenizer, top in ((bytes_alone, 2), (bytes_alone, 3), (None, 0)):
        found = ChatLogprobs(tokenizer, top)
        entries = []
        for token, value in ((65, -1e-7), (200, -2.5), (9, LOWEST)):
            data = list(tokenizer.token_bytes(token)) if tokenizer else []
            entries.append({"token": token_text(tokenizer, token), "logprob": value, "bytes": data})
        content = [{**entries[0], "top_logprobs": entries[:top]}, {**entries[2], "top_logprobs": []}]
        scores = [best, None, TokenLogprob(-math.inf, 7)]
        assert found.encoded([65, 66, 9], scores) == orjson.dumps({"content": content, "refusal": None})
        assert found.encoded([65], None) == b"null"


def test_what_is_known_of_a_tokenizer_goes_with_it(byte_model):
    tokenizer = Tokenizer.load(byte_model)
    gone = weakref.ref(tokenizer)
    score = [TokenLogprob(-1.0, 1)]
    assert ChatLogprobs(tokenizer, 0).encoded([65], score) == ChatLogprobs(tokenizer, 0).encoded([65], score)
    del tokenizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_of_responses(text):
    plain, summed = (SimpleNamespace(summarised=summarised, carried=False) for summarised in (False, True))
    score = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    items = [
        (_Message(1), "output_text", [], {"logprobs": []}),
        (_Message(0), "output_text", [score], {"logprobs": [score]}),
        (_Thoughts(2, plain), "reasoning_text", [], {}),
        (_Thoughts(2, summed), "reasoning_summary_text", [], {}),
        (_Call(3, "f", "call_1", custom=False), "function_call_arguments", [], {}),
        (_Call(3, "f", "call_1", custom=True), "custom_tool_call_input", [], {}),
    ]
    for item, name, scores, more in items:
        found = item.grow(7, text, scores)
        if not text and name == "output_text" and not scores:
            assert not found
        else:
            assert found == event(f"response.{name}.delta", 7, **item._place, delta=text, **more)


@given(st.floats(0, 4e9) | st.integers(0, 4_000_000_000))
def test_times_of_ollama(seconds):
    at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    assert timestamp(seconds) == at.isoformat().replace("+00:00", "Z")
