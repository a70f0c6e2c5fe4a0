"""SentencePiece's tokenizer.model: a protobuf message (sentencepiece_model.proto), read by its wire format alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.tokenizer_models import NORMAL, Spaces, Vocabulary, sentencepiece_bpe, unigram

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class SentencePiece:
    """What the file says. Ids are None where the model has no such token."""

    vocabulary: Vocabulary
    spaces: Spaces
    model: int
    unknown: int | None
    bos: int | None
    eos: int | None
    pad: int | None

    def build(self, vocabulary: Vocabulary, spaces: Spaces) -> tokenizers.Tokenizer:
        """A backend of this model with another vocabulary (added tokens) and other spaces."""
        make = unigram if self.model == _UNIGRAM else sentencepiece_bpe
        return make(vocabulary, spaces, self.unknown)


def read_sentencepiece(data: bytes) -> SentencePiece:
    """The model in `data`; ConfigError when it isn't one, is cut short, or of a kind other than BPE and unigram."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int] = {}
    spaces = Spaces(collapse=True)
    try:
        for number, value in _fields(data):
            if number == _PIECES and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == _TRAINER and isinstance(value, bytes):
                trainer = {key: entry for key, entry in _fields(value) if isinstance(entry, int)}
            elif number == _NORMALIZER and isinstance(value, bytes):
                spaces = _spaces(value)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"the SentencePiece model is malformed or cut short: {error}", param="tokenizer") from error
    if not pieces:
        raise ConfigError("the SentencePiece model holds no tokens", param="tokenizer")
    return _model(pieces, trainer, spaces)


def _model(pieces: list[tuple[str, float, int]], trainer: dict[int, int], spaces: Spaces) -> SentencePiece:
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        name = {3: "word", 4: "char"}.get(kind, str(kind))
        raise ConfigError(
            f"SentencePiece models of type {name} aren't supported; bpe and unigram are", param="tokenizer"
        )
    tokens, scores, types = zip(*pieces, strict=True)
    ids = {name: trainer.get(number, default) for name, number, default in _IDS}
    known = {name: i if 0 <= i < len(tokens) else None for name, i in ids.items()}
    return SentencePiece(Vocabulary(tokens, scores, types), spaces, kind, **known)


_IDS = (("unknown", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))
"""Field of the trainer's settings and SentencePiece's default."""


def _piece(data: bytes) -> tuple[str, float, int]:
    token, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            token = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return token, score, kind


def _spaces(data: bytes) -> Spaces:
    found = dict(_fields(data))
    charsmap = found.get(2, b"")
    return Spaces(
        prefix=bool(found.get(3, 1)),
        collapse=bool(found.get(4, 1)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: integers signed, fixed-width and length-delimited values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise IndexError(f"field {key >> 3} at byte {at} has the wire type {kind}")
        if at + size > len(data):
            raise IndexError(f"field {key >> 3} at byte {at} is longer than the file")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(f"a number at byte {at} has no end")
