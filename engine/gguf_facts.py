"""What a GGUF file says of its model, asked for by metadata key or tensor name."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import GGUF, StoredTensor


class Facts:
    """The metadata of one file, by keys without the architecture's name in front."""

    def __init__(self, file: GGUF, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, key: str, default: Any = None) -> Any:
        """A number, string or array; arrays of equal numbers, one for each layer, are that number."""
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray):
            if len(value) and (value == value[0]).all():
                return value[0].item()
            self.fail(f"{self.arch}.{key} differs from layer to layer")
        return value

    def need(self, key: str) -> Any:
        """The same where nothing works without it."""
        value = self.get(key)
        if value is None:
            self.fail(f"{self.arch}.{key} is missing")
        return value

    def per_layer(self, key: str) -> list[bool] | None:
        """An array of flags; None where the file has none."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        return [bool(flag) for flag in value] if isinstance(value, np.ndarray) else None

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
        return int(self.need("block_count")) - int(self.get("nextn_predict_layers", 0))

    @property
    def hidden(self) -> int:
        return int(self.need("embedding_length"))

    @property
    def heads(self) -> int:
        return int(self.need("attention.head_count"))

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length") or self.hidden // self.heads)
