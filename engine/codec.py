"""Steps and results as bytes: what rank 0 sends to every rank once per step, and what the sampling rank answers.

Numbers travel as arrays, 13 bytes for a slice and 4 for a sampled token; what is said once per sequence as JSON. Nothing
that is read here can run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvasir.engine.blocks import ContentId
from kvasir.engine.event import TokenLogprob
from kvasir.engine.request import NESTED, PoolingParams, SamplingParams
from kvasir.engine.step import Candidate, Lent, Moves, NewSequence, Pull, Result, Slice, Step

I64, I32, U8 = np.dtype("<i8"), np.dtype("<i4"), np.dtype("u1")
PLAIN = SamplingParams()


class Writer:
    """Arrays and JSON one behind the other, each with its length."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def array(self, values: Iterable[int] | npt.NDArray[Any], dtype: np.dtype[Any] = I32) -> None:
        data = (
            np.fromiter(values, dtype).tobytes()
            if not isinstance(values, np.ndarray)
            else values.astype(dtype).tobytes()
        )
        self._parts += (struct.pack("<I", len(data)), data)

    def json(self, value: Any) -> None:
        data = json.dumps(value, separators=(",", ":")).encode() if value else b""
        self._parts += (struct.pack("<I", len(data)), data)

    def contents(self, contents: Sequence[ContentId]) -> None:
        self.array(map(len, contents), U8)
        data = b"".join(contents)
        self._parts += (struct.pack("<I", len(data)), data)

    def bytes(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """What a Writer wrote, in the same order. ValueError when it is something else."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def array(self, dtype: np.dtype[Any] = I32) -> list[int]:
        found: list[int] = np.frombuffer(self._next(), dtype).tolist()
        return found

    def json(self) -> Any:
        data = self._next()
        return json.loads(bytes(data)) if len(data) else None

    def contents(self) -> list[ContentId]:
        sizes, data = self.array(U8), self._next()
        if sum(sizes) != len(data):
            raise ValueError(f"{len(data)} bytes of content ids, {sum(sizes)} announced")
        ends = [0, *accumulate(sizes)]
        return [bytes(data[start:end]) for start, end in pairwise(ends)]

    def _next(self) -> memoryview:
        try:
            (size,) = struct.unpack_from("<I", self._data, self._at)
        except struct.error as error:
            raise ValueError(f"a message of {len(self._data)} bytes ends too early") from error
        start, self._at = self._at + 4, self._at + 4 + size
        if self._at > len(self._data):
            raise ValueError(f"a message of {len(self._data)} bytes ends too early")
        return self._data[start : self._at]


def encode_step(step: Step, results: Sequence[Result] = ()) -> bytes:
    """A step, and what earlier ones sampled since the last message: every rank appends it to its sequences."""
    out = Writer()
    out.array([len(results)])
    for result in results:
        out.array([result.step], I64)
        out.array(result.token_ids)
    out.array([step.id, step.record], I64)
    out.array(step.freed)
    out.json([_new(new) for new in step.new])
    for new in step.new:
        out.array(new.token_ids)
        out.array(new.token_type_ids)
    out.array(number for seat, group, blocks in step.blocks for number in (seat, group, len(blocks)))
    out.array(block for _, _, blocks in step.blocks for block in blocks)
    out.array(block for pair in step.copies for block in pair)
    out.array(number for part in step.slices for number in (part.seat, part.start, part.count))
    out.array((_flags(part) for part in step.slices), U8)
    _write_moves(out, step.moves or Moves())
    _write_exchanges(out, step.moves or Moves())
    return out.bytes()


def decode_step(data: bytes | memoryview) -> tuple[Step, list[Result]]:
    """The same on the other side."""
    read = Reader(data)
    results = [Result(read.array(I64)[0], read.array()) for _ in range(read.array()[0])]
    (number, record), freed = read.array(I64), read.array()
    new = [_sequence(said, read.array(), read.array()) for said in read.json() or ()]
    heads, flat = read.array(), read.array()
    blocks, at = [], 0
    for seat, group, count in zip(heads[::3], heads[1::3], heads[2::3], strict=True):
        blocks.append((seat, group, flat[at : at + count]))
        at += count
    pairs = read.array()
    copies = list(zip(pairs[::2], pairs[1::2], strict=True))
    spans, flags = read.array(), read.array(U8)
    slices = [
        Slice(seat, start, count, bool(flag & 1), bool(flag & 2), bool(flag & 4), bool(flag & 8))
        for seat, start, count, flag in zip(spans[::3], spans[1::3], spans[2::3], flags, strict=True)
    ]
    moves = replace(_read_moves(read), **_read_exchanges(read))
    return Step(number, freed, new, blocks, copies, slices, None if moves == Moves() else moves, bool(record)), results


def _write_moves(out: Writer, moves: Moves) -> None:
    out.array(block for block, _ in moves.saves)
    out.contents([content for _, content in moves.saves])
    out.array(number for load in moves.loads for number in load)
    out.array(moves.ended)
    for lists in (moves.fetches, moves.used):
        out.array(number for key, contents in lists for number in (key, len(contents)))
        out.contents([content for _, contents in lists for content in contents])


def _read_moves(read: Reader) -> Moves:
    saves = list(zip(read.array(), read.contents(), strict=True))
    loads, ended = read.array(), read.array()
    triples = list(zip(loads[::3], loads[1::3], loads[2::3], strict=True))
    return Moves(saves or (), triples or (), ended or (), _read_lists(read), _read_lists(read))


def _write_exchanges(out: Writer, moves: Moves) -> None:
    out.json([[lent.lend, lent.readers, lent.way, lent.first, lent.layers] for lent in moves.lends])
    for lent in moves.lends:
        out.array(block for block, _ in lent.places)
        out.contents([content for _, content in lent.places])
    out.json([asdict(pull) | {"chain": pull.chain.hex(), "tokens": None} for pull in moves.pulls])
    for pull in moves.pulls:
        out.array(np.frombuffer(pull.tokens, U8), U8)
    out.array(moves.landing)


def _read_exchanges(read: Reader) -> dict[str, Any]:
    lends = [
        Lent(lend, readers, way, first, list(zip(read.array(), read.contents(), strict=True)), tuple(layers))
        for lend, readers, way, first, layers in read.json() or ()
    ]
    pulls = [
        Pull(**{**said, "chain": bytes.fromhex(said["chain"]), "tokens": bytes(read.array(U8))})
        for said in read.json() or ()
    ]
    return {"lends": lends or (), "pulls": pulls or (), "landing": read.array() or ()}


def _read_lists(read: Reader) -> Sequence[tuple[int, Sequence[ContentId]]]:
    heads, flat, found = read.array(), iter(read.contents()), []
    for key, count in zip(heads[::2], heads[1::2], strict=True):
        found.append((key, list(islice(flat, count))))
    return found or ()


def encode_result(result: Result) -> bytes:
    """What the sampling rank answers."""
    out = Writer()
    out.array([result.step], I64)
    out.array(result.token_ids)
    out.json([_score(score) for score in result.logprobs])
    out.json({seat: [_score(score) for score in scores] for seat, scores in result.prompt_logprobs.items()})
    out.json(result.pooled)
    out.json(result.ended)
    out.json({number: [_candidate(c) for c in found] for number, found in result.offers.items()})
    return out.bytes()


def decode_result(data: bytes | memoryview) -> Result:
    """The same on rank 0."""
    read = Reader(data)
    number, tokens = read.array(I64)[0], read.array()
    scores = [_scored(score) for score in read.json() or ()]
    prompts: dict[int, Sequence[TokenLogprob]]
    prompts = {int(seat): [_must(score) for score in found] for seat, found in (read.json() or {}).items()}
    pooled, ended = ({int(key): value for key, value in (read.json() or {}).items()} for _ in range(2))
    offers: dict[int, Sequence[Candidate]]
    offers = {int(key): [_offered(said) for said in found] for key, found in (read.json() or {}).items()}
    return Result(number, tokens, scores, prompts, ended, pooled, offers)


def _flags(part: Slice) -> int:
    return part.sample + 2 * part.prompt_logprobs + 4 * part.pool + 8 * part.replay


def _new(new: NewSequence) -> dict[str, Any]:
    """What isn't a list of tokens, without what is at its default."""
    said = {f.name: getattr(new, f.name) for f in fields(new) if f.name not in ("token_ids", "token_type_ids")}
    sampling = {f.name: getattr(new.sampling, f.name) for f in fields(SamplingParams)}
    said["sampling"] = {name: value for name, value in sampling.items() if value != getattr(PLAIN, name)}
    for name in NESTED:
        if (value := getattr(new.sampling, name)) is not None:
            said["sampling"][name] = asdict(value)
    said["pooling"] = None if new.pooling is None else asdict(new.pooling)
    return said


def _sequence(said: Mapping[str, Any], tokens: list[int], types: list[int]) -> NewSequence:
    sampling = dict(said["sampling"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    for name, kind in NESTED.items():
        if name in sampling:
            sampling[name] = kind(**sampling[name])
    pooling = None if said["pooling"] is None else PoolingParams(**said["pooling"])
    given = {"token_ids": tokens, "token_type_ids": types, "sampling": SamplingParams(**sampling), "pooling": pooling}
    return NewSequence(**{**said, **given})


def _candidate(candidate: Candidate) -> list[Any]:
    token, score, logprob = candidate
    return [token, score, _score(logprob)]


def _offered(said: list[Any]) -> Candidate:
    token, score, logprob = said
    return token, score, _scored(logprob)


def _score(score: TokenLogprob | None) -> list[Any] | None:
    return None if score is None else [score.logprob, score.rank, score.top]


def _scored(said: list[Any] | None) -> TokenLogprob | None:
    return None if said is None else _must(said)


def _must(said: list[Any]) -> TokenLogprob:
    logprob, rank, top = said
    return TokenLogprob(logprob, rank, tuple((token, value) for token, value in top))
