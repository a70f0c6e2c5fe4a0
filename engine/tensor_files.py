"""Files of named tensors: safetensors, PyTorch's own (read without running what they hold), NumPy's, Mistral's layout.

Tensors are mapped, not read, until they are copied.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import read_json
from kvasir.engine.stored import Stored, halved_tensor

MAX_INDEX_BYTES = 256 << 20


class TensorFiles(Protocol):
    """Tensors by name."""

    @property
    def names(self) -> Sequence[str]:
        """In the order in which they are read fastest."""

    @property
    def total_bytes(self) -> int: ...

    def get(self, name: str) -> Tensor: ...

    def __contains__(self, name: str) -> bool: ...


class Safetensors:
    """One file or several. The format holds numbers alone, so nothing in it can run."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.total_bytes = sum(file.stat().st_size for file in files)
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                handle: Any = safe_open(file, framework="pt", device="cpu")
                keys = handle.offset_keys()
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is not a whole safetensors file: {error}", param="model") from error
            for key in keys:
                if key in self._where:
                    raise ConfigError(f"{file} holds {key}, which another of the model's files holds too")
                self._where[key] = (file, handle)
        self.names = list(self._where)

    def get(self, name: str) -> Tensor:
        file, handle = self._where[name]
        try:
            found: Tensor = handle.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{file}: {name} can't be read: {error}", param="model") from error
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._where


class TorchFiles:
    """`.bin`, `.pt` and `.pth`, with weights_only: a pickle that would build anything but tensors is refused."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.total_bytes = sum(file.stat().st_size for file in files)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ConfigError(f"{file} can't be read as a file of tensors: {reason}", param="model") from error
            self._tensors |= _tensors(file, found)
        self.names = list(self._tensors)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


class NumpyFiles:
    """vLLM's npcache: one .npy per tensor in `np/`, and their names. It is made of pytorch_model.bin where it isn't there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "np"
        listing = self._folder / "weight_names.json"
        if not listing.is_file():
            self._write(TorchFiles(files_of(folder, "pytorch_model.bin")), listing)
        names = json.loads(listing.read_bytes())
        if not isinstance(names, list) or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ConfigError(f"{listing} must hold a list of tensor names", param="model")
        self.names = names
        missing = [name for name in names if not (self._folder / name).is_file()]
        if missing:
            raise ConfigError(f"{self._folder} lacks {', '.join(missing[:8])}", param="model")
        self.total_bytes = sum((self._folder / name).stat().st_size for name in names)

    def get(self, name: str) -> Tensor:
        file = self._folder / name
        try:
            found = np.load(file, mmap_mode="c", allow_pickle=False)
            return torch.from_numpy(found)
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise ConfigError(f"{file} can't be read as an array: {error}", param="model") from error

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def _write(self, source: TorchFiles, listing: Path) -> None:
        self._folder.mkdir(exist_ok=True)
        for name in source.names:
            tensor = source.get(name)
            wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
            with (self._folder / name).open("wb") as file:
                np.save(file, wide.numpy(), allow_pickle=False)
        listing.write_text(json.dumps(list(source.names)))  # last: without it the cache is made again


RENAMED = {
    "tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    "norm.": "model.norm.",
    "layers.": "model.layers.",
    ".attention.wq.": ".self_attn.q_proj.",
    ".attention.wk.": ".self_attn.k_proj.",
    ".attention.wv.": ".self_attn.v_proj.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".feed_forward.experts.": ".block_sparse_moe.experts.",
    ".feed_forward.gate.": ".block_sparse_moe.gate.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
"""Fragment of Mistral's own tensor names -> Hugging Face's; those without a dot in front stand at the beginning."""


class ConsolidatedFiles:
    """Mistral's own layout, under Hugging Face's names. `stored`: rows of q and k in the order that pairs halves."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("consolidated*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} holds no consolidated*.safetensors", param="load_format")
        self._files = Safetensors(files)
        params = read_json(folder / "params.json")
        self._head_dim = int(params.get("head_dim") or params["dim"] // params["n_heads"])
        self._original = {self._renamed(name): name for name in self._files.names if not _sees(name)}
        self.names, self.total_bytes = list(self._original), self._files.total_bytes

    def get(self, name: str) -> Tensor:
        return self._files.get(self._original[name])

    def stored(self, name: str, stored: Stored) -> Stored:
        """What `get` gave, dequantised, as Hugging Face's model has it."""
        paired = name.endswith((".q_proj.weight", ".k_proj.weight"))
        return halved_tensor(stored, self._head_dim) if paired else stored

    def __contains__(self, name: str) -> bool:
        return name in self._original

    def _renamed(self, name: str) -> str:
        for old, new in RENAMED.items():
            if old.startswith("."):
                name = name.replace(old, new)
            elif name.startswith(old):
                name = new + name.removeprefix(old)
        return name


def files_of(folder: Path, single: str) -> list[Path]:
    """`single`, or the files that its index lists; an index can't lead out of the folder."""
    one, index = folder / single, folder / f"{single}.index.json"
    if one.is_file():
        return [one]
    if not index.is_file():
        found = sorted(file for pattern in _patterns(single) for file in folder.glob(pattern))
        if not found:
            raise ConfigError(f"{folder} holds neither {single} nor {index.name}", param="model")
        return found
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ConfigError(f"{index} is larger than {MAX_INDEX_BYTES >> 20} MiB", param="model")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{index} has no weight_map", param="model")
    names = sorted(set(weights.values()))
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigError(f"{index} lists {outside[0]!r}, which is not a file beside it", param="model")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists", param="model")
    return [folder / name for name in names]


def _patterns(single: str) -> Iterable[str]:
    """Names that files have where there is no index."""
    return ("model*.safetensors",) if single.endswith(".safetensors") else ("*.bin", "*.pt", "*.pth")


def _tensors(file: Path, found: Any) -> dict[str, Tensor]:
    """Some files keep the tensors one level down."""
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or any(not isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{file} holds no dictionary of tensors", param="model")
    return found


def _sees(name: str) -> bool:
    """Part of a vision model."""
    return name.startswith(("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm."))
