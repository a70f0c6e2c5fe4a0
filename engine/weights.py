"""Filling a Decoder from a checkpoint, one tensor at a time, straight into its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kvasir.engine.checkpoint import Checkpoint, Filler, open_checkpoint
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.filling import Placed, fill_all, fill_each
from kvasir.engine.pooling import HEAD
from kvasir.engine.share import Share
from kvasir.engine.spec import Spec
from kvasir.kernels.huge_pages import Room
from kvasir.kernels.linear import reorders

Fill = Callable[[Iterable[Placed]], Iterator[Filler]]


def load_decoder(
    source: Path | Checkpoint,
    spec: Spec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
    share: Share | None = None,
) -> Decoder:
    """The model in `source`, or a rank's share of it, ready to run. ConfigError names tensors that are missing, left over
    or misshapen.

    Files are mapped, each tensor is copied to its place at once, and a matrix is packed as soon as it is whole, so that
    the peak is one tensor above the weights and the next matrix is put where the last one was.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    decoder = Decoder(spec, dtype, device, share).eval()
    where = str(source) if isinstance(source, Path) else "the checkpoint"
    fill = fill_all if checkpoint.dequantises else fill_each
    total = checkpoint.total_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        extra = _fill(decoder, checkpoint.tensors(spec), where, fill, lambda size: bar.update(min(size, total - bar.n)))
        bar.update(total - bar.n)  # headers, what a text model doesn't use, and other ranks' shares
    _complain(where, "has, but the model doesn't use,", extra)
    decoder.pack(invariant=decoder.mesh.invariant)
    return decoder


def weight_bytes(spec: Spec, dtype: torch.dtype, device: torch.device, share: Share | None = None) -> int:
    """Bytes that the loaded model, or a rank's share of it, takes, known before anything is loaded."""
    decoder = Decoder(spec, dtype, torch.device("meta"), share)
    size = sum(p.nbytes for p in decoder.parameters())
    if decoder.embed is not None and decoder.embed is decoder.head and decoder.share.first and reorders(dtype, device):
        size += decoder.embed.nbytes  # the packed head is a copy
    return size


def random_decoder(
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    pack: bool = True,
    share: Share | None = None,
) -> Decoder:
    """A model of this shape with random weights (--load-format dummy); without `pack` its `places` can still be read.
    Each rank draws its own: together they are no slices of one model."""
    decoder = Decoder(spec, dtype, device, share).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    if pack:
        decoder.pack(invariant=decoder.mesh.invariant)
    return decoder


def _fill(
    decoder: Decoder, fillers: Iterable[Filler], where: str, fill: Fill, note: Callable[[int], object]
) -> list[str]:
    """Fill every place, and `note` each filler's bytes; the names of tensors that have none on any rank."""
    places = dict(decoder.places())
    wholes = _wholes(decoder)
    waiting = {name: linear for linear, names in decoder.stacked() for name in names}
    left = {linear: len(names) for linear, names in decoder.stacked()}
    extra: list[str] = []
    room = Room()
    for filler in fill(_placed(fillers, places, wholes, decoder.share, extra)):
        note(filler.nbytes)
        linear = waiting.get(filler.name)
        if linear is not None:
            left[linear] -= 1
            if not left[linear]:
                linear.pack(invariant=decoder.mesh.invariant, room=room)
    _complain(where, "lacks", list(places))
    return extra


def _wholes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model, on whatever rank it is."""
    if decoder.share.mesh.place.size > 1:
        decoder = Decoder(decoder.spec, decoder.dtype, torch.device("meta"))
    return {name: tuple(place.shape) for name, place in decoder.places()}


def _placed(
    fillers: Iterable[Filler],
    places: dict[str, Tensor],
    wholes: dict[str, tuple[int, ...]],
    share: Share,
    extra: list[str],
) -> Iterator[Placed]:
    """Each with its place, which nobody else holds any longer when it is packed; names without one go to `extra`."""
    for filler in fillers:
        if filler.name not in wholes:
            if not HEAD.search(filler.original):
                extra.append(filler.original)
            continue
        shape = wholes.pop(filler.name)
        if shape != tuple(filler.shape):
            raise ConfigError(f"{filler.original} has shape {list(filler.shape)}, config.json says {list(shape)}")
        if filler.name in places:
            yield filler, places.pop(filler.name), share.cut(filler.name)


def _complain(where: str, verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ConfigError(f"{where} {verb} {', '.join(sorted(names)[:8])}{more}")
