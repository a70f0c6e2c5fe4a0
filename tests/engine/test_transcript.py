"""A transcript's text is the decoded output up to the stop string that is complete first, however events are cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.engine.errors import DeadlineError, ServerError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Timing, Token, TokenLogprob
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.transcript import Delta, Transcript


@pytest.fixture(scope="session")
def tokenizer(data: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(data("model-stories260k/hf"))


def _request(prompt: Sequence[int] = (1, 410), **sampling: Any) -> Request:
    return Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(**{"max_tokens": None, **sampling}))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each character, or for each of its bytes."""
    known = ((char, tokenizer.token_id("▁" if char == " " else char)) for char in text)
    return [
        i for char, token in known for i in ([token] if token is not None else [byte + 3 for byte in char.encode()])
    ]


def _end(reason: FinishReason = "length", index: int = 0, **fields: Any) -> Finished:
    return Finished("r", index, reason, **fields)


def _token(*ids: int, index: int = 0, **fields: Any) -> Token:
    return Token("r", index, ids, **fields)


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _one_by_one(transcript: Transcript, ids: Sequence[int], end: Finished | None = None) -> list[Delta]:
    events: list[Event] = [_token(i) for i in ids]
    return [delta for event in [*events, *([end] if end else [])] for delta in transcript.feed([event])]


def _expected(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], min_tokens: int, include: bool
) -> tuple[str, int]:
    """(text, tokens) by definition: after each token that counts, look for the stop string that is complete first."""
    stream = tokenizer.stream([410])
    text = ""
    for count in range(1, len(ids) + 2):
        searched = len(text)
        text += stream.push([ids[count - 1]]) if count <= len(ids) else stream.finish()
        if min(count, len(ids)) < min_tokens:
            continue
        ends = [
            (end, -len(s), s) for s in stops for end in range(searched + 1, len(text) + 1) if text[:end].endswith(s)
        ]
        if ends:
            end, minus, _ = min(ends)
            return text[: end if include else end + minus], min(count, len(ids))
    return text, len(ids)


def test_any_stops_any_cuts(tokenizer: Tokenizer) -> None:
    few = [*_ids(tokenizer, "abab ba🙂"), 243, 2]  # few symbols: many near matches, half characters, a special token
    stop = st.text("ab 🙂\ufffd", min_size=1, max_size=4)

    @settings(max_examples=examples(200))
    @given(
        ids=st.lists(st.sampled_from(few), max_size=24),
        stops=st.lists(stop, min_size=0, max_size=3),
        min_tokens=st.integers(0, 6),
        include=st.booleans(),
        cuts=st.randoms(use_true_random=False),
    )
    def check(ids: list[int], stops: list[str], min_tokens: int, include: bool, cuts: random.Random) -> None:
        request = _request(stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include, ignore_eos=True)
        transcript = Transcript(request, tokenizer)
        events: list[Event] = []
        rest = list(ids)
        while rest:
            size = cuts.randint(1, 4)
            events.append(_token(*rest[:size]))
            del rest[:size]
        events.append(_end("length"))
        deltas = []
        while events:
            size = cuts.randint(1, 3)
            deltas += transcript.feed(events[:size])
            del events[:size]
        text, count = _expected(tokenizer, ids, stops, min_tokens, include)
        output = transcript.outputs[0]
        assert _text(deltas) == output.text == text
        assert [i for delta in deltas for i in delta.token_ids] == output.token_ids == ids[:count]
        assert transcript.usage.completion_tokens == count
        assert [d.finish_reason for d in deltas if d.finish_reason] == [output.finish_reason]
        assert transcript.finished
        assert transcript.settled
        assert (output.finish_reason == "stop") == isinstance(output.stop_reason, str)
        if output.finish_reason == "length":
            assert text == tokenizer.stream([410]).push([]) + _plain(tokenizer, ids)

    check()


def _plain(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream([410])
    return stream.push(ids) + stream.finish()


def test_no_character_of_a_stop_string_escapes(tokenizer: Tokenizer) -> None:
    transcript = Transcript(_request(stop=["END", "\n\n"]), tokenizer)
    ids = _ids(tokenizer, "xEN yE\nENDz")
    deltas = _one_by_one(transcript, ids)
    assert [d.text for d in deltas] == [
        "x",
        "",
        "",
        "EN ",
        "y",
        "",
        "E",
        "\n",
        "",
        "",
    ]  # what is held may still be "END"
    delta = deltas[-1]
    assert delta.matched
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "END")
    assert transcript.feed([_token(*ids), _end("stop", cached_tokens=1)]) == []  # the abort's answer
    assert transcript.usage.cached_tokens == 1
    assert transcript.settled


def test_held_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "aEN")
    for reason in ("length", "abort"):
        transcript = Transcript(_request(stop=["END"]), tokenizer)
        deltas = _one_by_one(transcript, ids, _end(reason))
        assert [d.text for d in deltas] == ["a", "", "", "EN"]
        assert deltas[-1].finish_reason == reason
    transcript = Transcript(_request(stop=["END"]), tokenizer)
    assert _text(_one_by_one(transcript, [*ids, 2], _end("stop", stop_token_id=2))) == "aEN"
    transcript = Transcript(_request(), tokenizer)
    assert _text(_one_by_one(transcript, [*ids, 243], _end())) == "aEN\ufffd"  # half a character


