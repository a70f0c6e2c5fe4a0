"""tokenizer.json, with what the small files beside it say: some are newer, and say more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import read_json
from kvasir.engine.pre_tokenizers import PreTokenizer, pre_tokenizer
from kvasir.engine.tokenizer_settings import ADDED_FLAGS, Settings


def read_tokenizer_json(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """The backend; ConfigError when the file isn't one. What it puts around a text counts: add_bos_token and add_eos_token
    are for files without one, as in transformers 5."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself for a malformed file
        raise ConfigError(f"{path} can't be read: {error}", param="tokenizer") from error
    _add(backend, settings)
    _mend_words(backend, settings)
    return backend


def _add(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for _, entry in sorted(settings.added.items()):
        flags = {name: bool(entry[name]) for name in ADDED_FLAGS if name in entry}
        token = there.get(entry["content"])
        if token is None or any(getattr(token, name) != value for name, value in flags.items()):
            there[entry["content"]] = token = AddedToken(entry["content"], **flags)
            backend.add_tokens([token])
    for content, flags in settings.named.items():
        if content in there:
            continue
        if backend.token_to_id(content) is None:
            wanted = settings.rows is None or backend.get_vocab_size() < settings.rows
        else:
            wanted = content != settings.special.get("pad_token")
        if wanted:
            backend.add_tokens([AddedToken(content, **flags)])


def _mend_words(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Mistral's files of 2025 cut words by another model's pattern. The right one is in the tekken.json beside them;
    without that, fix_mistral_regex asks for it."""
    tekken = read_json(settings.folder / "tekken.json").get("config")
    pattern = tekken.get("pattern") if isinstance(tekken, dict) else None
    if pattern is None and settings.config.get("fix_mistral_regex"):
        pattern = pre_tokenizer("tekken").patterns[0]
    if pattern is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.Sequence):
        return
    steps: list[dict[str, Any]] = json.loads(backend.pre_tokenizer.__getstate__())["pretokenizers"]
    if steps and steps[0]["type"] == "Split" and steps[0]["pattern"] != {"Regex": pattern}:
        built: Any = PreTokenizer((pattern,)).build()
        backend.pre_tokenizer[0] = built[0]
