"""What goes over the wire comes out as it went in."""

from __future__ import annotations

import dataclasses

import pytest

from kvasir.cluster import wire
from kvasir.engine.errors import ClientError, ContextLengthError, OverloadedError
from kvasir.engine.event import Failed, Finished, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Peer, PoolingParams, Request, SamplingParams, StructuredOutput
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb

BEST = TokenLogprob(-0.25, 1, ((7, -0.25), (9, -1.5)))
EVENTS = [
    Token("a", 0, (5,)),
    Token("a", 1, (6, 7, 8)),
    Token("a", 1, (9,), logprobs=[BEST]),
    Token("a", 0, (10,), logprobs=[TokenLogprob(-3.0, 77)], prompt_logprobs=[None, BEST, BEST]),
    Finished("a", 0, "stop", 2, 11, 4, 3, 1, Timing(1.5, 2.5, 3.5, 4.5), 8, 6),
    Finished("a", 1, "length"),
    Pooled("a", (0.5, -2.0, 1.25), 7, 3, Timing(1.5, 2.5, 0.0, 4.5)),
    Failed("a", "deadline_exceeded", "too late"),
    Failed("a", "unsupported_parameter", "no", param="structured_outputs"),
]


WHOLE = ("top_k", "repeat_last_n", "min_tokens", "max_tokens", "truncate_prompt_tokens", "num_keep",
         "prompt_logprob_start")  # fmt: skip


def sent(message):
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(
            n=3, temperature=0.0, top_p=0.5, top_k=40, min_p=0.1, presence_penalty=-1, frequency_penalty=1.5,
            repetition_penalty=1.2, logit_bias={5: -100.0, 6: 1.25}, seed=-(2**63), stop=["a", "é"],
            stop_token_ids=[1, 2], include_stop_str_in_output=True, min_tokens=2, max_tokens=None, ignore_eos=True,
            logprobs=0, prompt_logprobs=20, skip_special_tokens=False, spaces_between_special_tokens=False,
        ),
        SamplingParams(detokenize=False),
        SamplingParams(
            repeat_last_n=0, penalize_newline=False, typical_p=0.2, tfs_z=0.5, mirostat=2, mirostat_tau=0.0,
            mirostat_eta=1.0, bad_words=["é", " a"], allowed_token_ids=[0, 2**31], truncate_prompt_tokens=-1,
            truncation_side="right", num_keep=-1,
            n=2, best_of=5, use_beam_search=True, length_penalty=-1.5, early_stopping="never",
            logits_processors={"x": {"a": [1]}, "y": {}},
        ),
        SamplingParams(structured_outputs=StructuredOutput(json='{"type": "object"}')),
        SamplingParams(structured_outputs=StructuredOutput(choice=["yes", "no"])),
        SamplingParams(structured_outputs=StructuredOutput(json_object=True)),
    ],
)  # fmt: skip
def test_sampling_survives(sampling):
    request = Request(request_id="r", prompt_token_ids=[1, 2], sampling=sampling)
    assert wire.decode_request(sent(wire.encode_request(request, 1)), "r").sampling == sampling


def test_request_survives():
    request = Request(
        request_id="r",
        prompt_token_ids=[0, 1, 2**31],
        sampling=SamplingParams(),
        priority=-5,
        cache_salt="tenant",
        deadline_s=0.5,
        adapter="pirate",
        trace_context={"traceparent": "00-1-2-01"},
        resume_token_ids=(4, 5),
        peers=(Peer("10.0.0.2:4711", "secret", 512), Peer("[::1]:1", "", 0, ordered=True)),
    )
    message = sent(wire.encode_request(request, 77))
    assert message.number == 77
    assert wire.decode_request(message, "link/r") == dataclasses.replace(request, request_id="link/r")


@pytest.mark.parametrize(
    "pooling",
    [PoolingParams(), PoolingParams(task="score", dimensions=7, normalize=False), PoolingParams(normalize=True)],
)
def test_pooling_survives(pooling):
    request = Request(
        request_id="r", prompt_token_ids=[1, 2], sampling=SamplingParams(), pooling=pooling, token_type_ids=(0, 1)
    )
    assert wire.decode_request(sent(wire.encode_request(request, 1)), "r") == request
    names = {field.name for field in pb.Pooling.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(PoolingParams)}


def test_every_sampling_field_is_sent():
    names = {field.name for field in pb.Sampling.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}


def test_wrong_sampling_is_refused_here_too():
    request = Request(request_id="r", prompt_token_ids=[1], sampling=SamplingParams())
    message = wire.encode_request(request, 1)
    message.sampling.top_p = 7
    with pytest.raises(ClientError, match="top_p"):
        wire.decode_request(message, "r")


def test_events_survive():
    step = pb.Step()
    for event in EVENTS:
        wire.add_event(step, 3, event)
    known = Request(request_id="a", prompt_token_ids=[1], sampling=SamplingParams())
    assert list(wire.step_events(sent(step), {3: known}.get)) == [(3, known, event) for event in EVENTS]


def test_columns_of_different_lengths_are_refused():
    for column in ("numbers", "logprobs", "ranks", "tops", "top_token_ids", "top_logprobs"):
        step = pb.Step()
        wire.add_event(step, 1, Token("a", 0, (5,), logprobs=[BEST]))
        getattr(step.scored, column).append(1)
        with pytest.raises(ValueError):
            list(wire.step_events(step, {1: None}.get))


def test_events_of_unknown_requests_are_left_out():
    step = pb.Step()
    wire.add_event(step, 1, EVENTS[0])
    wire.add_event(step, 2, EVENTS[0])
    wire.add_event(step, 2, EVENTS[-1])
    known = Request(request_id="a", prompt_token_ids=[1], sampling=SamplingParams())
    assert [number for number, _, _ in wire.step_events(step, {1: known}.get)] == [1]


def test_plain_tokens_are_small():
    step = pb.Step()
    for number in range(256):
        wire.add_event(step, number, Token("x" * 40, 0, (50_000,)))
    assert len(step.SerializeToString()) < 256 * 7


@pytest.mark.parametrize(
    "error", [ClientError("bad", param="n"), OverloadedError("full", retry_after_s=1.5), ContextLengthError("long")]
)
def test_errors_survive(error):
    again = wire.decode_error(sent(wire.encode_error(error)))
    assert type(again) is type(error)
    assert vars(again) == vars(error)


def test_unknown_error_is_ours():
    assert wire.decode_error(pb.Error(code="novel", message="?")).status == 500


def test_info_and_stats_survive():
    info = ModelInfo(name="m", max_model_len=9, vocab_size=8, eos_token_ids=(2, 3), memory_report="much", labels=("a",))
    assert wire.decode_info(sent(wire.encode_info(info))) == info
    values = {field.name: number + 1 for number, field in enumerate(dataclasses.fields(Stats))}
    stats = Stats(**values)
    assert wire.decode_stats(sent(wire.encode_stats(stats))) == stats


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_no_limit_of_its_own_fits_into_a_message(name):
    """A number of 19 digits was an internal error."""
    most = 2**31 - 1
    sampling = SamplingParams(**{"max_tokens": most, name: most})
    request = Request(request_id="a", prompt_token_ids=[1], sampling=sampling)
    assert wire.decode_request(sent(wire.encode_request(request, 1)), "a").sampling == sampling
    with pytest.raises(ClientError, match=f"{name} must be an integer from -?[01] to {most}.*, got {most + 1}"):
        SamplingParams(**{"max_tokens": None, name: most + 1})
