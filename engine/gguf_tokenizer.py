"""A tokenizer from a GGUF file's metadata alone: `tokenizer.ggml.*` as llama.cpp writes and reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.pre_tokenizers import pre_tokenizer
from kvasir.engine.tokenizer_models import (
    CONTROL,
    SPACE,
    UNKNOWN,
    Spaces,
    Vocabulary,
    byte_pairs,
    frame,
    sentencepiece_bpe,
    unigram,
    wordpiece,
)

logger = logging.getLogger(__name__)
_PREFIX = "tokenizer.ggml."
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "bert": {"bos_token": 101, "unk_token": 100, "sep_token": 102, "pad_token": 0, "mask_token": 103},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
}
_MARKERS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
)
_WORDS = ("</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>")
"""Tokens that end an answer whatever their number, because a GGUF file names one or two of a model's several (llama.cpp
has this list too). Markers do so even where the file calls them plain text; words may be just that: Qwen's </s> is."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a file's metadata says about its tokenizer."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... -> text."""
    chat_templates: dict[str, str]


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """The tokenizer in `metadata` (key -> value of a GGUF file); ConfigError for a kind that isn't known."""
    fields = _Fields(metadata)
    build = _KINDS.get(fields.model)
    if build is None:
        known = ", ".join(sorted(_KINDS))
        text = f"GGUF: the tokenizer {fields.model!r} (tokenizer.ggml.model) isn't supported; supported: {known}"
        raise ConfigError(text, param="tokenizer")
    backend = build(fields)
    return GgufTokenizer(
        backend=backend,
        eos_token_ids=tuple(dict.fromkeys(_end_ids(fields))),
        special_tokens={name: fields.vocabulary.tokens[i] for name, i in fields.special.items()},
        chat_templates=_chat_templates(metadata),
    )


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer, without building the tokenizer; empty where the file has none."""
    if _PREFIX + "model" not in metadata:
        return ()
    return tuple(dict.fromkeys(_end_ids(_Fields(metadata))))


class _Fields:
    """Checked access to the metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model = str(metadata.get(_PREFIX + "model", ""))
        self.pre = str(self.get("pre") or "default")
        if not self.model:
            raise ConfigError("the GGUF file has no tokenizer (tokenizer.ggml.model); pass --tokenizer FOLDER")
        self.special = self._special() if self.model in _KINDS else {}
        self.vocabulary = self._vocabulary() if self.model in _KINDS else Vocabulary(())

    def get(self, name: str) -> Any:
        """Value of tokenizer.ggml.`name`, numbers as Python's own."""
        value: Any = self._metadata.get(_PREFIX + name)
        return value.tolist() if hasattr(value, "tolist") else value

    def integer(self, name: str) -> int | None:
        """The number tokenizer.ggml.`name`; ConfigError when it is something else."""
        value = self.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"GGUF: {_PREFIX}{name} must be an integer, got {value!r}", param="tokenizer")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """The boolean tokenizer.ggml.`name`; ConfigError when it is something else."""
        value = self.get(name)
        if value is not None and not isinstance(value, int):
            raise ConfigError(f"GGUF: {_PREFIX}{name} must be true or false, got {value!r}", param="tokenizer")
        return default if value is None else bool(value)

    def array(self, name: str, *kinds: type, length: int | None = None) -> list[Any]:
        """The array tokenizer.ggml.`name`, [] when there is none; ConfigError when it isn't `length` of `kinds`."""
        value = self.get(name)
        items = [] if value is None else list(value) if isinstance(value, (list, tuple)) else None
        if items is None or not all(isinstance(item, kinds) for item in items):
            raise ConfigError(f"GGUF: {_PREFIX}{name} must be an array of {kinds[0].__name__}", param="tokenizer")
        if length is not None and value is not None and len(items) < length:
            text = f"GGUF: {_PREFIX}{name} has {len(items)} entries for {length} tokens"
            raise ConfigError(text, param="tokenizer")
        return items

    def _special(self) -> dict[str, int]:
        """bos_token, ... -> id; an id beyond the vocabulary counts as absent, as in llama.cpp."""
        ids = dict(_DEFAULT_IDS.get(self.model, {}))
        ids |= {name: i for name, key in _SPECIAL.items() if (i := self.integer(key)) is not None}
        if self.model == "bert":
            ids["bos_token"] = ids.setdefault("cls_token", ids["bos_token"])
        count = len(self.array("tokens", str))
        return {name: i for name, i in ids.items() if 0 <= i < count}

    def _vocabulary(self) -> Vocabulary:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.array("tokens", str))]
        if not tokens:
            raise ConfigError("GGUF: tokenizer.ggml.tokens is missing or empty", param="tokenizer")
        scores = [float(score) for score in self.array("scores", float, int, length=len(tokens))]
        types = self.array("token_type", int, length=len(tokens))
        if types:
            types = [CONTROL if token in _MARKERS else kind for token, kind in zip(tokens, types, strict=False)]
        return Vocabulary(tokens, scores, types, *self._strips(tokens, types))

    def _strips(self, tokens: Sequence[str], types: Sequence[int]) -> tuple[frozenset[str], frozenset[str]]:
        """Special tokens that take spaces along, which the format doesn't say: known by the model, as in llama.cpp."""
        name = str(self._metadata.get("general.name", "")).lower()
        family = str(self._metadata.get("general.architecture", ""))
        if self.pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or family in ("nomic-bert-moe", "jina-bert-v3"):
            return frozenset({"<mask>"}), frozenset()
        if "modern-bert" in name:
            return frozenset({"[MASK]"}), frozenset()
        if self.model == "llama" and (family in ("phi3", "phimoe") or "phi-3" in name or "phi3" in name):
            special = {token for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, UNKNOWN)}
            return frozenset(), frozenset((special | {"</s>"}) - {"<unk>", "<s>", "<|endoftext|>"})
        return frozenset(), frozenset()


