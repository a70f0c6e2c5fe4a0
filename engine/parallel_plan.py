"""What each layout of ranks would hold, take and exchange, computed from the model's facts and a device's published limits.

Step times are bounds: the larger of bytes over bandwidth and operations over rate, plus exchanges; what is measured on
real devices lies above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import Room, layout
from kvasir.engine.memory import activation_bytes, resolve_cache_dtype
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.share import Share, share_of, stages
from kvasir.engine.spec import Spec
from kvasir.engine.weights import weight_bytes

GB = 10**9
ROWS = 8192
"""Token budget of a step on a GPU."""


@dataclass(frozen=True)
class Device:
    """A GPU's published limits; `link` is what one sends to its neighbours, one way."""

    memory: int
    bandwidth: float
    """Bytes per second."""
    rate: float
    """bfloat16 operations per second, dense."""
    link: float
    """Bytes per second."""
    latency: float = 10e-6
    """Seconds that an exchange takes whatever its size."""


DEVICES = {
    "A100-40GB": Device(40 * GB, 1.555e12, 312e12, 300e9),
    "A100-80GB": Device(80 * GB, 2.039e12, 312e12, 300e9),
    "H100-80GB": Device(80 * GB, 3.35e12, 989e12, 450e9),
    "H200-141GB": Device(141 * GB, 4.8e12, 989e12, 450e9),
    "B200-180GB": Device(180 * GB, 8.0e12, 2250e12, 900e9),
    "MI300X-192GB": Device(192 * GB, 5.3e12, 1307e12, 448e9),
    "L40S-48GB": Device(48 * GB, 0.864e12, 362e12, 32e9, 20e-6),
    "L4-24GB": Device(24 * GB, 0.3e12, 121e12, 32e9, 20e-6),
    "RTX4090-24GB": Device(24 * GB, 1.008e12, 165e12, 32e9, 20e-6),
}
"""Makers' data sheets."""


@dataclass(frozen=True)
class Plan:
    """One layout. Bytes are those of the rank that holds most."""

    tp: int
    pp: int
    dp: int
    weights: int
    kv_per_token: float
    context: int
    """Longest sequence that fits alone, up to the model's own limit; 0: the weights don't fit."""
    sequences: int
    """Of the asked length, at once, in one copy of the model."""
    step_s: float
    """Until a stream of a full batch gets its next token."""
    tokens_s: float
    """Of all copies together, as many streams as asked for or as fit."""
    traffic: float
    """Bytes per token of the rank that sends most."""

    @property
    def fits(self) -> bool:
        return self.sequences > 0


