"""Checkpoint: the tensors of a model under canonical names, one by one, whatever files they come from."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvasir.engine.dequantise import FP8
from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import is_gguf
from kvasir.engine.pooling import HEAD
from kvasir.engine.share import Cut
from kvasir.engine.spec import Spec
from kvasir.engine.stored import Mapped, Mxfp4, Stored, fp8_tensor, is_view
from kvasir.engine.tensor_files import ConsolidatedFiles, NumpyFiles, Safetensors, TensorFiles, TorchFiles, files_of

logger = logging.getLogger(__name__)
LoadFormat = Literal["auto", "safetensors", "pt", "npcache", "mistral", "gguf", "dummy"]
SCALES = ("_scale_inv", "_scale")
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.(input|output|k|v|q)_scale$")
"""What old checkpoints carry along and is computed, and scales of activations, which aren't quantised here."""


class Filler(Protocol):
    """One tensor of the model. Nothing is read before `copy_to`."""

    @property
    def name(self) -> str:
        """Canonical."""

    @property
    def original(self) -> str:
        """As the file says, for messages."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """In the file."""

    def copy_to(self, place: Tensor, cut: Cut | None = None) -> None:
        """Fill `place`, of this shape, or that of the cut, and of any dtype and device."""

    def fetch(self, cut: Cut | None = None) -> None:
        """Ask the system to read what `copy_to` will."""


class Checkpoint(Protocol):
    """Opening one reads its headers alone."""

    total_bytes: int
    dequantises: bool
    """Filling a place is more than a copy."""

    def tensors(self, spec: Spec) -> Iterator[Filler]:
        """Every tensor that the model may use; unknown ones by their own names."""

    def head(self) -> dict[str, Tensor]:
        """What stands behind the decoder of a classifier, by `pooler.HEAD`'s names."""


@dataclass(frozen=True)
class Part:
    """A tensor of the files, or one of those into which the family's `split` takes it apart."""

    name: str
    original: str
    stored: Stored
    view: Tensor
    """Of `stored.like`; or a copy, where `made` makes the same of the tensor itself."""
    nbytes: int
    made: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view.shape)

    def read(self, cut: Cut | None = None) -> Tensor:
        return _narrowed(self.made(), cut) if self.made is not None else self.stored.read(self._wanted(cut))

    def copy_to(self, place: Tensor, cut: Cut | None = None) -> None:
        place.copy_(self.read(cut))

    def fetch(self, cut: Cut | None = None) -> None:
        self.stored.fetch(self.stored.like if self.made is not None else self._wanted(cut))

    def _wanted(self, cut: Cut | None) -> Tensor:
        return _narrowed(self.view, cut)


def _narrowed(tensor: Tensor, cut: Cut | None) -> Tensor:
    return tensor if cut is None else tensor.narrow(cut.dim, cut.part.start, len(cut.part))


class NamedCheckpoint:
    """Tensors in Hugging Face's or the family's own naming."""

    dequantises = False  # what is quantised here is so few large tensors that each takes all threads

    def __init__(self, files: TensorFiles, ordered: Callable[[str, Stored], Stored] = lambda _, stored: stored) -> None:
        self.files, self.total_bytes, self._ordered = files, files.total_bytes, ordered

    def tensors(self, spec: Spec) -> Iterator[Filler]:
        for name in self.files.names:
            if NOT_WEIGHTS.search(name) or any(re.search(pattern, name) for pattern in spec.ignored):
                continue
            stored = self._stored(name)
            if stored is None:
                continue
            size = stored.nbytes
            for part in _parts(name.removesuffix("_blocks"), stored, spec):
                if part.name not in ("head.weight", "head.bias") or (spec.lm_head and not spec.tied):
                    yield replace(part, nbytes=size)
                elif part.name == "head.weight" and spec.lm_head:
                    self._note_own_head(name, part.read(), spec)
                size = 0

    def head(self) -> dict[str, Tensor]:
        found = ((HEAD.search(name), name) for name in self.files.names)
        return {match[1]: self.files.get(name).clone() for match, name in found if match}

    def _note_own_head(self, name: str, head: Tensor, spec: Spec) -> None:
        """Log a head that was trained apart (a merged adapter's, for instance) in spite of what config.json says."""
        embed = next((other for other in self.files.names if canonical(other, spec) == "embed.weight"), None)
        stored = self._stored(embed) if embed is not None else None
        if stored is not None and not torch.equal(stored.read(stored.like).to(head.dtype), head):
            overrides = "--hf-overrides '{\"tie_word_embeddings\": false}'"
            text = "%s isn't read: config.json ties it to %s, from which it differs. If it is meant, pass %s"
            logger.warning(text, name, embed, overrides)

    def _stored(self, name: str) -> Stored | None:
        """The tensor; None for the scales of another."""
        if any(name.endswith(s) and name.removesuffix(s) in self.files for s in SCALES):
            return None
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in self.files:
            return None
        tensor = self.files.get(name)
        if name.endswith("_blocks") and (scales := f"{name.removesuffix('_blocks')}_scales") in self.files:
            return Mxfp4(name, tensor, self.files.get(scales))
        scale = next((name + s for s in SCALES if name + s in self.files), None)
        if tensor.dtype in FP8:
            if scale is None:
                raise ConfigError(f"{name} is FP8, but the checkpoint lacks its scales ({name}_scale_inv)")
            return self._ordered(name, fp8_tensor(name, tensor, self.files.get(scale)))
        if scale is not None or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            scaled = f" with scales ({scale})" if scale else ""
            raise ConfigError(f"{name} is {kind}{scaled}: weights that are quantised so are not supported")
        return self._ordered(name, Mapped(tensor))


