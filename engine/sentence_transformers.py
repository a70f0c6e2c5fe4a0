"""sentence-transformers' folder layout: modules.json, 1_Pooling, 2_Dense, prompts, lengths. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.hub import read_json

Way = Literal["cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last"]
WAYS: dict[str, Way] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""pooling_mode, in the order in which several are laid behind each other."""
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""The same as older files say it: true or false under a name of its own."""
DENSE_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
"""Last part of a torch class's path."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling: activation(x @ weight.T + bias)."""

    folder: Path
    """Holds its weights."""
    inputs: int
    outputs: int
    bias: bool
    activation: str
    """One of DENSE_ACTIVATIONS."""


@dataclass(frozen=True, slots=True)
class Modules:
    """What modules.json puts behind the transformer."""

    ways: tuple[Way, ...] = ()
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    score_tokens: tuple[int, ...] = ()
    """A reranker that says yes or no: (true_token_id, false_token_id)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRules:
    """What is done to a text before it is tokenised for an embedder."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> what stands before the text."""
    default: str | None = None
    """The one that is used where none is named."""
    lower_case: bool = False
    max_len: int | None = None
    """Tokens that the model was trained for, where that is less than it has positions."""
    similarity: Literal["cosine", "dot"] = "cosine"

    def apply(self, text: str, name: str | None = None) -> str:
        """`text` behind the prompt called `name`, or behind the model's default. ClientError when there is none."""
        if name is not None and name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise ClientError(f"the model has no prompt {name!r}; its prompts: {known}", param="prompt_name")
        name = self.default if name is None else name
        text = text if name is None else self.prompts[name] + text
        return text.lower() if self.lower_case else text


def read_modules(folder: Path) -> Modules | None:
    """None where there is no modules.json. ConfigError names what isn't supported."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    found = Modules()
    for entry in _list(path):
        kind, place = str(entry.get("type", "")).rpartition(".")[2], folder / str(entry.get("path", ""))
        config = read_json(place / "config.json")
        if kind == "Pooling":
            found = Modules(_ways(place, config))
        elif kind == "Dense":
            if found.normalize:
                raise ConfigError(f"{path}: a Dense module behind Normalize isn't supported", param="model")
            found = Modules(found.ways, (*found.dense, _dense(place, config)))
        elif kind == "Normalize":
            found = Modules(found.ways, found.dense, True)
        elif kind == "LogitScore":
            names = ("true_token_id", "false_token_id")
            found = Modules(score_tokens=tuple(config[n] for n in names if config.get(n) is not None))
        elif not kind.endswith("Transformer") and kind != "Dropout":
            raise ConfigError(f"{path}: modules of type {entry.get('type')!r} aren't supported", param="model")
    return found


def read_text_rules(folder: Path) -> TextRules:
    """What config_sentence_transformers.json and sentence_bert_config.json say; neutral where they don't exist, as beside
    a GGUF file."""
    if not folder.is_dir():
        return TextRules()
    own, lengths = (
        read_json(folder / "config_sentence_transformers.json"),
        read_json(folder / "sentence_bert_config.json"),
    )
    prompts = {str(name): str(text) for name, text in (own.get("prompts") or {}).items() if text is not None}
    default = own.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ConfigError(f"{folder}: default_prompt_name {default!r} isn't among the prompts", param="model")
    similarity = own.get("similarity_fn_name") or "cosine"
    return TextRules(
        prompts=prompts,
        default=default,
        lower_case=bool(lengths.get("do_lower_case")),
        max_len=lengths.get("max_seq_length"),
        similarity="dot" if similarity == "dot" else "cosine",
    )


def _list(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} isn't valid JSON: {error}", param="model") from error
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ConfigError(f"{path} must hold a JSON list of objects", param="model")
    return value


def _ways(folder: Path, config: Mapping[str, Any]) -> tuple[Way, ...]:
    """Files say it by flags, newer ones by `pooling_mode`."""
    mode = config.get("pooling_mode")
    names = [mode] if isinstance(mode, str) else mode or [name for name in WAYS if config.get(FLAGS[name])]
    if any(name not in WAYS for name in names):
        raise ConfigError(
            f"{folder}: pooling_mode {mode!r} isn't supported; supported: {', '.join(WAYS)}", param="model"
        )
    if config.get("include_prompt") is False:
        raise ConfigError(f"{folder}: include_prompt false isn't supported", param="model")
    return tuple(WAYS[name] for name in names) or ("mean",)


def _dense(folder: Path, config: Mapping[str, Any]) -> Dense:
    activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    if activation not in DENSE_ACTIVATIONS:
        supported = ", ".join(DENSE_ACTIVATIONS)
        raise ConfigError(f"{folder}: activation {activation!r} isn't supported; supported: {supported}", param="model")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ConfigError(f"{folder}: a Dense module is supported behind the pooling alone, without residual")
    for name in ("in_features", "out_features"):
        if not isinstance(config.get(name), int):
            raise ConfigError(f"{folder / 'config.json'} lacks {name}", param="model")
    return Dense(folder, config["in_features"], config["out_features"], bool(config.get("bias", True)), activation)
