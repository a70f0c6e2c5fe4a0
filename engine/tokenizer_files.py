"""Finds the tokenizer in a model's folder, in whichever format it came, and builds its backend. No transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import read_json
from kvasir.engine.pre_tokenizers import pre_tokenizer
from kvasir.engine.sentencepiece_model import SentencePiece, read_sentencepiece
from kvasir.engine.tiktoken_file import rank_pairs, read_ranks, read_tekken
from kvasir.engine.tokenizer_json import read_tokenizer_json
from kvasir.engine.tokenizer_models import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    byte_pairs,
    frame,
    wordpiece,
)
from kvasir.engine.tokenizer_settings import MAX_ID, Settings, read_settings


@dataclass(frozen=True)
class Loaded:
    """A backend and the special tokens (bos_token, ... -> text) that its own file or tokenizer_config.json names."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]


def load_tokenizer(folder: Path) -> Loaded:
    """The tokenizer in `folder`; ConfigError says which files were looked for, or what is wrong with the one there."""
    path, load = _find(folder)
    if path is None:
        names = ", ".join(pattern for pattern, _ in _FORMATS)
        text = f"{folder} has no tokenizer (looked for {names}); pass --tokenizer FOLDER or --skip-tokenizer-init"
        raise ConfigError(text, param="tokenizer")
    try:
        return load(path, read_settings(folder))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't UTF-8 text: {error}", param="tokenizer") from error


