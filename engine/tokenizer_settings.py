"""What the small files beside a vocabulary say: tokenizer_config.json, special_tokens_map.json, added_tokens.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import read_json

MAX_ID = 2**24
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class Settings:
    """All of them together."""

    folder: Path
    config: Mapping[str, Any]
    special: dict[str, str]
    """bos_token, ... -> text."""
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Tokens above (or in place of) the vocabulary's, by id."""
    named: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Text of every special token that has a role or is listed -> its flags. Those that the vocabulary lacks come behind its
    end, in this order, as in transformers."""
    rows: int | None = None
    """Tokens that the model has numbers for, where its config.json lies here: those behind them can't be read."""

    @property
    def family(self) -> str:
        """The tokenizer's class without "Fast", "" where none is named."""
        return str(self.config.get("tokenizer_class") or "").removesuffix("Fast")


def read_settings(folder: Path) -> Settings:
    """Those in `folder`. special_tokens_map.json is older than added_tokens_decoder: it counts most where that is missing."""
    config = read_json(folder / "tokenizer_config.json")
    sources = [config, read_json(folder / "special_tokens_map.json")]
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        sources.reverse()
    roles: dict[str, Any] = {}
    for source in sources:
        roles |= {key: value for key, value in source.items() if key.endswith("_token") and _text(value) is not None}
    known = {key: roles.pop(key) for key in SPECIAL_NAMES if key in roles}
    entries = (*known.values(), *roles.values(), *_without_role(sources))
    named = {text: _flags(value) for value in entries if (text := _text(value))}
    special = {key: text for key, value in known.items() if (text := _text(value)) is not None}
    added: dict[int, dict[str, Any]] = {
        i: {"content": token} for token, i in read_json(folder / "added_tokens.json").items()
    }
    added |= {int(i) if i.isdigit() else -1: entry for i, entry in (decoder or {}).items()}
    for i, entry in added.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(i, int) or not 0 <= i < MAX_ID or not isinstance(content, str):
            raise ConfigError(f"{folder}: the added token {i!r} ({entry}) must have an id and a content")
        entry["special"] = entry.get("special", False) or content in special.values()
    return Settings(folder, config, special, added, named, _rows(folder))


def _without_role(sources: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = source.get(key) or []
            if not isinstance(more, (list, dict)):
                raise ConfigError(
                    f"the tokenizer's {key} must be a list or an object, got {more!r:.60}", param="tokenizer"
                )
            yield from more.values() if isinstance(more, dict) else more


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _flags(value: Any) -> dict[str, bool]:
    given = {flag: bool(value[flag]) for flag in ADDED_FLAGS if flag in value} if isinstance(value, dict) else {}
    return {"normalized": False, **given, "special": True}


def _rows(folder: Path) -> int | None:
    config = read_json(folder / "config.json")
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return rows if isinstance(rows, int) else None
