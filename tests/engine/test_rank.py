"""A rank's steps against whole forwards of the same decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from small_models import SPEC

from kvasir.engine.cache import KVCache
from kvasir.engine.cores import usable_cores
from kvasir.engine.decoder import Decoder
from kvasir.engine.rank import Rank, portions
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import Moves, NewSequence, Slice, Step
from kvasir.engine.weights import random_decoder

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=None)
SCORED = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=3)
PROMPT = [4, 8, 15, 16, 23, 42, 1, 2, 3, 5]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = random_decoder(SPEC, torch.float32, CPU, seed=1, pack=False)
    for parameter in made.parameters():
        parameter.data.mul_(8)
    made.pack()
    return made


@pytest.fixture
def rank(decoder: Decoder) -> Rank:
    cache = KVCache(SPEC, 16, 4, torch.float32, CPU)
    cache.arena.view(torch.float32).fill_(torch.nan)
    return Rank(decoder, cache, max_num_seqs=4, max_model_len=64)


@pytest.fixture
def logprobs(decoder: Decoder, ragged: Callable[..., object]) -> Callable[[Sequence[int]], torch.Tensor]:
    """Log probabilities [T, V] float64 after each token, by one forward over all."""

    def compute(tokens: Sequence[int]) -> torch.Tensor:
        cache = KVCache(SPEC, 16, 4, torch.float32, CPU)
        rows = ragged([(range(16), 0, len(tokens))], 4)
        logits = decoder(torch.tensor(tokens), rows, cache, torch.arange(len(tokens)))
        return logits.double().log_softmax(-1)

    return compute


def new(
    seat: int, tokens: Sequence[int], sampling: SamplingParams = GREEDY, prompt_len: int | None = None
) -> NewSequence:
    return NewSequence(seat, tokens, prompt_len or len(tokens), sampling, 0, ())


def greedy(logprobs: Callable[[Sequence[int]], torch.Tensor], prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logprobs(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_chunks_then_decode(rank: Rank, logprobs: Callable[[Sequence[int]], torch.Tensor]) -> None:
    expected = greedy(logprobs, PROMPT, 4)
    start = Step(1, new=(new(3, PROMPT),), blocks=((3, 0, (9, 2)), (3, 0, (5,))), slices=(Slice(3, 0, 7, False),))
    assert list(rank.run(start).token_ids) == []
    got = list(rank.run(Step(2, slices=(Slice(3, 7, 3, True),))).token_ids)
    got += rank.run(Step(3, slices=(Slice(3, 10, 1, True),))).token_ids
    got += rank.run(Step(4, slices=(Slice(3, 11, 1, True),))).token_ids
    got += rank.run(Step(5, blocks=((3, 0, (11,)),), slices=(Slice(3, 12, 1, True),))).token_ids
    assert got == expected


def test_sequences_share_a_step_and_seats_are_reused(
    rank: Rank, logprobs: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    other = [7, 7, 9]
    first = Step(
        1,
        new=(new(0, PROMPT), new(1, other)),
        blocks=((0, 0, (0, 1, 2)), (1, 0, (3,))),
        slices=(Slice(0, 0, 10, True), Slice(1, 0, 3, True)),
    )
    assert list(rank.run(first).token_ids) == greedy(logprobs, PROMPT, 1) + greedy(logprobs, other, 1)
    resumed = other + greedy(logprobs, other, 2)  # as after a preemption, now in the other's seat
    second = Step(
        2, freed=(0, 1), new=(new(0, resumed, prompt_len=3),), blocks=((0, 0, (1, 0)),), slices=(Slice(0, 0, 5, True),)
    )
    assert list(rank.run(second).token_ids) == greedy(logprobs, other, 3)[-1:]
    assert list(rank.run(Step(3, freed=(0,))).token_ids) == []


def test_copied_blocks_branch_a_sequence(rank: Rank, logprobs: Callable[[Sequence[int]], torch.Tensor]) -> None:
    rank.run(Step(1, new=(new(0, PROMPT),), blocks=((0, 0, (0, 1, 2)),), slices=(Slice(0, 0, 10, True),)))
    branch = Step(
        2,
        new=(new(1, PROMPT),),
        blocks=((1, 0, (0, 1, 6)),),
        copies=((2, 6),),
        slices=(Slice(0, 10, 1, True), Slice(1, 9, 1, True)),
    )
    assert list(rank.run(branch).token_ids) == [greedy(logprobs, PROMPT, 2)[1], greedy(logprobs, PROMPT, 1)[0]]


def test_blocks_are_read_before_they_are_overwritten(rank: Rank) -> None:
    """A block that is saved may be a copy's target by now, and a copy's source may have been given to what is loaded."""
    cache = rank.cache
    cache.arena.random_(0, 100)
    saved, source, loaded = cache.read([0, 1, 2]).clone().split(1)
    seen: list[torch.Tensor] = []

    class Both:
        """Tiers as a rank uses them."""

        def save(self, saves: Sequence[tuple[int, bytes]]) -> None:
            seen.append(cache.read([block for block, _ in saves]).clone())

        def apply(self, moves: Moves) -> None:
            cache.write([block for _, _, block in moves.loads], loaded)

    rank.tiers = Both()  # type: ignore[assignment]
    rank.run(Step(1, copies=((1, 0),), moves=Moves(saves=[(0, b"a")], loads=[(7, 0, 1)])))
    assert torch.equal(seen[0], saved)
    assert torch.equal(cache.read([0]), source)
    assert torch.equal(cache.read([1]), loaded)


@pytest.mark.parametrize("limit", [1, 3, 256])
@pytest.mark.parametrize("cut", [(10,), (6, 4), (1, 8, 1)])
def test_scores_of_prompt_and_output(
    rank: Rank, logprobs: Callable[[Sequence[int]], torch.Tensor], cut: tuple[int, ...], limit: int
) -> None:
    rank.max_logits = limit
    exact = logprobs(PROMPT)
    rank.run(Step(0, new=(new(1, [5]),), blocks=((1, 0, (9,)),), slices=(Slice(1, 0, 1, True),)))
    found, start = [], 0
    step = Step(1, new=(new(2, PROMPT, SCORED),), blocks=((2, 0, (0, 1, 2)),))
    rank.run(step)
    for turn, count in enumerate(cut, 1):
        last = start + count == 10
        other = Slice(1, turn, 1, True)
        result = rank.run(Step(2, slices=(Slice(2, start, count, last, prompt_logprobs=True), other)))
        found += result.prompt_logprobs.get(2, ())
        start += count
    assert len(found) == 9
    for at, score in enumerate(found):
        order = exact[at].argsort(descending=True).tolist()
        assert score.logprob == pytest.approx(float(exact[at, PROMPT[at + 1]]), abs=1e-4)
        assert score.rank == order.index(PROMPT[at + 1]) + 1
        assert [token for token, _ in score.top] == order[:3]
    own, none = result.logprobs
    assert none is None
    assert own is not None
    assert own.rank == 1
    assert own.logprob == pytest.approx(float(exact[9].max()), abs=1e-4)
    assert len(own.top) == 2


def test_portions_keep_the_order_and_the_limit() -> None:
    slices = [Slice(0, 5, 20, True, True), Slice(1, 0, 100, True), Slice(2, 3, 4, False, True), Slice(3, 9, 1, True)]
    cut = list(portions(slices, 8))
    assert all(sum(s.count if s.prompt_logprobs else 1 for s in part) <= 8 for part in cut)
    assert all(len({s.seat for s in part}) == len(part) for part in cut)
    flat = [s for part in cut for s in part]
    assert [s.seat for s in flat if s.sample] == [0, 1, 3]
    for seat in range(4):
        own = [s for s in flat if s.seat == seat]
        assert (own[0].start, sum(s.count for s in own)) == (slices[seat].start, slices[seat].count)
    assert list(portions(slices[1:2], 8)) == [slices[1:2]]


def test_usable_cores() -> None:
    assert 1 <= usable_cores() <= 4096


def test_the_newest_token_is_taken_where_it_lies(rank: Rank, logprobs: Callable[[Sequence[int]], torch.Tensor]) -> None:
    """Steps that follow each other at once read no token on the host; a seat's new sequence gets nothing of the old one's."""
    first = Step(1, new=(new(0, PROMPT),), blocks=((0, 0, (0, 1, 2)),), slices=(Slice(0, 0, 10, True),))
    rank.lags = True  # as on a GPU
    outcomes = [rank.launch(first)]
    outcomes += [rank.launch(Step(i, slices=(Slice(0, 8 + i, 1, True),))) for i in (2, 3)]
    assert rank.batch.known[0] == 11 < rank.batch.lengths[0] == 13
    taken = Step(4, freed=(0,), new=(new(0, [7, 7, 9]),), blocks=((0, 0, (3,)),), slices=(Slice(0, 0, 3, True),))
    outcomes += [rank.launch(taken), rank.launch(Step(5, blocks=((0, 0, (4,)),), slices=(Slice(0, 3, 1, True),)))]
    rank.launch(Step(6))
    assert [token for outcome in outcomes[:3] for token in outcome.token_ids] == greedy(logprobs, PROMPT, 3)
    assert [token for outcome in outcomes[3:] for token in outcome.token_ids] == greedy(logprobs, [7, 7, 9], 2)
    assert rank.batch.tokens[0, :4].tolist() == [7, 7, 9, *outcomes[3].token_ids]