def _sentencepiece(fields: _Fields) -> tokenizers.Tokenizer:
    spaces = Spaces(prefix=fields.flag("add_space_prefix", True))
    backend = sentencepiece_bpe(fields.vocabulary, spaces, fields.special.get("unk_token"))
    _frame(backend, fields, bos=True, eos=False)
    return backend


def _byte_pairs(fields: _Fields, pre: str | None = None) -> tokenizers.Tokenizer:
    kind = pre_tokenizer(pre or fields.pre)
    if pre is None and fields.get("pre") is None:
        logger.warning(
            "the GGUF file doesn't say how its model cuts a text into words (%spre), as files of before May 2024: some"
            " tokens may be wrong. Convert it anew, or pass --tokenizer FOLDER",
            _PREFIX,
        )
    merges = fields.array("merges", str)
    if not merges:
        raise ConfigError("GGUF: tokenizer.ggml.merges is missing or empty", param="tokenizer")
    backend = byte_pairs(fields.vocabulary, (_merge(text) for text in merges), kind)
    _frame(backend, fields, bos=kind.add_bos, eos=False)
    return backend


def _gemma4(fields: _Fields) -> tokenizers.Tokenizer:
    return _byte_pairs(fields, "gemma4")


def _wordpiece(fields: _Fields) -> tokenizers.Tokenizer:
    """llama.cpp marks the beginning of words with U+2581, where BERT's own file marks their insides with ##."""
    vocabulary = fields.vocabulary
    tokens = [_bert_token(token, vocabulary.type(i)) for i, token in enumerate(vocabulary.tokens)]
    unknown = fields.special.get("unk_token")
    if unknown is None:
        raise ConfigError("GGUF: a bert tokenizer needs tokenizer.ggml.unknown_token_id", param="tokenizer")
    lowercase = fields.flag("normalizer.lowercase", True)
    backend = wordpiece(
        Vocabulary(tokens, vocabulary.scores, vocabulary.types),
        tokens[unknown],
        lowercase=lowercase,
        strip_accents=fields.flag("normalizer.strip_accents", lowercase),
    )
    frame(backend, fields.special.get("bos_token"), fields.special.get("sep_token"), second_type=1)
    return backend


def _unigram(fields: _Fields) -> tokenizers.Tokenizer:
    spaces = Spaces(
        prefix=fields.flag("add_space_prefix", True),
        collapse=fields.flag("remove_extra_whitespaces", False),
        charsmap=bytes(byte % 256 for byte in fields.array("precompiled_charsmap", int)),
    )
    backend = unigram(fields.vocabulary, spaces, fields.special.get("unk_token"))
    _frame(backend, fields, bos=False, eos=True)
    return backend


_KINDS: dict[str, Callable[[_Fields], tokenizers.Tokenizer]] = {
    "llama": _sentencepiece,
    "gpt2": _byte_pairs,
    "gemma4": _gemma4,
    "bert": _wordpiece,
    "t5": _unigram,
}


def _frame(backend: tokenizers.Tokenizer, fields: _Fields, *, bos: bool, eos: bool) -> None:
    """BOS, EOS and SEP as the file asks for them, else as the kind of tokenizer does."""
    before = _wanted(fields, "add_bos_token", "bos_token", bos)
    after = _wanted(fields, "add_eos_token", "eos_token", eos)
    between = _wanted(fields, "add_sep_token", "sep_token", False)
    frame(backend, before, after, [] if between is None else [between])


def _wanted(fields: _Fields, flag: str, token: str, default: bool) -> int | None:
    if not fields.flag(flag, default):
        return None
    if token not in fields.special:
        text = f"GGUF: {_PREFIX}{flag} is true, but the file names no {token}"
        raise ConfigError(text, param="tokenizer")
    return fields.special[token]


def _merge(text: str) -> tuple[str, str]:
    """The two tokens of a merge; the space between them isn't the first character, which may be one itself."""
    cut = text.find(" ", 1)
    if cut < 0:
        raise ConfigError(f"GGUF: the merge {text!r} doesn't name two tokens", param="tokenizer")
    return text[:cut], text[cut + 1 :]


def _bert_token(token: str, kind: int) -> str:
    if kind in (CONTROL, UNKNOWN) or (token.startswith("[") and token.endswith("]")):
        return token
    return token[1:] if token.startswith(SPACE) else "##" + token


def _end_ids(fields: _Fields) -> Iterator[int]:
    """Ids that end an answer: EOS, EOT and EOM as named, and tokens known for it. Harmony's <|end|> only ends a part."""
    count = len(fields.vocabulary.tokens)
    named = [fields.special.get("eos_token"), fields.integer("eot_token_id"), fields.integer("eom_token_id")]
    yield from (i for i in named if i is not None and 0 <= i < count)
    ids = fields.vocabulary.ids
    found = set(_MARKERS) & ids.keys()
    found |= {word for word in _WORDS if word in ids and fields.vocabulary.type(ids[word]) == CONTROL}
    if {"<|return|>", "<|call|>"} <= found or {"<|calls|>", "<|flush|>"} <= found:
        found -= {"<|end|>"}
    if "<|tool_response>" in found:
        found -= {"</s>"}
    yield from sorted(ids[token] for token in found)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """name -> template: tokenizer.chat_template is "default", tokenizer.chat_template.NAME the others."""
    name = "tokenizer.chat_template"
    found = {key[len(name) + 1 :]: value for key, value in metadata.items() if key.startswith(name + ".")}
    found["default"] = metadata.get(name)
    return {name: value for name, value in found.items() if isinstance(value, str)}
