"""Where a model's files are, and the facts in its small JSON files. No torch, no tokenizer."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.gguf import is_gguf
from kvasir.engine.request import SamplingParams

logger = logging.getLogger(__name__)
SMALL = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "*.tiktoken", "[0-9]_*/*.bin")
"""Files that say what a model is, layers behind an embedder (2_Dense/pytorch_model.bin) among them; its weights are chosen by
their format."""
WEIGHTS = {
    "safetensors": ("*.safetensors",),
    "pt": ("*.bin", "*.pt", "*.pth"),
    "npcache": ("*.bin", "*.pt", "*.pth"),
    "mistral": ("consolidated*.safetensors",),
}
ELSEWHERE = ("original/*", "onnx/*", "openvino/*", "*/checkpoint-*")
"""Copies of the same weights that some repositories carry."""

FURTHER_PART = re.compile(r"-0*([2-9]|[1-9]\d+)-of-\d+\.gguf$")
"""Of a model in several GGUF files all but the first."""
SEEING = "mmproj"
"""What names of GGUF files begin with that hold a model's eyes and lie beside it."""

_SAMPLING_FIELDS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
    "max_new_tokens": "max_tokens",
}
"""generation_config.json's name -> that of `SamplingParams`."""
_GGUF_SAMPLING = {
    **{name: name for name in ("top_k", "top_p", "min_p", "mirostat", "mirostat_tau", "mirostat_eta")},
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "repeat_last_n",
}
_UNHEEDED = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "no_repeat_ngram_size", "num_beams",
    "epsilon_cutoff", "eta_cutoff", "top_h", "exponential_decay_length_penalty", "guidance_scale", "min_new_tokens",
    "stop_strings",
)  # fmt: skip
"""What would change a text there, too, but doesn't here."""


def locate(
    model: str,
    revision: str | None = None,
    *,
    load_format: str = "auto",
    token: str | None = None,
    cache: str | None = None,
) -> Path:
    """Folder or GGUF file of `model`: a path as given, a bundled name, or a hub id that is fetched in this format
    (HF_TOKEN, HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT are honoured; "tokenizer" leaves weights there). ConfigError says
    what was tried."""
    given = Path(model).expanduser()
    if given.is_dir():
        return _checked(given)
    if given.is_file():
        return _checked_file(given)
    bundled = bundled_models()
    if model in bundled:
        return _checked(bundled[model])
    repository, _, file = model.partition(":")
    if not _is_hub_id(repository):
        raise ConfigError(_not_found(model, "it isn't a hub id (OWNER/NAME) either"), param="model")
    source = _Source(repository, revision, token, cache)
    if file or load_format == "gguf":
        return _fetch_gguf(source, file)
    return _checked(_fetch(source, load_format))


def bundled_models() -> dict[str, Path]:
    """Name -> folder of the models that come with Kvasir, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    roots = (package / "models", package / "deploy" / "models")
    folders = [folder for root in roots if root.is_dir() for folder in sorted(root.iterdir())]
    return {folder.name: folder for folder in reversed(folders) if (folder / "config.json").is_file()}


def default_sampling(folder: Path) -> dict[str, Any]:
    """Sampling defaults that generation_config.json asks for, by the names of `SamplingParams`. What it doesn't say isn't in
    the result; what it says in vain is logged."""
    path = folder / "generation_config.json"
    config = read_json(path)
    found = {ours: config[name] for name, ours in _SAMPLING_FIELDS.items() if config.get(name) is not None}
    _log_unheeded(path, (name for name in _UNHEEDED if config.get(name) not in (None, 0, 1, [], {})))
    return _checked_sampling(found, path)


def gguf_sampling(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same as a GGUF file says it, in llama.cpp's words."""
    prefix = "general.sampling."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    found = {_GGUF_SAMPLING[name]: value for name, value in given.items() if name in _GGUF_SAMPLING}
    _log_unheeded(path, (name for name in given if name not in _GGUF_SAMPLING))
    return _checked_sampling(found, path)


def _log_unheeded(path: Path, names: Iterable[str]) -> None:
    if listed := ", ".join(names):
        logger.warning("%s: not heeded: %s", path, listed)


