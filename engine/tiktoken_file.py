"""Rank files of OpenAI's tiktoken (lines of base64 and rank) and Mistral's tekken.json: byte sequences by rank."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.pre_tokenizers import PreTokenizer
from kvasir.engine.tokenizer_models import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    byte_characters,
    byte_pairs,
    splits,
)

Ranks = dict[bytes, int]

_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The first special tokens of a tekken.json that doesn't list them (versions up to v7)."""


@dataclass(frozen=True)
class Tekken:
    """What a tekken.json says."""

    ranks: Ranks
    special: Mapping[str, int]
    offset: int
    """Id of the first token that isn't special."""
    pattern: str

    def build(self) -> tokenizers.Tokenizer:
        """The backend; BOS isn't added by itself."""
        pre = PreTokenizer((self.pattern,), whole_words=True)
        return rank_pairs(self.ranks, pre, self.special, dict.fromkeys(self.special, True), self.offset)


def read_ranks(data: bytes) -> Ranks:
    """Bytes -> rank of a .tiktoken file; ConfigError names the first line that isn't one."""
    ranks: Ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            text = f"line {number} of the tiktoken file isn't a base64 token and its rank: {error}"
            raise ConfigError(text, param="tokenizer") from error
    if not ranks:
        raise ConfigError("the tiktoken file holds no tokens", param="tokenizer")
    return ranks


MAX_SPECIAL = 2**20
"""Special tokens that a tekken.json may reserve."""


def read_tekken(data: bytes) -> Tekken:
    """What is in a tekken.json; ConfigError when a part is missing or misshapen."""
    try:
        value: dict[str, Any] = json.loads(data)
        config = value["config"]
        offset = int(config["default_num_special_tokens"])
        count = int(config["default_vocab_size"]) - offset
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in value["vocab"][:count]}
        listed = value.get("special_tokens")
        names = _TEKKEN_SPECIAL if listed is None else [entry["token_str"] for entry in listed]
        pattern = str(config["pattern"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        text = f"tekken.json is malformed: {type(error).__name__}: {error}"
        raise ConfigError(text, param="tokenizer") from error
    if not 0 <= offset <= MAX_SPECIAL:
        raise ConfigError(f"tekken.json has {offset} special tokens; at most {MAX_SPECIAL}", param="tokenizer")
    special = {name: i for i, name in enumerate(names)}
    special |= {f"<SPECIAL_{i}>": i for i in range(len(names), offset)}
    return Tekken(ranks, special, offset, pattern)


def rank_pairs(
    ranks: Ranks, pre: PreTokenizer, ids: Mapping[str, int], special: Mapping[str, bool], offset: int = 0
) -> tokenizers.Tokenizer:
    """Byte-level BPE that joins the neighbours of the lowest joint rank first, as tiktoken does. Ids are rank +
    `offset`; added tokens are at `ids` and `special` or the user's own."""
    letters = byte_characters()
    by_id = {rank + offset: token.decode("latin-1").translate(letters) for token, rank in ranks.items()}
    by_id |= {i: token for token, i in ids.items()}
    size = max(by_id) + 1
    if size > 2 * len(by_id) + 1000:
        raise ConfigError(f"{len(by_id)} tokens have ids up to {size - 1}", param="tokenizer")
    tokens = [by_id.get(i, f"[EMPTY_{i}]") for i in range(size)]
    types = [NORMAL] * size
    for token, i in ids.items():
        types[i] = CONTROL if special[token] else USER_DEFINED
    words = [tokens[rank + offset] for rank in sorted(ranks.values())]
    parts = dict.fromkeys(words)
    merges = (merge for word in words for merge in splits(word, parts))
    return byte_pairs(Vocabulary(tokens, types=types), merges, pre)
