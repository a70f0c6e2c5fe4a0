"""Pooler: one vector per prompt, from the last hidden states of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kvasir.engine.batch import send
from kvasir.engine.errors import ConfigError
from kvasir.engine.pooling import Pooling
from kvasir.engine.request import PoolingParams
from kvasir.engine.sentence_transformers import Dense, Way
from kvasir.engine.step import NewSequence, Slice

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
BODIES = {"pooler.dense": "Tanh", "classifier.dense": "Tanh", "pre_classifier": "ReLU"}
"""Layers between the pooled row and the labels: BERT's, RoBERTa's, DistilBERT's; and their activations."""
ENDS = ("classifier.out_proj", "classifier", "score")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Affine:
    """x[S, I] -> activation(x @ weight.T + bias)[S, O], in float32: it is small, and what comes out is compared."""

    weight: Tensor
    bias: Tensor | None
    activation: str = "Identity"

    def __call__(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.activation](F.linear(x, self.weight, self.bias))


@dataclass(slots=True)
class _Prompt:
    """A sequence whose vector is wanted."""

    length: int
    params: PoolingParams
    token_types: Ints | None
    so_far: Tensor | None = None
    """[ways, M] of the slices before, when it is computed in several."""


class Pooler:
    """Keeps for each seat what its prompt's slices so far brought. `logits` are the decoder's, for scores by tokens."""

    def __init__(
        self, pooling: Pooling, stages: Sequence[Affine], device: torch.device, *, token_types: int = 0
    ) -> None:
        self.pooling, self.stages, self.device = pooling, tuple(stages), device
        self._token_types = token_types
        self._prompts: dict[int, _Prompt] = {}

    def enter(self, new: NewSequence) -> None:
        """A sequence begins, or begins again after a preemption."""
        if new.pooling is None:
            return
        segments = np.array(new.token_type_ids, np.int64) if new.token_type_ids and self._token_types > 1 else None
        self._prompts[new.seat] = _Prompt(new.prompt_len, new.pooling, segments)

    def rows(self, slices: Sequence[Slice]) -> Tensor | None:
        """Which rows of these slices count [R] int64; None: all."""
        single = self._single(slices)
        return None if single is None else send(np.array(list(single.values()), np.int64), self.device)

    def token_types(self, slices: Sequence[Slice]) -> Tensor | None:
        """Segments [T] of these slices' rows; None: all 0."""
        segments = [self._prompts[part.seat].token_types for part in slices]
        if all(types is None for types in segments):
            return None
        parts = [
            np.zeros(part.count, np.int64) if types is None else types[part.start : part.start + part.count]
            for part, types in zip(slices, segments, strict=True)
        ]
        return send(np.concatenate(parts), self.device)

    def take(
        self, slices: Sequence[Slice], x: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> dict[int, Sequence[float]]:
        """The vectors of the prompts that end with these slices, by seat. x[R, M] are the rows that `rows` wants."""
        pooled = self._pooled(slices, x.float())
        ended: list[int] = []
        for i, part in enumerate(slices):
            prompt = self._prompts[part.seat]
            if prompt.so_far is not None:
                pooled[i] = self._joined(prompt.so_far, pooled[i])
            prompt.so_far = pooled[i]
            if part.start + part.count >= prompt.length:
                ended.append(i)
        if not ended:
            return {}
        vectors = self._staged(pooled[ended].flatten(1), x.dtype, logits).cpu().numpy()
        return {
            slices[i].seat: self._finished(vector, self._prompts.pop(slices[i].seat).params)
            for i, vector in zip(ended, vectors, strict=True)
        }

    def _single(self, slices: Sequence[Slice]) -> dict[int, int] | None:
        """Slice -> its row that counts, where one row of each prompt does; None: all rows do."""
        if self.pooling.ways not in (("last",), ("cls",)):
            return None
        found, first = {}, 0
        for i, part in enumerate(slices):
            position = 0 if self.pooling.ways == ("cls",) else self._prompts[part.seat].length - 1
            if part.start <= position < part.start + part.count:
                found[i] = first + position - part.start
            first += part.count
        return found

    def _pooled(self, slices: Sequence[Slice], x: Tensor) -> Tensor:
        """What each slice contributes [S, ways, M]."""
        single = self._single(slices)
        if single is not None:
            pooled = x.new_zeros(len(slices), 1, x.shape[1])
            pooled[:, 0].index_copy_(0, send(np.array(list(single), np.int64), self.device), x)
            return pooled
        counts = np.array([part.count for part in slices])
        owner = np.repeat(np.arange(len(slices)), counts)
        first = np.array([part.start for part in slices]) - (np.cumsum(counts) - counts)
        positions = np.arange(counts.sum()) + first[owner]
        lengths = np.array([self._prompts[part.seat].length for part in slices])[owner]
        segments = send(counts, self.device)
        found = [self._reduced(way, x, positions, lengths, segments) for way in self.pooling.ways]
        return torch.stack(found, 1)

    def _reduced(self, way: Way, x: Tensor, positions: Ints, lengths: Ints, segments: Tensor) -> Tensor:
        if way == "max":
            return torch.segment_reduce(x, "max", lengths=segments)
        weights = torch.from_numpy(_weights(way, positions, lengths)).to(x)
        return torch.segment_reduce(x * weights[:, None], "sum", lengths=segments)

    def _joined(self, before: Tensor, here: Tensor) -> Tensor:
        """Contributions [ways, M] of two slices of a prompt."""
        ways = zip(self.pooling.ways, before, here, strict=True)
        return torch.stack([torch.maximum(a, b) if way == "max" else a + b for way, a, b in ways])

    def _staged(self, x: Tensor, dtype: torch.dtype, logits: Callable[[Tensor], Tensor]) -> Tensor:
        labels = self.pooling.labels
        if labels is not None and labels.token_ids:
            found = logits(x.to(dtype))[:, list(labels.token_ids)]
            return found[:, :1] - found[:, 1:] if found.shape[1] == 2 else found
        for stage in self.stages:
            x = stage(x)
        return x

    def _finished(self, vector: Floats, params: PoolingParams) -> list[float]:
        """Cut and scaled as the request, or else the model, says."""
        normalize = self.pooling.normalize if params.normalize is None else params.normalize
        if params.dimensions is not None:
            vector = vector[: params.dimensions]
        if not normalize:
            return _floats(vector)
        if self.pooling.labels is not None:
            return _floats(_probabilities(vector, self.pooling.labels.activation))
        return _floats(vector / max(float(np.linalg.norm(vector)), 1e-12))


def load_pooler(
    pooling: Pooling, head: Mapping[str, Tensor], device: torch.device, *, hidden: int, token_types: int = 0
) -> Pooler:
    """`head` holds the checkpoint's tensors that match pooling.HEAD, by the names there. ConfigError says what doesn't fit."""
    if pooling.labels is None:
        stages = [_dense(module) for module in pooling.dense]
    else:
        stages = [] if pooling.labels.token_ids else _head(head)
    width = hidden * len(pooling.ways)
    for stage in stages:
        if stage.weight.dim() != 2 or stage.weight.shape[1] != width:
            raise ConfigError(
                f"a layer behind the pooling has shape {list(stage.weight.shape)}, it gets {width} numbers"
            )
        width = stage.weight.shape[0]
    if stages and width != pooling.width:
        raise ConfigError(f"the last layer gives {width} numbers, the model's files say {pooling.width}")
    moved = [Affine(s.weight.to(device), None if s.bias is None else s.bias.to(device), s.activation) for s in stages]
    return Pooler(pooling, moved, device, token_types=token_types)


def _head(tensors: Mapping[str, Tensor]) -> list[Affine]:
    """The layers behind the row that stands for the whole text."""
    end = next((name for name in ENDS if f"{name}.weight" in tensors), None)
    if end is None:
        wanted = " or ".join(f"{name}.weight" for name in ENDS)
        raise ConfigError(f"the architecture says that texts are classified, but the checkpoint lacks {wanted}")
    body = [name for name in BODIES if f"{name}.weight" in tensors] if end != "score" else []
    return [_affine(tensors, name, BODIES[name]) for name in body] + [_affine(tensors, end)]


def _affine(tensors: Mapping[str, Tensor], name: str, activation: str = "Identity") -> Affine:
    bias = tensors.get(f"{name}.bias")
    return Affine(tensors[f"{name}.weight"].float(), None if bias is None else bias.float(), activation)


def _dense(module: Dense) -> Affine:
    tensors = _module_tensors(module.folder)
    wanted = {"linear.weight"} | ({"linear.bias"} if module.bias else set())
    if set(tensors) != wanted:
        raise ConfigError(
            f"{module.folder} holds {', '.join(sorted(tensors))}; it must hold {', '.join(sorted(wanted))}"
        )
    if tensors["linear.weight"].shape != (module.outputs, module.inputs):
        shape = list(tensors["linear.weight"].shape)
        raise ConfigError(
            f"{module.folder}: weight has shape {shape}, config.json says {[module.outputs, module.inputs]}"
        )
    return _affine(tensors, "linear", module.activation)


def _module_tensors(folder: Path) -> dict[str, Tensor]:
    file, old = folder / "model.safetensors", folder / "pytorch_model.bin"
    if file.exists():
        return load_file(file)
    if old.exists():
        found: dict[str, Tensor] = torch.load(old, map_location="cpu", weights_only=True)
        return found
    raise ConfigError(f"{folder} holds neither {file.name} nor {old.name}", param="model")


def _weights(way: Way, positions: Ints, lengths: Ints) -> npt.NDArray[np.float64]:
    """What a row at this position of a prompt of this length counts [R]."""
    weights = np.ones(len(positions))
    if way == "cls":
        weights *= positions == 0
    elif way == "last":
        weights *= positions == lengths - 1
    elif way == "mean":
        weights /= lengths
    elif way == "mean_sqrt_len":
        weights /= np.sqrt(lengths)
    else:
        weights *= (positions + 1) / (lengths * (lengths + 1) / 2)
    return weights


def _probabilities(logits: Floats, activation: str) -> Floats:
    if activation == "identity":
        return logits
    if activation == "sigmoid":
        found: Floats = np.exp(-np.logaddexp(np.float32(0), -logits))  # 1 / (1 + exp(-x)) without overflow
        return found
    found = np.exp(logits - logits.max())
    found /= found.sum()
    return found


def _floats(vector: Floats) -> list[float]:
    found: list[float] = vector.tolist()
    return found