def own_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Id of the end that a SentencePiece, tekken or tiktoken file knows by itself, where no JSON file names one."""
    path, load = _find(folder)
    if path is None or load is _tokenizer_json:
        return ()
    loaded = load(path, read_settings(folder))
    token = loaded.backend.token_to_id(loaded.special.get("eos_token", ""))
    return () if token is None else (token,)


def _find(folder: Path) -> tuple[Path | None, Callable[[Path, Settings], Loaded]]:
    for pattern, load in _FORMATS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return found[-1], load
    return None, _tokenizer_json


def _tokenizer_json(path: Path, settings: Settings) -> Loaded:
    return Loaded(read_tokenizer_json(path, settings), settings.special)


def _tekken(path: Path, settings: Settings) -> Loaded:
    tekken = read_tekken(path.read_bytes())
    backend = tekken.build()
    frame(backend, tekken.special.get("<s>"), None)
    return Loaded(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings.special})


@dataclass(frozen=True)
class _RankFamily:
    """What a class that reads a tiktoken file adds in its code."""

    pre: str
    special: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)


def _numbered(first: int, *names: str) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


_QWEN = _RankFamily(
    "qwen2",
    _numbered(151643, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)
_PHI3_SMALL = _RankFamily(
    "dbrx",
    _numbered(
        100256,
        *("<|dummy_id_2|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|dummy_id_0|>", "<|dummy_id_1|>", "<|end|>"),
        *(f"<|dummy_id_{i}|>" for i in range(3, 12)),
        "<|endofprompt|>",
        *(f"<|dummy_id_{i}|>" for i in range(12, 87)),
    ),
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
)
_RANK_FAMILIES = {
    "QWenTokenizer": _QWEN,
    "Phi3SmallTokenizer": _PHI3_SMALL,
    "ChatGLM4Tokenizer": _RankFamily("chatglm-bpe"),
    "TikTokenTokenizer": _RankFamily("kimi-k2"),
}


def _rank_file(path: Path, settings: Settings) -> Loaded:
    family = _RANK_FAMILIES.get(settings.family) or (_QWEN if path.name == "qwen.tiktoken" else None)
    if family is None:
        known = ", ".join(_RANK_FAMILIES)
        raise ConfigError(_unknown_class(path, settings, known), param="tokenizer")
    ids = dict(family.special) | {entry["content"]: i for i, entry in settings.added.items()}
    special = dict.fromkeys(family.special, True)
    special |= {entry["content"]: entry["special"] for entry in settings.added.values()}
    backend = rank_pairs(read_ranks(path.read_bytes()), pre_tokenizer(family.pre), ids, special)
    return Loaded(backend, {**family.defaults, **settings.special})


_LLAMA_FAMILIES = (
    *("", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLMTokenizer", "InternLM2Tokenizer"),
    *("InternLM3Tokenizer", "BaichuanTokenizer", "YiTokenizer", "MiniCPMTokenizer", "PreTrainedTokenizer"),
)
_SENTENCEPIECE_FRAMES = {**dict.fromkeys(_LLAMA_FAMILIES, (True, False)), "T5Tokenizer": (False, True)}
_FAIRSEQ = "XLMRobertaTokenizer"


def _sentencepiece(path: Path, settings: Settings) -> Loaded:
    data = path.read_bytes()
    if data[:1] != b"\n":  # the key of the first piece
        return _rank_file(path, settings)
    model = read_sentencepiece(data)
    if settings.family == _FAIRSEQ:
        return _fairseq(model, settings)
    if settings.family not in _SENTENCEPIECE_FRAMES:
        known = ", ".join([*filter(None, _SENTENCEPIECE_FRAMES), _FAIRSEQ])
        raise ConfigError(_unknown_class(path, settings, known), param="tokenizer")
    vocabulary = _extended(model.vocabulary, settings)
    spaces = replace(
        model.spaces,
        prefix=bool(settings.config.get("add_prefix_space", model.spaces.prefix)),
        prefix_once=settings.config.get("legacy") is False,
    )
    backend = model.build(vocabulary, spaces)
    bos, eos = _SENTENCEPIECE_FRAMES[settings.family]
    special = _model_special(model) | settings.special
    before = _id_of(special.get("bos_token"), vocabulary) if settings.config.get("add_bos_token", bos) else None
    after = _id_of(special.get("eos_token"), vocabulary) if settings.config.get("add_eos_token", eos) else None
    frame(backend, before, after)
    return Loaded(backend, special)


def _model_special(model: SentencePiece) -> dict[str, str]:
    ids = {"unk_token": model.unknown, "bos_token": model.bos, "eos_token": model.eos, "pad_token": model.pad}
    return {name: model.vocabulary.tokens[i] for name, i in ids.items() if i is not None}


def _fairseq(model: SentencePiece, settings: Settings) -> Loaded:
    """XLM-R counts fairseq's four special tokens first, then the model's own from its fourth, then <mask>."""
    heads = ("<s>", "<pad>", "</s>", "<unk>")
    old = model.vocabulary
    tokens = [*heads, *old.tokens[3:], "<mask>"]
    scores = [0.0] * 4 + list(old.scores[3:]) + [0.0]
    types = [CONTROL] * 4 + list(old.types[3:]) + [CONTROL]
    vocabulary = _extended(Vocabulary(tokens, scores, types, left_strip=frozenset({"<mask>"})), settings)
    backend = replace(model, unknown=3).build(vocabulary, model.spaces)
    frame(backend, 0, 2, [2])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>"}
    return Loaded(backend, {**special, "sep_token": "</s>", "mask_token": "<mask>", **settings.special})


_GPT2_DEFAULT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_ROBERTA_DEFAULT = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "cls_token": "<s>",
}
_MERGE_FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "": ("gpt-2", _GPT2_DEFAULT),
    "GPT2Tokenizer": ("gpt-2", _GPT2_DEFAULT),
    "CodeGenTokenizer": ("gpt-2", _GPT2_DEFAULT),
    "GPTNeoXTokenizer": ("olmo", _GPT2_DEFAULT),
    "Qwen2Tokenizer": ("qwen2", {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "CohereTokenizer": ("command-r", {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}),
    "RobertaTokenizer": ("gpt-2", _ROBERTA_DEFAULT),
}


def _merges(path: Path, settings: Settings) -> Loaded:
    """GPT-2's pair of files: vocab.json and merges.txt."""
    if settings.family not in _MERGE_FAMILIES:
        known = ", ".join(filter(None, _MERGE_FAMILIES))
        raise ConfigError(_unknown_class(path, settings, known), param="tokenizer")
    pre, defaults = _MERGE_FAMILIES[settings.family]
    beside = path.with_name(path.name.replace("merges.txt", "vocab.json"))
    vocab = read_json(beside)
    if not vocab:
        raise ConfigError(f"{path} needs {beside.name} beside it", param="tokenizer")
    special = {**defaults, **settings.special}
    vocabulary = _extended(_by_id(vocab, beside), settings, special.values())
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for i, line in enumerate(lines) if line and (i or not line.startswith("#version")))
    backend = byte_pairs(vocabulary, (_pair(pair, path) for pair in pairs), pre_tokenizer(pre))
    ids = {name: _id_of(token, vocabulary) for name, token in special.items()}
    if settings.family == "RobertaTokenizer" and ids["sep_token"] is not None:
        frame(backend, ids["cls_token"], ids["sep_token"], [ids["sep_token"]])
    elif settings.config.get("add_bos_token", False):
        frame(backend, ids.get("bos_token"), None)
    return Loaded(backend, {name: token for name, token in special.items() if ids[name] is not None})