def plans(
    config: EngineConfig, spec: Spec, dtype: torch.dtype, device: Device, gpus: int, *, streams: int, length: int
) -> list[Plan]:
    """Every layout of so many GPUs that this model can have, the best first: those that fit, by tokens per second, and
    of those that hardly differ the one with the shorter step."""
    found = [
        plan(config, spec, dtype, device, place, gpus // place.size, streams=streams, length=length)
        for place in _layouts(spec, gpus)
    ]
    return sorted(found, key=lambda p: (not p.fits, -round(p.tokens_s, -len(str(int(p.tokens_s))) + 2), p.step_s))


def plan(
    config: EngineConfig,
    spec: Spec,
    dtype: torch.dtype,
    device: Device,
    place: Place,
    dp: int,
    *,
    streams: int,
    length: int,
) -> Plan:
    """One layout."""
    held = [_share(config, spec, place, stage) for stage in range(place.pp)]
    sizes = [_weights(share, dtype) for share in held]
    shape = layout(spec, length, stages(spec, place.pp, config.pipeline_layer_partition))
    kept = resolve_cache_dtype(config, dtype)
    block = max(KVCache.block_bytes(share.spec, config.block_size, kept, shape.height) for share in held)
    free = min(
        int(device.memory * config.gpu_memory_utilization)
        - size
        - activation_bytes(config, share.spec, dtype, torch.device("cuda"))
        for share, size in zip(held, sizes, strict=True)
    )
    room = Room(shape, config.block_size, ROWS)
    blocks = max(0, free) // block
    sequences = min(blocks // room.blocks(length), config.max_num_seqs) if blocks else 0
    batch = max(1, min(sequences or 1, -(-streams // dp)))
    kv = block * room.blocks(length) / length
    step, rate = _times(held, sizes, device, batch, kv * length)
    return Plan(
        place.tp,
        place.pp,
        dp,
        max(sizes),
        kv,
        room.longest(blocks, spec.max_len) if blocks else 0,
        sequences,
        step,
        rate * dp if sequences else 0.0,
        _traffic(held, dtype.itemsize),
    )


def find_device(name: str) -> Device:
    """ConfigError names those that are known."""
    found = next((device for known, device in DEVICES.items() if known.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"--gpu {name}: not known; known are {', '.join(DEVICES)}", param="gpu")
    return found


def _layouts(spec: Spec, gpus: int) -> Iterator[Place]:
    for tp, pp in product(range(1, gpus + 1), repeat=2):
        if gpus % (tp * pp) == 0 and tp <= spec.heads and pp <= len(spec.layers):
            yield Place(tp, pp)


def _share(config: EngineConfig, spec: Spec, place: Place, stage: int) -> Share:
    mesh = Mesh(Place(place.tp, place.pp, stage * place.tp + place.tp - 1))
    expert = config.enable_expert_parallel and spec.experts is not None
    return share_of(spec, mesh, expert_parallel=expert, partition=config.pipeline_layer_partition)


def _weights(share: Share, dtype: torch.dtype) -> int:
    return weight_bytes(share.full, dtype, torch.device("meta"), share)


def _times(
    held: Iterable[Share], sizes: Iterable[int], device: Device, batch: int, cached: float
) -> tuple[float, float]:
    """(seconds of a step of `batch` streams, tokens per second); stages work on parts of the batch at the same time."""
    shares = list(held)
    place = shares[0].mesh.place
    part = -(-batch // place.pp)
    seconds = [_stage(share, size, device, part, cached) for share, size in zip(shares, sizes, strict=True)]
    hand_over = (place.pp - 1) * (device.latency + part * shares[0].full.hidden * 2 / device.link)
    return max(sum(seconds), place.pp * max(seconds)) + hand_over, part / max(seconds)


def _stage(share: Share, size: int, device: Device, rows: int, cached: float) -> float:
    spec, facts = share.full, share.full.experts
    read = float(size)
    active = float(size)
    if facts:
        mixtures = sum(spec.layers[number].experts for number in share.layers)
        expert = 3 * spec.hidden * facts.ffn * 2 / share.mesh.place.tp
        idle = (1 - facts.per_token / facts.count) ** rows
        read -= mixtures * facts.count * idle * expert
        active -= mixtures * (facts.count - facts.per_token) * expert
    compute = rows * active / device.rate  # two operations per weight of two bytes
    moved = (read + rows * cached) / device.bandwidth
    tp = share.mesh.place.tp
    exchange = 0.0
    if tp > 1:
        each = device.latency + 2 * (tp - 1) / tp * rows * spec.hidden * 2 / device.link
        exchange = 2 * len(share.layers) * each
    return max(compute, moved) + exchange


def _traffic(held: Sequence[Share], itemsize: int) -> float:
    """Of the rank that sends most: by ring sums 2 (n - 1) / n of a row, twice per layer and once for the embedding; a row
    per stage border; and its part of the logits to the rank that samples."""
    tp, full = held[0].mesh.place.tp, held[0].full
    row = full.hidden * itemsize

    def sent(share: Share) -> float:
        sums = (
            2 * len(share.layers) + share.first if full.placement[:8] != "parallel" else len(share.layers) + share.first
        )
        logits = full.vocab / tp * torch.float32.itemsize if share.last and tp > 1 and full.lm_head else 0
        return sums * 2 * (tp - 1) / tp * row + (not share.last) * row + logits

    return max(map(sent, held))
