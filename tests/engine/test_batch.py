from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from kvasir.engine.batch import Batch
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import NewSequence, Slice, Step

CPU = torch.device("cpu")


def new(seat: int, token_ids: list[int], prompt_len: int | None = None) -> NewSequence:
    return NewSequence(seat, token_ids, prompt_len or len(token_ids), SamplingParams(), 0, ())


@pytest.fixture
def batch() -> Batch:
    """Blocks of 4; seat 2 holds 10 tokens in blocks 7, 3, 5, seat 0 holds 3 tokens in block 1."""
    made = Batch(4, 32, 4, CPU)
    made.apply(
        Step(
            1,
            new=(new(2, list(range(100, 110))), new(0, [1, 2, 3])),
            blocks=((2, 0, (7, 3)), (0, 0, (1,)), (2, 0, (5,))),
        )
    )
    return made


def test_rows_of_a_chunk_and_a_whole_prompt(batch: Batch) -> None:
    rows = batch.rows([Slice(2, 3, 4, False), Slice(0, 0, 3, True)])
    assert rows.tokens.tolist() == [103, 104, 105, 106, 1, 2, 3]
    assert rows.tokens.dtype == torch.int64
    ragged = rows.ragged
    assert ragged.positions.tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert ragged.slots.tolist() == [7 * 4 + 3, 3 * 4, 3 * 4 + 1, 3 * 4 + 2, 4, 5, 6]
    assert ragged.starts.tolist() == ragged.host_starts.tolist() == [0, 4, 7]
    assert ragged.lengths.tolist() == ragged.host_lengths.tolist() == [7, 3]
    assert ragged.table[0].tolist() == [7, 3]
    assert ragged.table[1, 0] == 1
    assert ragged.starts.dtype == ragged.lengths.dtype == ragged.table.dtype == torch.int32
    assert rows.logits.tolist() == [6]
    assert (rows.seats.tolist(), rows.positions.tolist(), rows.sampled.tolist()) == ([0], [3], [0])


def test_a_sampled_token_is_the_next_input(batch: Batch) -> None:
    batch.append(np.array([0, 2]), [42, 43])
    rows = batch.rows([Slice(0, 3, 1, True), Slice(2, 10, 1, True)])
    assert rows.tokens.tolist() == [42, 43]
    assert rows.positions.tolist() == [4, 11]


def test_tokens_of_seats_that_were_given_away_count_for_nobody(batch: Batch) -> None:
    """-1 is no seat, and not the last one either."""
    before = batch.lengths.tolist()
    batch.append(np.array([0, -1, 2]), [42, 41, 43])
    assert (batch.lengths - before).tolist() == [1, 0, 1, 0]
    assert batch.known.tolist() == batch.lengths.tolist()


def test_a_new_owner_of_a_seat_starts_afresh(batch: Batch) -> None:
    batch.apply(Step(2, freed=(2,), new=(new(2, [9, 8, 7]),), blocks=((2, 0, (6,)),)))
    rows = batch.rows([Slice(2, 0, 3, True)])
    assert rows.tokens.tolist() == [9, 8, 7]
    assert rows.ragged.slots.tolist() == [24, 25, 26]
    batch.append(np.array([2]), [5])
    assert batch.rows([Slice(2, 3, 1, True)]).tokens.tolist() == [5]


@pytest.mark.parametrize("cut", [(10,), (4, 6), (1, 8, 1), (9, 1)])
def test_prompt_scores_meet_every_prompt_token_once(batch: Batch, cut: tuple[int, ...]) -> None:
    predicted, start = [], 0
    for count in cut:
        end = start + count
        rows = batch.rows([Slice(2, start, count, end == 10, prompt_logprobs=True), Slice(0, 2, 1, True)])
        for part, where, ids in rows.scored:
            assert part.seat == 2
            assert rows.logits[where].tolist() == list(range(len(ids)))
            predicted += ids.tolist()
        assert rows.seats.tolist() == ([2, 0] if end == 10 else [0])
        assert rows.logits[rows.sampled].tolist() == ([count - 1, count] if end == 10 else [count])
        start = end
    assert predicted == list(range(101, 110))


def test_a_long_context_costs_no_memory_until_it_is_used() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = Batch(256, 2**20, 16, CPU)  # more than a GB
    batch.apply(Step(1, new=(new(200, [1, 2]),), blocks=((200, 0, (0,)),)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