def _pair(words: list[str], path: Path) -> tuple[str, str]:
    if len(words) != 2:
        raise ConfigError(f"{path}: the line {' '.join(words)!r} doesn't name two tokens", param="tokenizer")
    return words[0], words[1]


_BERT_DEFAULT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_BERT_FAMILIES = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "PreTrainedTokenizer")


def _vocab_txt(path: Path, settings: Settings) -> Loaded:
    """BERT's list of word pieces, one a line."""
    if settings.family not in _BERT_FAMILIES:
        known = ", ".join(filter(None, _BERT_FAMILIES))
        raise ConfigError(_unknown_class(path, settings, known), param="tokenizer")
    special = {**_BERT_DEFAULT, **settings.special}
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = _extended(Vocabulary(tokens), settings, special.values())
    ids = {name: _id_of(token, vocabulary) for name, token in special.items()}
    for name in ("unk_token", "sep_token", "cls_token"):
        if ids[name] is None:
            raise ConfigError(f"{path} has no line {special[name]} ({name})", param="tokenizer")
    backend = wordpiece(
        vocabulary,
        special["unk_token"],
        lowercase=bool(settings.config.get("do_lower_case", True)),
        strip_accents=settings.config.get("strip_accents"),
        chinese=bool(settings.config.get("tokenize_chinese_chars", True)),
    )
    frame(backend, ids["cls_token"], ids["sep_token"], second_type=1)
    return Loaded(backend, {name: token for name, token in special.items() if ids[name] is not None})


_FORMATS: Sequence[tuple[str, Callable[[Path, Settings], Loaded]]] = (
    ("tokenizer.json", _tokenizer_json),
    ("tekken.json", _tekken),
    ("*.tiktoken", _rank_file),
    ("tokenizer.model", _sentencepiece),
    ("spiece.model", _sentencepiece),
    ("sentencepiece.bpe.model", _sentencepiece),
    ("tiktoken.model", _rank_file),
    ("tokenizer.model.v*", _sentencepiece),
    ("*.model.v*", _sentencepiece),
    ("merges.txt", _merges),
    ("vocab.txt", _vocab_txt),
)


def _extended(vocabulary: Vocabulary, settings: Settings, special: Iterable[str] = ()) -> Vocabulary:
    """`vocabulary` with the added tokens of the small files at their ids; `special` ones are cut out of a text too."""
    tokens, types = list(vocabulary.tokens), list(vocabulary.types) or [NORMAL] * len(vocabulary.tokens)
    size = max([len(tokens), *(i + 1 for i in settings.added)])
    tokens += [f"[EMPTY_{i}]" for i in range(len(tokens), size)]
    types += [NORMAL] * (size - len(types))
    for i, entry in settings.added.items():
        tokens[i], types[i] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    there, pad = set(tokens), settings.special.get("pad_token")
    missing = [token for token in settings.named if token not in there]
    tokens += missing if settings.rows is None else missing[: max(settings.rows - size, 0)]
    size, wanted = len(tokens), {*special, *(token for token in settings.named if token != pad)}
    types += [CONTROL] * (size - len(types))
    types = [CONTROL if token in wanted else kind for token, kind in zip(tokens, types, strict=True)]
    scores = list(vocabulary.scores) + [0.0] * (size - len(vocabulary.scores)) if vocabulary.scores else ()
    entries = {**settings.named, **{entry["content"]: entry for entry in settings.added.values()}}
    strips = {side: {text for text, entry in entries.items() if entry.get(side)} for side in ("lstrip", "rstrip")}
    left, right = vocabulary.left_strip | strips["lstrip"], vocabulary.right_strip | strips["rstrip"]
    return Vocabulary(tokens, scores, types, left, right)


def _by_id(vocab: Mapping[str, Any], path: Path) -> Vocabulary:
    ids = {i: token for token, i in vocab.items() if isinstance(i, int) and 0 <= i < MAX_ID}
    if len(ids) != len(vocab):
        raise ConfigError(f"{path} must map tokens to ids, each id once", param="tokenizer")
    return Vocabulary([ids.get(i, f"[EMPTY_{i}]") for i in range(max(ids) + 1)])


def _id_of(token: str | None, vocabulary: Vocabulary) -> int | None:
    return None if token is None else vocabulary.ids.get(token)


def _unknown_class(path: Path, settings: Settings, known: str) -> str:
    name = f"the class {settings.family}" if settings.family else "no tokenizer_class in tokenizer_config.json"
    return f"{path} with {name} isn't supported (known: {known}); a tokenizer.json is needed"