def _parts(name: str, stored: Stored, spec: Spec) -> Iterator[Part]:
    """What the model makes of one. Copies that `split` makes are made once, if one of them is wanted at all."""
    split = spec.split
    if split is None:
        yield Part(canonical(name, spec), name, stored, stored.like, 0)
        return
    copies = cache(lambda: [piece for _, piece in split(name, stored.read(stored.like), spec)])

    def copy(number: int) -> Callable[[], Tensor]:
        return lambda: copies()[number]

    for number, (part, view) in enumerate(split(name, stored.like, spec)):
        made = None if is_view(view, stored.like) else copy(number)
        yield Part(canonical(part, spec), name, stored, view, 0, made)


def open_checkpoint(path: Path, load_format: str = "auto") -> Checkpoint:
    """The weights at `path`, a folder or a GGUF file, in this format; auto: the first that is there."""
    if is_gguf(path):
        if load_format not in ("auto", "gguf"):
            raise ConfigError(f"{path} is a GGUF file, --load-format is {load_format}", param="load_format")
        from kvasir.engine.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if load_format == "gguf":
        raise ConfigError(f"--load-format gguf: {path} is no GGUF file; name the file itself", param="load_format")
    chosen = load_format if load_format != "auto" else _found_format(path)
    match chosen:
        case "safetensors":
            return NamedCheckpoint(Safetensors(files_of(path, "model.safetensors")))
        case "pt":
            return NamedCheckpoint(TorchFiles(files_of(path, "pytorch_model.bin")))
        case "npcache":
            return NamedCheckpoint(NumpyFiles(path))
        case "mistral":
            consolidated = ConsolidatedFiles(path)
            return NamedCheckpoint(consolidated, consolidated.stored)
    raise ConfigError(f"--load-format {load_format!r} is not known", param="load_format")


def canonical(name: str, spec: Spec) -> str:
    """A checkpoint's tensor name in ours: without its prefix, all fragments replaced in one pass, the longest first.

    One by one they would meet each other's results (`mlp.gate` is a router in some models, `gate_proj` becomes `gate`).
    """
    name = name.removeprefix(next((prefix for prefix in spec.prefixes if name.startswith(prefix)), ""))
    fragments = "|".join(re.escape(f) for f in sorted(spec.names, key=len, reverse=True))
    return re.sub(fragments, lambda match: spec.names[match[0]], name) if fragments else name


def _found_format(folder: Path) -> str:
    """Safetensors if there are any, else the consolidated layout, else PyTorch's own files."""
    if list(folder.glob("model*.safetensors*")):
        return "safetensors"
    if (folder / "params.json").is_file() and list(folder.glob("consolidated*.safetensors")):
        return "mistral"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        return "pt"
    has = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"{folder} holds no weights: neither model.safetensors (or model.safetensors.index.json), nor"
        f" consolidated.safetensors, nor pytorch_model.bin; it holds {has}",
        param="model",
    )
