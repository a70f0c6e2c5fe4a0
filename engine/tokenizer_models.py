"""Builds `tokenizers` backends from a bare vocabulary, whatever file it came in: byte-level BPE, SentencePiece's BPE and
unigram, WordPiece. No file is read here."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvasir.engine.errors import ConfigError
from kvasir.engine.pre_tokenizers import PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types, as GGUF and SentencePiece number them."""

SPACE = "\u2581"
Merge = tuple[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. `scores` (log probabilities, or minus the rank of a merge) and `types` are as long or empty."""

    tokens: Sequence[str]
    scores: Sequence[float] = ()
    types: Sequence[int] = ()
    left_strip: frozenset[str] = field(default_factory=frozenset)
    """Special tokens that swallow the spaces before them."""
    right_strip: frozenset[str] = field(default_factory=frozenset)
    """Special tokens that swallow the spaces after them."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id; ConfigError when a token is there twice."""
        found = {token: i for i, token in enumerate(self.tokens)}
        if len(found) < len(self.tokens):
            again = next(token for i, token in enumerate(self.tokens) if found[token] != i)
            raise ConfigError(f"the vocabulary holds the token {again!r} twice", param="tokenizer")
        return found

    def type(self, token_id: int) -> int:
        """Type of a token, NORMAL where the file has no types."""
        return self.types[token_id] if self.types else NORMAL

    def score(self, token_id: int) -> float:
        """Score of a token, 0 where the file has no scores."""
        return self.scores[token_id] if self.scores else 0.0

    def added(self) -> Iterator[AddedToken]:
        """The tokens that are cut out of a text before anything else sees it; all but the user's own are special."""
        for i, token in enumerate(self.tokens):
            kind = self.type(i)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED):
                yield AddedToken(
                    token,
                    special=kind != USER_DEFINED,
                    normalized=False,
                    lstrip=token in self.left_strip,
                    rstrip=token in self.right_strip,
                )


@dataclass(frozen=True)
class Spaces:
    """What SentencePiece does to a text before it looks for tokens."""

    prefix: bool = True
    """A space is put before the text (and after each special token)."""
    prefix_once: bool = False
    """That space comes at the beginning of the text only, and not where there is one already."""
    collapse: bool = False
    """Spaces at both ends are dropped, runs of them become one."""
    charsmap: bytes = b""
    """SentencePiece's compiled table of replacements."""

    def normalizer(self) -> normalizers.Normalizer:
        """Spaces as U+2581, after the replacements; the prefix too, unless it comes once."""
        steps: list[normalizers.Normalizer] = []
        if self.charsmap:
            steps.append(_replacements(self.charsmap))
        if self.collapse:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.prefix and not self.prefix_once:
            steps.append(normalizers.Prepend(SPACE))
        return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])

    def decoder(self) -> decoders.Decoder:
        """U+2581 becomes a space and <0xNN> a byte; the prefix disappears."""
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if self.prefix else parts)


def byte_pairs(vocabulary: Vocabulary, merges: Iterable[Merge], pre: PreTokenizer) -> tokenizers.Tokenizer:
    """Byte-pair encoding by ranked merges, within the words that `pre` cuts."""
    model = _bpe(vocabulary.ids, list(merges), ignore_merges=pre.whole_words, byte_fallback=pre.raw)
    backend = tokenizers.Tokenizer(model)
    if pre.raw:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.decoder = Spaces(prefix=False).decoder()
    else:
        backend.decoder = decoders.ByteLevel()
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    return _with_added(backend, vocabulary.added())


