"""Filling a Decoder from safetensors files, one tensor at a time, straight into its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.pooling import HEAD
from kvasir.engine.spec import Spec
from kvasir.kernels.linear import reorders

NOT_WEIGHTS = r"rotary_emb\.inv_freq$"
"""Buffers that old checkpoints carry along: computed, not learned."""


def load_decoder(
    folder: Path,
    spec: Spec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
    head: dict[str, Tensor] | None = None,
) -> Decoder:
    """The model in `folder`, ready to run. ConfigError names tensors that are missing, left over or misshapen.
    `head`, where it is given, takes what stands behind the decoder of a classifier (`pooling.HEAD`).

    Files are memory-mapped and each tensor is copied to its place at once, so the peak is one tensor above the weights.
    """
    decoder = Decoder(spec, dtype, device).eval()
    places = dict(decoder.places())
    files = weight_files(folder)
    extra: list[str] = []
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for name, tensor in chain.from_iterable(map(_tensors, files)):
            if head is not None and (behind := HEAD.search(name)):
                head[behind[1]] = tensor.clone()
                continue
            for part, piece in spec.split(name, tensor, spec) if spec.split else ((name, tensor),):
                _fill(places, canonical(part, spec), name, piece, spec, extra)
            bar.update(tensor.nbytes)
        bar.update(total - bar.n)  # the files' headers
    _complain(folder, "lacks", list(places))
    _complain(folder, "has, but the model doesn't use,", extra)
    decoder.pack()
    return decoder


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ConfigError(f"{folder} holds neither {single.name} nor {index.name}; other weight files aren't read")
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists")
    return files


def canonical(name: str, spec: Spec) -> str:
    """A checkpoint's tensor name in ours: without its prefix, all fragments replaced in one pass, the longest first.

    One by one they would meet each other's results (`mlp.gate` is a router in some models, `gate_proj` becomes `gate`).
    """
    name = name.removeprefix(next((prefix for prefix in spec.prefixes if name.startswith(prefix)), ""))
    fragments = "|".join(re.escape(f) for f in sorted(spec.names, key=len, reverse=True))
    return re.sub(fragments, lambda match: spec.names[match[0]], name) if fragments else name


def weight_bytes(spec: Spec, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that the loaded model takes, known before anything is loaded."""
    decoder = Decoder(spec, dtype, torch.device("meta"))
    tied_copy = decoder.embed.nbytes if spec.tied and spec.lm_head and reorders(dtype, device) else 0
    return sum(p.nbytes for p in decoder.parameters()) + tied_copy


def random_decoder(
    spec: Spec, dtype: torch.dtype, device: torch.device, seed: int = 0, *, pack: bool = True
) -> Decoder:
    """A model of this shape with random weights, for benchmarks; without `pack` its `places` can still be read."""
    decoder = Decoder(spec, dtype, device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    if pack:
        decoder.pack()
    return decoder


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - no mapping, it has no __iter__
                yield name, handle.get_tensor(name)
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error


def _fill(places: dict[str, Tensor], name: str, original: str, tensor: Tensor, spec: Spec, extra: list[str]) -> None:
    if name not in places:
        ignored = any(re.search(pattern, original) for pattern in (NOT_WEIGHTS, *spec.ignored))
        if not ignored and not (name == "head.weight" and (spec.tied or not spec.lm_head)):
            extra.append(original)
        return
    place = places.pop(name)
    if place.shape != tensor.shape:
        raise ConfigError(f"{original} has shape {list(tensor.shape)}, config.json says {list(place.shape)}")
    place.copy_(tensor)


def _complain(folder: Path, verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ConfigError(f"{folder} {verb} {', '.join(sorted(names)[:8])}{more}")