def test_the_stop_that_is_complete_first_wins(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "xabcd")
    for stops, text, stop in (
        (["abcd", "bc"], "xa", "bc"),
        (["bc", "abc"], "x", "abc"),  # both end on c: the longest
        (["ab", "abc"], "x", "ab"),
        (["d", "zz"], "xabc", "d"),
    ):
        for chunks in ([ids], [[i] for i in ids]):
            transcript = Transcript(_request(stop=stops), tokenizer)
            deltas = transcript.feed([_token(*chunk) for chunk in chunks])
            assert (_text(deltas), deltas[-1].stop_reason) == (text, stop)


def test_stop_tokens_leave_no_text(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "ab")
    for stop_id, skip in ((2, True), (2, False), (ids[1], True)):
        request = _request(skip_special_tokens=skip, stop_token_ids=[ids[1]])
        transcript = Transcript(request, tokenizer)
        deltas = _one_by_one(transcript, [ids[0], stop_id], _end("stop", stop_token_id=stop_id))
        assert _text(deltas) == "a"
        assert transcript.outputs[0].token_ids == [ids[0], stop_id]
        assert deltas[-1].stop_reason == (None if stop_id == 2 else stop_id)
        assert not deltas[-1].matched


def test_stop_token_text_on_demand(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "ab")
    request = _request(stop_token_ids=[ids[1]], include_stop_str_in_output=True)
    deltas = _one_by_one(Transcript(request, tokenizer), ids, _end("stop", stop_token_id=ids[1]))
    assert _text(deltas) == "ab"


def test_a_stop_token_that_does_not_stop_is_text(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "abc")
    request = _request(stop_token_ids=[ids[1]], stop=["bc"])
    deltas = _one_by_one(Transcript(request, tokenizer), ids, _end("length"))
    assert (_text(deltas), deltas[-1].stop_reason) == ("a", "bc")
    deltas = _one_by_one(Transcript(_request(stop_token_ids=[ids[2]]), tokenizer), ids, _end("length"))
    assert _text(deltas) == "abc"
    other = Transcript(_request(skip_special_tokens=False), tokenizer, eos_token_ids=[ids[0]])
    assert _text(_one_by_one(other, [2, ids[0]], _end("stop", stop_token_id=ids[0]))) == "</s>"


def test_min_tokens(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "aXbXcXd")
    for least, text in ((0, "a"), (2, "a"), (3, "aXb"), (5, "aXbXc"), (7, "aXbXcXd")):
        transcript = Transcript(_request(stop=["X"], min_tokens=least), tokenizer)
        assert _text(_one_by_one(transcript, ids, _end())) == text
    free = _one_by_one(Transcript(_request(stop=["X"], min_tokens=7), tokenizer), ids)
    assert [delta.text for delta in free] == list("aXbXcXd")  # a stop string that doesn't count isn't held back


def test_continuations_are_apart(tokenizer: Tokenizer) -> None:
    a, b, x = (_ids(tokenizer, text)[0] for text in ("a", "b", "X"))
    transcript = Transcript(_request(n=3, stop=["X"]), tokenizer)
    deltas = transcript.feed([_token(a), _token(b, index=1), _token(a, x, b), _token(b, index=2)])
    assert [(d.index, d.text, d.finish_reason) for d in deltas] == [(0, "aa", "stop"), (1, "b", None), (2, "b", None)]
    assert list(deltas[0].token_ids) == [a, a, x]
    transcript.feed([_end("length", 1, cached_tokens=16), _end("length", 2, cached_tokens=0)])
    assert transcript.finished
    assert not transcript.settled
    assert (transcript.usage.prompt_tokens, transcript.usage.cached_tokens, transcript.usage.completion_tokens) == (
        2,
        16,
        5,
    )


def test_logprobs_follow_their_tokens(tokenizer: Tokenizer) -> None:
    a, x = (_ids(tokenizer, text)[0] for text in ("a", "X"))
    scores = [TokenLogprob(-float(i), 1) for i in range(4)]
    transcript = Transcript(_request(stop=["X"], logprobs=0, prompt_logprobs=0), tokenizer)
    prompt = [None, TokenLogprob(-1.0, 1)]
    first = transcript.feed([_token(a, logprobs=scores[:1], prompt_logprobs=prompt)])[0]
    assert first.prompt_logprobs == transcript.prompt_logprobs == prompt
    last = transcript.feed([_token(a, x, a, logprobs=scores[1:])])[0]
    assert list(last.logprobs or ()) == scores[1:3]
    assert transcript.outputs[0].logprobs == scores[:3]


def test_ids_alone(tokenizer: Tokenizer) -> None:
    for request, reader in ((_request(), None), (_request(detokenize=False), tokenizer)):
        transcript = Transcript(request, reader)
        deltas = _one_by_one(
            transcript, [5, 410], _end("stop", stop_token_id=410, timing=Timing(queued=1.0), preemptions=2)
        )
        assert _text(deltas) == ""
        assert transcript.outputs[0].token_ids == [5, 410]
        assert (transcript.outputs[0].timing.queued, transcript.outputs[0].preemptions) == (1.0, 2)


def test_resumed_output_continues(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "one two three")
    request = Request(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(), resume_token_ids=ids[:4])
    assert _text(_one_by_one(Transcript(request, tokenizer), ids[4:], _end())) == "two three"


def test_failures_are_raised(tokenizer: Tokenizer) -> None:
    with pytest.raises(DeadlineError, match="too late"):
        Transcript(_request(), tokenizer).feed([Failed("r", "deadline_exceeded", "too late")])
    with pytest.raises(ServerError, match="odd"):
        Transcript(_request(), tokenizer).feed([Failed("r", "unheard of", "odd")])
