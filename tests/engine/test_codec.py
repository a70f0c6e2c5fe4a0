"""Steps and results come out of bytes as they went in; what is no message is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.engine.codec import decode_result, decode_step, encode_result, encode_step
from kvasir.engine.event import TokenLogprob
from kvasir.engine.request import PoolingParams, SamplingParams, StructuredOutput
from kvasir.engine.step import Lent, Moves, NewSequence, Pull, Result, Slice, Step
from kvasir.engine.thoughts import Thoughts

SMALL = st.integers(0, 2**31 - 1)
TOKENS = st.lists(SMALL, max_size=20)
SAMPLING = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(temperature=0.5, logit_bias={3: -1.5, 70000: 2.0}, seed=7, stop=["é"], stop_token_ids=[1]),
        SamplingParams(
            structured_outputs=StructuredOutput(json="{}"), thoughts=Thoughts(end=[4, 5]), max_tokens=None, logprobs=3
        ),
        SamplingParams(bad_words=["é"], allowed_token_ids=[1, 2], mirostat=2, typical_p=0.5, truncate_prompt_tokens=-1),
        SamplingParams(
            use_beam_search=True, best_of=3, early_stopping=True, logits_processors={"x": {}}, penalize_newline=False
        ),
    ]
)
NEW = st.builds(
    NewSequence,
    seat=SMALL,
    token_ids=TOKENS,
    prompt_len=SMALL,
    sampling=SAMPLING,
    seed=st.integers(-(2**63), 2**64),
    stop_token_ids=TOKENS,
    adapter=st.none() | st.text(max_size=5),
    pooling=st.none() | st.just(PoolingParams(task="score", dimensions=4, normalize=False)),
    token_type_ids=TOKENS,
    stretched=st.booleans(),
)
IDS = st.lists(st.binary(min_size=16, max_size=17), max_size=4)
PLACES = st.lists(st.tuples(st.integers(-1, 2**31 - 1), st.binary(min_size=16, max_size=17)), max_size=3)
TEXT = st.text(max_size=5)
LENTS = st.builds(Lent, lend=st.integers(0, 2**62), readers=TOKENS, way=TEXT, first=SMALL, places=PLACES)
PULLS = st.builds(
    Pull,
    ticket=SMALL,
    address=TEXT,
    secret=TEXT,
    fetch=TEXT,
    chain=st.binary(max_size=16),
    tokens=st.binary(max_size=40),
    first=SMALL,
    end=SMALL,
    limit_s=st.floats(0, 10),
)
MOVES = st.builds(
    Moves,
    saves=st.lists(st.tuples(SMALL, st.binary(min_size=16, max_size=17)), max_size=3),
    loads=st.lists(st.tuples(SMALL, SMALL, SMALL), max_size=3),
    ended=TOKENS,
    fetches=st.lists(st.tuples(SMALL, IDS), max_size=3),
    used=st.lists(st.tuples(SMALL, IDS), max_size=3),
    lends=st.lists(LENTS, max_size=2),
    pulls=st.lists(PULLS, max_size=2),
)
STEPS = st.builds(
    Step,
    id=st.integers(0, 2**62),
    freed=TOKENS,
    new=st.lists(NEW, max_size=3),
    blocks=st.lists(st.tuples(SMALL, SMALL, st.lists(st.integers(-1, 2**31 - 1), max_size=5)), max_size=4),
    copies=st.lists(st.tuples(SMALL, SMALL), max_size=4),
    slices=st.lists(st.builds(Slice, SMALL, SMALL, SMALL, *[st.booleans()] * 4), max_size=6),
    moves=st.none() | MOVES,
    record=st.booleans(),
)
NUMBERS = st.floats(allow_nan=False)
SCORES = st.builds(TokenLogprob, NUMBERS, SMALL, st.lists(st.tuples(SMALL, NUMBERS), max_size=3).map(tuple))
RESULTS = st.builds(
    Result,
    step=st.integers(0, 2**62),
    token_ids=TOKENS,
    logprobs=st.lists(st.none() | SCORES, max_size=3),
    prompt_logprobs=st.dictionaries(SMALL, st.lists(SCORES, max_size=3), max_size=2),
    ended=st.dictionaries(SMALL, st.none() | st.text(max_size=5), max_size=2),
    pooled=st.dictionaries(SMALL, st.lists(NUMBERS, max_size=4), max_size=2),
    offers=st.dictionaries(SMALL, st.lists(st.tuples(SMALL, NUMBERS, st.none() | SCORES), max_size=3), max_size=2),
)


def plain(value: Any) -> Any:
    """With lists for tuples, so that equal contents compare equal."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    fields = getattr(value, "__dataclass_fields__", None)
    return value if fields is None else {name: plain(getattr(value, name)) for name in fields}


@given(STEPS, st.lists(RESULTS, max_size=2))
def test_a_step_and_the_news_before_it(step: Step, results: list[Result]) -> None:
    found, news = decode_step(encode_step(step, results))
    assert plain(found) == plain(step)
    assert [(one.step, list(one.token_ids)) for one in news] == [(one.step, list(one.token_ids)) for one in results]


@given(RESULTS)
def test_a_result(result: Result) -> None:
    assert plain(decode_result(encode_result(result))) == plain(result)


def test_what_has_no_end_is_kept() -> None:
    result = Result(1, [5], [TokenLogprob(-math.inf, 97, ((5, -math.inf),))])
    assert plain(decode_result(encode_result(result))) == plain(result)


@given(STEPS, st.data())
def test_a_message_cut_short_is_refused(step: Step, data: st.DataObject) -> None:
    whole = encode_step(step)
    with pytest.raises(ValueError):
        decode_step(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_decoding_sequence_costs_few_bytes() -> None:
    """13 for its slice, 4 for the token before; a new block now and then."""
    slices = [Slice(seat, 1000 + seat, 1, True) for seat in range(256)]
    blocks = [(seat, 0, [seat]) for seat in range(0, 256, 16)]
    frame = encode_step(Step(5, slices=slices, blocks=blocks), [Result(4, list(range(256)))])
    assert len(frame) / 256 < 20