def sentencepiece_bpe(vocabulary: Vocabulary, spaces: Spaces, unknown: int | None) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours whose join is a token, those with the best score are joined first."""
    mergeable = [i for i in range(len(vocabulary.tokens)) if vocabulary.type(i) in (NORMAL, USER_DEFINED, UNUSED)]
    mergeable.sort(key=lambda i: -vocabulary.score(i))
    parts = {vocabulary.tokens[i]: i for i in mergeable}
    merges = [merge for i in mergeable for merge in splits(vocabulary.tokens[i], parts)]
    token = None if unknown is None else vocabulary.tokens[unknown]
    model = _bpe(vocabulary.ids, merges, unk_token=token, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    if spaces.prefix_once and spaces.prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend.normalizer = spaces.normalizer()
    backend.decoder = spaces.decoder()
    return _with_added(backend, _space_runs(vocabulary) if not spaces.prefix else vocabulary.added())


def unigram(vocabulary: Vocabulary, spaces: Spaces, unknown: int | None) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model: the tokens whose scores add up best (Kudo 2018, arXiv:1804.10959)."""
    if unknown is None:
        raise ConfigError("a unigram tokenizer needs a token for unknown characters", param="tokenizer")
    scored = [
        (token, 0.0 if vocabulary.type(i) == USER_DEFINED else vocabulary.score(i))
        for i, token in enumerate(vocabulary.tokens)
    ]
    has_bytes = any(vocabulary.type(i) == BYTE for i in range(len(scored)))
    try:
        backend = tokenizers.Tokenizer(models.Unigram(scored, unknown, byte_fallback=has_bytes))
        backend.normalizer = spaces.normalizer()
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(f"the unigram vocabulary is malformed: {error}", param="tokenizer") from error
    backend.decoder = spaces.decoder()
    return _with_added(backend, vocabulary.added())


def wordpiece(
    vocabulary: Vocabulary,
    unknown: str,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> tokenizers.Tokenizer:
    """BERT's WordPiece: the longest token first, ones inside a word begin with ## (Devlin et al. 2018)."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary.ids, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return _with_added(backend, vocabulary.added())


def frame(
    backend: tokenizers.Tokenizer,
    before: int | None,
    after: int | None,
    between: Sequence[int] = (),
    second_type: int = 0,
) -> None:
    """Have `backend` put `before` and `after` (ids) around a text, and `between` before the second text of a pair,
    whose token types are `second_type`."""
    names = {i: f"t{i}" for i in (before, after, *between) if i is not None}
    head = [names[before]] if before is not None else []
    tail = [names[after]] if after is not None else []
    middle = [names[i] for i in between]
    if not names:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=[*head, "$A", *tail, *middle, f"$B:{second_type}", *(f"{name}:{second_type}" for name in tail)],
        special_tokens=[(name, i) for i, name in names.items()],
    )


def byte_characters() -> dict[int, str]:
    """Byte -> GPT-2's printable character for it (Radford et al. 2019): bytes that don't print are moved to U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(moved)}


def splits(token: str, parts: Mapping[str, Any]) -> list[Merge]:
    """All ways to make `token` of two tokens, the leftmost cut first."""
    cuts = range(1, len(token))
    return [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in parts and token[cut:] in parts]


def _bpe(ids: dict[str, int], merges: list[Merge], **options: Any) -> models.BPE:
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise ConfigError(f"the merge {left!r} + {right!r} isn't made of tokens", param="tokenizer")
    return models.BPE(ids, merges, **options)


def _replacements(data: bytes) -> normalizers.Normalizer:
    """SentencePiece's table: the length of a double array (Yata's darts-clone), the array, and the texts that its leaves
    point into, each ended by a zero. ConfigError unless every walk stays inside: `tokenizers` doesn't look."""
    size = int.from_bytes(data[:4], "little")
    good = size % 4 == 0 and 0 < size < len(data) - 4 and data.endswith(b"\0")
    units, texts = array("I", data[4 : 4 + size] if good else b""), data[4 + size :]
    if sys.byteorder == "big":
        units.byteswap()
    if not good or not all(_stays_inside(i, units, texts) for i in range(len(units))):
        raise ConfigError(
            "the tokenizer's table of replacements (precompiled_charsmap) is malformed", param="tokenizer"
        )
    try:
        return normalizers.Precompiled(data)
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(f"the tokenizer's precompiled_charsmap is malformed: {error}", param="tokenizer") from error


def _stays_inside(i: int, units: array[int], texts: bytes) -> bool:
    unit = units[i]
    if unit >> 31 and i:
        return True  # a leaf, looked at from its parent; the root is none
    child = i ^ ((unit >> 10) << ((unit & 0x200) >> 6))
    if child | 0xFF >= len(units):
        return False
    text = units[child] & 0x7FFFFFFF
    return not unit & 0x100 or (text < len(texts) and texts[text] & 0xC0 != 0x80)


def _space_runs(vocabulary: Vocabulary) -> Iterator[AddedToken]:
    """As `added`, where tokens with U+2581 (Gemma's runs of spaces) are met in the normalised text."""
    for token in vocabulary.added():
        if SPACE in token.content and not token.special:
            token = AddedToken(token.content, special=False, normalized=True)
        yield token


def _with_added(backend: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
    backend.add_tokens(list(added))
    return backend