def _checked_sampling(found: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        SamplingParams(**found)
    except ClientError as error:
        text = f"{path}: {error.message}; correct it or pass --generation-config none"
        raise ConfigError(text, param="generation_config") from error
    return found


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a sequence: generation_config.json's, or else config.json's, and the tokenizer's eos_token. Empty when
    the model has none."""
    ids = list(_ids(read_json(folder / "generation_config.json").get("eos_token_id")))
    if not ids:
        config = read_json(folder / "config.json")
        nested = config.get("text_config")
        ids += _ids(config.get("eos_token_id"))
        ids += _ids(nested.get("eos_token_id") if isinstance(nested, dict) and not ids else None)
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        ids += _ids(_token_id(folder, content))
    return tuple(dict.fromkeys(ids))


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} when there is no such file; ConfigError when it isn't a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # beside a GGUF file there are none
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
    """The folder if it holds a model, or the one GGUF file in it."""
    if (folder / "config.json").is_file() or (folder / "params.json").is_file():
        return folder
    files = _first_parts(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:8])
        raise ConfigError(f"{folder} holds several GGUF files; name one of them: {names}", param="model")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} is an adapter, and adapters are not supported yet", param="model")
    has = sorted(entry.name for entry in folder.iterdir())[:8]
    listing = f"it holds {', '.join(has)}" if has else "it is empty"
    raise ConfigError(f"{folder} has no config.json, so it isn't a model's folder ({listing})", param="model")


def _first_parts(files: Iterable[Path]) -> list[Path]:
    """One for each model."""
    return sorted(f for f in files if not FURTHER_PART.search(f.name) and not f.name.startswith(SEEING))


def _checked_file(file: Path) -> Path:
    if is_gguf(file):  # Ollama's blobs have no suffix
        return file
    text = f"model {str(file)!r} is a file; pass a GGUF file, or the folder of config.json and the weights"
    raise ConfigError(text, param="model")


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~", os.sep))


def _not_found(model: str, hub: str) -> str:
    names = ", ".join(sorted(bundled_models())) or "none"
    return (
        f"model {model!r} was not found: there is no folder {Path(model).expanduser()}, it isn't a bundled model "
        f"(bundled: {names}), and {hub}. Pass a GGUF file, or a folder that holds config.json, weights and a tokenizer"
    )


@dataclass(frozen=True)
class _Source:
    """A repository on the hub."""

    repository: str
    revision: str | None
    token: str | None = field(repr=False)
    cache: str | None

    def fetch(self, patterns: Iterable[str], ignored: Iterable[str] = ()) -> Path:
        """Snapshot with the files that match, from the local cache when it is there (huggingface_hub decides)."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self.repository,
                    revision=self.revision,
                    cache_dir=self.cache,
                    token=self.token,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(ignored),
                )
            )
        except LocalEntryNotFoundError as error:
            offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
            why = "HF_HUB_OFFLINE is set and" if offline else "the hub can't be reached and"
            raise ConfigError(
                _not_found(self.repository, f"{why} the hub's local cache doesn't hold it"), param="model"
            ) from error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(_not_found(self.repository, self._refusal(error)), param="model") from error

    def _refusal(self, error: Exception) -> str:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {self.revision!r}" if self.revision else ""
        private = "private and gated models need --hf-token or HF_TOKEN"
        return f"the hub doesn't give it{at} ({type(error).__name__}: {reason}; {private})"


def _fetch(source: _Source, load_format: str) -> Path:
    """Small files and the weights in this format; auto: the first format that is there."""
    if load_format in ("tokenizer", "dummy"):
        return source.fetch(SMALL)
    if load_format in WEIGHTS:
        ignored = ELSEWHERE if load_format == "mistral" else (*ELSEWHERE, "consolidated*")
        return source.fetch((*SMALL, *WEIGHTS[load_format]), ignored)
    folder = source.fetch((*SMALL, *WEIGHTS["safetensors"]), (*ELSEWHERE, "consolidated*"))
    for other in ("mistral", "pt"):
        if list(folder.glob("*.safetensors")):
            break
        folder = source.fetch((*SMALL, *WEIGHTS[other]), ELSEWHERE)
    return folder


def _fetch_gguf(source: _Source, file: str) -> Path:
    """The GGUF file of this name, or of this quantisation (Q4_K_M); all parts of a split one."""
    pattern = file.replace(".gguf", "*.gguf") if file.endswith(".gguf") else f"*{file}*.gguf"
    patterns = (pattern, pattern.lower(), pattern.upper().replace(".GGUF", ".gguf"))
    folder = source.fetch(patterns, (f"{SEEING}*", f"*/{SEEING}*"))
    found = sorted(path for path in folder.rglob("*.gguf") if file.removesuffix(".gguf").lower() in path.name.lower())
    firsts = _first_parts(found)
    if len(firsts) == 1:
        return firsts[0]
    names = ", ".join(path.name for path in firsts) or "none"
    text = f"{source.repository}: {'several GGUF files match' if firsts else 'no GGUF file matches'} {file!r} ({names})"
    raise ConfigError(f"{text}; name one as OWNER/NAME:FILE.gguf", param="model")
