"""Kernels are compiled before the first request comes: Triton compiles one where it is first launched, from an empty cache in
seconds. So steps with several kinds of sequences run on a rank of their own, over the same model and cache: whatever they leave in
its blocks is never read. Ranks of a group do so each for itself: one may compile for longer than an exchange may take.
"""

from __future__ import annotations

import logging
import time

from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.pooler import Pooler
from kvasir.engine.rank import Rank
from kvasir.engine.request import PoolingParams, SamplingParams
from kvasir.engine.step import NewSequence, Slice, Step, first_blocks

logger = logging.getLogger(__name__)

KINDS = (
    SamplingParams(temperature=0, logprobs=1),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=40, top_p=0.9),
    SamplingParams(top_p=0.9),
    SamplingParams(presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, logit_bias={0: 1.0}),
    SamplingParams(min_p=0.05),
)
"""How the sequences draw: the last one's kernel would do for those without any filter, too, so it has a step less."""
READY = "kernels are compiled and loaded after %.1f s"
LONG, SHORT, STEPS = 600, 2, 3
"""Tokens of the first prompt, whose keys are cut into parts; of the others; and steps, of which the first computes them."""


def warm_up(decoder: Decoder, cache: KVCache, max_model_len: int) -> None:
    """Of this rank's part of the model."""
    begin = time.monotonic()
    groups, size = len(cache.layout.groups), cache.block_size
    few = -(-(SHORT + STEPS) // size)
    room = (cache.num_blocks // groups - few * (len(KINDS) - 1)) * size - STEPS
    lengths = [min(LONG, max_model_len - STEPS, room), *[SHORT] * (len(KINDS) - 1)]
    if min(lengths) < 1:
        return
    new = [
        NewSequence(seat, _tokens(decoder, length), length, kind, seat, ())
        for seat, (length, kind) in enumerate(zip(lengths, KINDS, strict=True))
    ]
    blocks, places = first_blocks([length + STEPS for length in lengths], groups, size), [*enumerate(lengths)]
    rank = Rank(decoder, cache, max_num_seqs=len(KINDS), max_model_len=max_model_len)
    first = Step(0, new=new, blocks=blocks, slices=[Slice(seat, 0, n, True) for seat, n in places])
    later = [
        Step(1 + turn, copies=((0, 0),), slices=[Slice(seat, n + turn, 1, True) for seat, n in rows])
        for turn, rows in enumerate((places, places[:-1]))
    ]
    _run(rank, first, *later)
    logger.info(READY, time.monotonic() - begin)


def warm_up_vectors(decoder: Decoder, cache: KVCache, max_model_len: int, pooler: Pooler) -> None:
    """The same of a model that makes nothing but vectors, a long and a short one."""
    begin = time.monotonic()
    groups, size = len(cache.layout.groups), cache.block_size
    room = (cache.num_blocks // groups - 1) * size
    lengths = [min(LONG, max_model_len, room), min(SHORT, max_model_len)]
    if min(lengths) < 1:
        return
    new = [
        NewSequence(seat, _tokens(decoder, length), length, SamplingParams(), seat, (), pooling=PoolingParams())
        for seat, length in enumerate(lengths)
    ]
    rank = Rank(decoder, cache, max_num_seqs=len(new), max_model_len=max_model_len, pooler=pooler)
    slices = [Slice(seat, 0, length, sample=False, pool=True) for seat, length in enumerate(lengths)]
    _run(rank, Step(0, new=new, blocks=first_blocks(lengths, groups, size), slices=slices))
    logger.info(READY, time.monotonic() - begin)


def _tokens(decoder: Decoder, count: int) -> list[int]:
    return [token % decoder.spec.vocab for token in range(count)]


def _run(rank: Rank, *steps: Step) -> None:
    with rank.mesh.apart():
        for outcome in [rank.launch(step) for step in steps]:
            outcome.result()
