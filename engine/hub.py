"""Where a model's files are, and the facts in its small JSON files. No torch, no tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.request import SamplingParams

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt")
"""Files that are fetched from the hub; other formats of the same weights are left there."""

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def locate(model: str, revision: str | None = None) -> Path:
    """Folder of `model`: a folder as given, a bundled name, or a hub id that is fetched (HF_TOKEN, HF_HUB_OFFLINE and
    HF_HOME are honoured). ConfigError says what was tried. The folder holds a config.json."""
    given = Path(model).expanduser()
    if given.is_dir():
        return _checked(given)
    if given.is_file():
        raise ConfigError(f"model {model!r} is a file; pass the folder of config.json and the weights", param="model")
    bundled = bundled_models()
    if model in bundled:
        return _checked(bundled[model])
    if not _is_hub_id(model):
        raise ConfigError(_not_found(model, "it isn't a hub id (owner/name) either"), param="model")
    return _checked(_fetch(model, revision))


def bundled_models() -> dict[str, Path]:
    """Name -> folder of the models that come with Kvasir, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    roots = (package / "models", package / "deploy" / "models")
    folders = [folder for root in roots if root.is_dir() for folder in sorted(root.iterdir())]
    return {folder.name: folder for folder in reversed(folders) if (folder / "config.json").is_file()}


def default_sampling(folder: Path) -> dict[str, Any]:
    """Sampling defaults that generation_config.json asks for, by the names of `SamplingParams`; its max_new_tokens
    becomes max_tokens. What it doesn't say isn't in the result."""
    config = read_json(folder / "generation_config.json")
    found = {name: config[name] for name in _SAMPLING_FIELDS if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        found["max_tokens"] = config["max_new_tokens"]
    try:
        SamplingParams(**found)
    except ClientError as error:
        text = f"{folder / 'generation_config.json'}: {error.message}; correct it or pass --generation-config none"
        raise ConfigError(text, param="generation_config") from error
    return found


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a sequence: those of generation_config.json and the tokenizer's eos_token; where neither names one,
    config.json's. Empty when the model has none."""
    ids = list(_ids(read_json(folder / "generation_config.json").get("eos_token_id")))
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        ids += _ids(_token_id(folder, content))
    if not ids:
        config = read_json(folder / "config.json")
        nested = config.get("text_config")
        ids += _ids(config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None))
    return tuple(dict.fromkeys(ids))


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} when there is no such file; ConfigError when it isn't a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} isn't valid JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, it holds a {type(value).__name__}", param="model")
    return value


def _token_id(folder: Path, content: str) -> int | None:
    """Id of an added token, looked up in the smallest file that knows it."""
    for key, entry in read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        if entry.get("content") == content:
            return int(key)
    tokenizer = read_json(folder / "tokenizer.json")
    for entry in tokenizer.get("added_tokens", ()):
        if entry.get("content") == content:
            return int(entry["id"])
    vocab = tokenizer.get("model", {}).get("vocab") or read_json(folder / "vocab.json")
    found = vocab.get(content) if isinstance(vocab, dict) else None
    return found if isinstance(found, int) else None


def _ids(value: object) -> Iterator[int]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            yield item


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    has = sorted(entry.name for entry in folder.iterdir())[:8]
    if any(name.endswith(".gguf") for name in has):
        raise ConfigError(f"{folder} holds GGUF files, which aren't supported yet; use safetensors", param="model")
    listing = f"it holds {', '.join(has)}" if has else "it is empty"
    raise ConfigError(f"{folder} has no config.json, so it isn't a model's folder ({listing})", param="model")


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~", os.sep))


def _not_found(model: str, hub: str) -> str:
    names = ", ".join(sorted(bundled_models())) or "none"
    return (
        f"model {model!r} was not found: there is no folder {Path(model).expanduser()}, it isn't a bundled model "
        f"(bundled: {names}), and {hub}. Pass a folder that holds config.json, safetensors files and tokenizer.json"
    )


def _fetch(model: str, revision: str | None) -> Path:
    """Snapshot of a hub repository, from the local cache when it is there (huggingface_hub decides)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS)))
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set and" if offline else "the hub can't be reached and"
        text = _not_found(model, f"{why} the hub's local cache doesn't hold it")
        raise ConfigError(text, param="model") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        why = f"the hub doesn't give it{at} ({type(error).__name__}: {reason}; private models need HF_TOKEN)"
        text = _not_found(model, why)
        raise ConfigError(text, param="model") from error
