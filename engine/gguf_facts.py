"""What a GGUF file says of its model, asked for by metadata key or tensor name."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import GGUF, StoredTensor


class Facts:
    """The metadata of one file, by keys without the architecture's name in front."""

    def __init__(self, file: GGUF, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, key: str, default: Any = None) -> Any:
        """A number; an array of equal numbers, one for each layer, is that number."""
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray) and len(value):
            if (value != value[0]).any():
                self.fail(f"{self.arch}.{key} differs from layer to layer")
            value = value[0].item()
        if value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            self.fail(f"{self.arch}.{key} must be a number, it is {value!r:.40}")
        return value

    def need(self, key: str) -> Any:
        """The same where nothing works without it."""
        value = self.get(key)
        if value is None:
            self.fail(f"{self.arch}.{key} is missing")
        return value

    def count(self, key: str) -> int:
        """The same where it counts something."""
        value = self.need(key)
        if not isinstance(value, int) or not 1 <= value < 2**31:
            self.fail(f"{self.arch}.{key} must be a positive integer, it is {value}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        return value if isinstance(value, str) else self.fail(f"{self.arch}.{key} must be a text, it is {value!r:.40}")

    def texts(self, key: str) -> list[str]:
        """A list of words, empty where the file has none."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else []

    def per_layer(self, key: str) -> list[bool] | None:
        """A flag for each layer; None where the file has none."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        if len(value) < self.depth:
            self.fail(f"{self.arch}.{key} has {len(value)} entries for {self.depth} layers")
        return [bool(flag) for flag in value[: self.depth]]

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def tensor(self, name: str) -> StoredTensor:
        if name not in self.file.tensors:
            self.fail(f"tensor {name} is missing")
        return self.file.tensors[name]

    def fail(self, what: str) -> NoReturn:
        raise ConfigError(f"{self.file.path}: {what}")

    @property
    def depth(self) -> int:
        depth = self.count("block_count") - int(self.get("nextn_predict_layers", 0))
        if not 0 < depth <= len(self.file.tensors):
            self.fail(f"{self.arch}.block_count says {depth} layers, there are {len(self.file.tensors)} tensors")
        return depth

    @property
    def hidden(self) -> int:
        hidden, embed = self.count("embedding_length"), self.tensor("token_embd.weight")
        if embed.shape[1:] != (hidden,):
            self.fail(f"{self.arch}.embedding_length is {hidden}, {embed.name} has shape {list(embed.shape)}")
        return hidden

    @property
    def heads(self) -> int:
        return self.count("attention.head_count")

    @property
    def head_dim(self) -> int:
        if self.get("attention.key_length"):
            return self.count("attention.key_length")
        if self.hidden % self.heads:
            self.fail(
                f"{self.heads} heads don't divide {self.hidden} evenly, and {self.arch}.attention.key_length is missing"
            )
        return self.hidden // self.heads

    @property
    def experts(self) -> int:
        """Checked against a router, because a place is made for each before any is looked for."""
        count = self.count("expert_count")
        routers = (t for name, t in self.file.tensors.items() if name.endswith(".ffn_gate_inp.weight"))
        router = next(routers, None)
        if router is not None and router.shape[0] != count:
            self.fail(f"{self.arch}.expert_count is {count}, but {router.name} chooses among {router.shape[0]}")
        return count
