"""ModelCard: what a model's files say about it to people who choose one. Reads no weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvasir.engine.gguf import is_gguf, read_gguf
from kvasir.engine.model_files import ModelFiles

_MAX_HEADER = 100 * 2**20
"""Bytes; safetensors' own limit."""
_MAX_LICENSE = 100_000
"""Characters."""
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """Facts of a model's files; sizes are 0 where they aren't known."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json."""
    format: str = "safetensors"
    parameters: int = 0
    size: int = 0
    """Bytes on disk."""
    modified: float = 0.0
    """Seconds since the epoch."""
    precision: str = ""
    """F32, BF16, Q4_K...: what most of the weights are stored in."""
    license: str = ""
    """The text of a file LICENSE beside them, or what a GGUF file says of it."""

    @classmethod
    def read(cls, files: ModelFiles) -> ModelCard:
        """From the model's folder or GGUF file."""
        path = files.path
        gguf = is_gguf(path)
        parts = [path] if gguf else sorted(path.glob("*.safetensors"))
        counts = _gguf_counts(path) if gguf else _counts(parts)
        return cls(
            config=files.config,
            format="gguf" if gguf else "safetensors",
            parameters=sum(counts.values()),
            size=sum(part.stat().st_size for part in parts),
            modified=path.stat().st_mtime,
            precision=max(counts, key=counts.__getitem__, default=""),
            license=str(read_gguf(path).metadata.get("general.license", "")) if gguf else _license(path),
        )

    @property
    def family(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def parameter_size(self) -> str:
        """7.6B, 3.3M."""
        for unit, letter in _UNITS:
            if self.parameters >= unit:
                return f"{self.parameters / unit:.1f}{letter}"
        return str(self.parameters)

    @property
    def digest(self) -> str:
        """SHA-256 of the facts, 64 hexadecimal digits. It tells models apart, but isn't that of the weights."""
        facts = [self.config, self.format, self.parameters, self.size, self.precision]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _license(folder: Path) -> str:
    for path in sorted(folder.glob("LICENSE*")):
        with (
            contextlib.suppress(OSError),
            path.open(encoding="utf-8", errors="replace") as opened,
        ):  # a folder, or unreadable
            return opened.read(_MAX_LICENSE)
    return ""


def _counts(parts: list[Path]) -> dict[str, int]:
    """Data type -> parameters stored in it. What isn't a safetensors file counts as nothing: who loads it complains."""
    found: dict[str, int] = {}
    for part in parts:
        for entry in _header(part).values():
            if isinstance(entry, dict) and isinstance(kind := entry.get("dtype"), str):
                found[kind] = found.get(kind, 0) + math.prod(entry.get("shape", ()))
    return found


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        start = opened.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size <= _MAX_HEADER:
            return {}
        try:
            header = json.loads(opened.read(size))
        except ValueError:
            return {}
    return header if isinstance(header, dict) else {}


def _gguf_counts(file: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in read_gguf(file).tensors.values():
        found[tensor.type.name] = found.get(tensor.type.name, 0) + math.prod(tensor.shape)
    return found
