"""Pooling: what becomes of a prompt's last hidden states when a vector is wanted: facts only, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.hub import read_json
from kvasir.engine.sentence_transformers import WAYS, Dense, Way, read_modules
from kvasir.engine.spec import Spec

Activation = Literal["identity", "sigmoid", "softmax"]
Task = Literal["generate", "embed", "classify", "score"]
ACTIVATIONS: dict[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
"""Last part of a torch class's path."""
HEAD = re.compile(
    r"(?:^|\.)((?:pooler\.dense|pre_classifier|classifier(?:\.dense|\.out_proj)?|score)\.(?:weight|bias))$"
)
"""Tensors of a checkpoint that belong to no decoder but to what stands behind it; group 1 is their name here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The vector says how well each label fits."""

    names: tuple[str, ...]
    activation: Activation
    """What makes probabilities (or a score) of logits."""
    token_ids: tuple[int, ...] = ()
    """There is no layer of its own: the logit of the first token, less that of the second (yes and no)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """From hidden states [n, M] of a prompt to one vector [width]."""

    ways: tuple[Way, ...]
    """How rows become one; several are laid behind each other."""
    width: int
    """Of the vector."""
    dense: tuple[Dense, ...] = ()
    normalize: bool = True
    """Vectors of embedders have length 1."""
    labels: Labels | None = None
    """None: it embeds."""
    matryoshka: tuple[int, ...] | None = None
    """Dimensions to which it may be cut; empty: any. None: nothing says that the first ones mean something alone."""

    @property
    def from_last(self) -> bool:
        """The last row is all it reads: rows that are found in the prefix cache needn't be computed."""
        return self.ways == ("last",)


def pooling_of(config: Mapping[str, Any], spec: Spec, folder: Path | None) -> Pooling:
    """What config.json says, and sentence-transformers' files in `folder` (a GGUF file has none). Where neither does:
    labels by the model's kind, and vectors by the last token of a causal model, else by the mean."""
    folder = folder if folder is not None and folder.is_dir() else None
    modules = read_modules(folder) if folder is not None else None
    own = read_json(folder / "config_sentence_transformers.json") if folder is not None else {}
    tokens = modules.score_tokens if modules else ()
    if labels := _labels(config, own, tokens or _answers(config, folder)):
        ways: tuple[Way, ...] = ("last",) if spec.causal else ("cls",)
        return Pooling(ways=ways, width=len(labels.names), normalize=True, labels=labels)
    if modules is None or not modules.ways:
        default: Way = "last" if spec.causal else "mean"
        given = (WAYS.get(str(config.get("pooling_type")), default),)  # GGUF files say it
        return Pooling(ways=given, width=spec.hidden, matryoshka=_matryoshka(config, own))
    width = modules.dense[-1].outputs if modules.dense else spec.hidden * len(modules.ways)
    return Pooling(
        ways=modules.ways,
        width=width,
        dense=modules.dense,
        normalize=modules.normalize,
        matryoshka=_matryoshka(config, own),
    )


def tasks_of(spec: Spec, pooling: Pooling) -> tuple[Task, ...]:
    """What a model can be asked for. Two texts are scored by a model of one label, or by comparing their vectors."""
    if pooling.labels is not None:
        return ("classify", "score") if len(pooling.labels.names) == 1 else ("classify",)
    return ("generate", "embed") if spec.lm_head and spec.causal else ("embed",)


def check_dimensions(pooling: Pooling, wanted: int, model: str) -> None:
    """ClientError unless vectors may be cut to the first `wanted` numbers (Matryoshka, arXiv:2205.13147)."""
    if pooling.labels is not None:
        raise ClientError("dimensions are for embeddings; this is a classifier", param="dimensions")
    if wanted == pooling.width:
        return
    if pooling.matryoshka is None:
        why = "nothing in its files says that it was trained for that (matryoshka_dimensions or is_matryoshka)"
        raise ClientError(f"model {model!r} has {pooling.width} dimensions and can't be cut: {why}", param="dimensions")
    if wanted > pooling.width or (pooling.matryoshka and wanted not in pooling.matryoshka):
        sizes = ", ".join(map(str, pooling.matryoshka)) or f"1 to {pooling.width}"
        raise ClientError(f"dimensions must be {sizes}, got {wanted}", param="dimensions")


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Its architecture ends in a layer of labels."""
    return any("ForSequenceClassification" in name for name in config.get("architectures") or ())


def _answers(config: Mapping[str, Any], folder: Path | None) -> tuple[int, ...]:
    """(yes, no) of a generating model that is asked for one of two words: vLLM's `classifier_from_token` names them the
    other way round, by --hf-overrides."""
    words = config.get("classifier_from_token")
    if words is None:
        return ()
    if not isinstance(words, (list, tuple)) or len(words) != 2:
        raise ConfigError(f"classifier_from_token must be two words, the yes behind the no, got {words!r:.60}")
    vocab = read_json(folder / "tokenizer.json").get("model", {}).get("vocab") if folder is not None else None
    no, yes = (_token_id(vocab, word) for word in words)
    return yes, no


def _token_id(vocab: Any, word: Any) -> int:
    found = vocab.get(word) if isinstance(vocab, dict) else None
    if not isinstance(found, int):
        raise ConfigError(f"classifier_from_token: {word!r} isn't one token of tokenizer.json")
    return found


def _labels(config: Mapping[str, Any], own: Mapping[str, Any], tokens: tuple[int, ...]) -> Labels | None:
    if not tokens and not is_classifier(config):
        return None
    count = 1 if tokens else _count(config)
    given = config.get("id2label") or {}
    names = tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(count))
    return Labels(names=names, activation=_activation(config, own, count), token_ids=tokens)


def _count(config: Mapping[str, Any]) -> int:
    count = config.get("num_labels") or len(config.get("id2label") or ()) or 2
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"config.json: num_labels must be a positive integer, got {count!r:.60}")
    return count


def _activation(config: Mapping[str, Any], own: Mapping[str, Any], count: int) -> Activation:
    """sentence-transformers' word first, then transformers', then the number of labels."""
    inner = config.get("sentence_transformers")
    places = (own, inner if isinstance(inner, dict) else {})
    named = next((place["activation_fn"] for place in places if place.get("activation_fn")), None)
    if named := named or config.get("sbert_ce_default_activation_function"):
        kind = str(named).rpartition(".")[2]
        if kind not in ACTIVATIONS:
            raise ConfigError(f"config.json: activation {named} isn't supported; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[kind]
    problem = config.get("problem_type")
    if problem == "regression":
        return "identity"
    return "sigmoid" if count == 1 or problem == "multi_label_classification" else "softmax"


def _matryoshka(*sources: Mapping[str, Any]) -> tuple[int, ...] | None:
    for source in sources:
        if sizes := source.get("matryoshka_dimensions"):
            return tuple(sizes)
        if source.get("is_matryoshka"):
            return ()
    return None
