"""What each layout of ranks would hold, take and exchange, computed from the model's facts and a device's limits.

By a GPU's published limits step times are bounds: the larger of bytes over bandwidth and operations over rate, plus exchanges;
what is measured on real devices lies above. By what was measured of a CPU (`cpu_device`) they are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.layout import Room, layout
from kvasir.engine.memory import activation_bytes, resolve_cache_dtype, token_budget
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.planning import piece
from kvasir.engine.share import Share, share_of, stages
from kvasir.engine.spec import Layer, Spec
from kvasir.engine.weights import weight_bytes

GB = 10**9
WIRE, WIRE_LATENCY = 50e9, 25e-6
"""Between GPUs of two nodes: bytes per second of a 400 Gbit/s card, one way, and seconds that an exchange takes anyway."""
Sizes = dict[tuple[int, bool, Layer], int]
"""(tensor-parallel ranks, whether experts are dealt out whole, kind of layer) -> bytes of its weights."""


@dataclass(frozen=True)
class Device:
    """A GPU's published limits, or what a rank on a CPU was measured to do; `link` is what one sends to its neighbours, one
    way."""

    memory: int
    bandwidth: float
    """Bytes per second."""
    rate: float
    """bfloat16 operations per second, dense."""
    link: float
    """Bytes per second."""
    latency: float = 10e-6
    """Seconds that an exchange takes whatever its size."""
    message: float | None = None
    """The same of what one stage hands to the next; None: the same."""
    message_link: float | None = None
    """Bytes per second of that; None: `link`."""
    node: int = 8
    """So many are on one node."""
    layer: float = 0.0
    """Seconds that a layer takes besides its products and attention, whatever its size."""
    row: float = 0.0
    """The same for each row."""
    step: float = 0.0
    """The same for each step: Python, sampling."""
    attention: float | None = None
    """Operations per second of attention over prompts; None: as of products."""
    products: Sequence[tuple[int, float]] = ()
    """(rows, bytes per second of weights by which so many are multiplied), measured; none: by bandwidth and rate."""
    kind: str = "cuda"
    """torch's name of the type of device."""
    ranks: int = 1
    """So many were at work at once when it was measured."""
    alone: Device | None = None
    """What one of them does while the others wait: they share the memory's bandwidth. None: the same."""

    def placed(self, place: Place) -> Device:
        """The same where ranks of this layout that exchange something are on different nodes. Copies are dealt out so that as
        few as possible are; ranks of a stage are neighbours."""
        if self.kind == "cpu":
            return self
        slow, late = min(self.link, WIRE), max(self.latency, WIRE_LATENCY)
        found = self
        if place.tp > self.node or self.node % place.tp:
            found = replace(found, link=slow, latency=late)
        return replace(found, message=late, message_link=slow) if place.size > self.node else found

    def product(self, read: float, active: float, rows: float) -> float:
        """Seconds for `rows` rows times `read` bytes of weights, of which each row meets `active`."""
        if not self.products:  # two operations per weight of two bytes
            return max(read / self.bandwidth, rows * active / self.rate)
        rows = rows * active / read if read else 0  # of those that meet a weight
        known = [(float(count), 1 / speed) for count, speed in self.products]
        lower = next((at for at in reversed(known) if at[0] <= rows), known[0])
        upper = next((at for at in known if at[0] >= rows), known[-1])
        if rows > upper[0]:
            return read * upper[1] * rows / upper[0]
        share = (rows - lower[0]) / (upper[0] - lower[0]) if upper[0] > lower[0] else 0.0
        return read * (lower[1] + max(0.0, share) * (upper[1] - lower[1]))


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
    whole_experts: bool
    """Experts are dealt out (--enable-expert-parallel), not a slice of each."""
    weights: int
    kv_per_token: float
    context: int
    """Longest sequence that fits alone, up to the model's own limit; 0: the weights don't fit."""
    sequences: int
    """Of the asked length, at once, in one copy of the model."""
    step_s: float
    """Until a stream of a full batch gets its next token."""
    prompt_s: float
    """Until a prompt of the asked length, alone in its copy of the model, has its first token."""
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
    of those that hardly differ the one with the shorter step. Experts are dealt out whole and in slices, unless whole ones are
    asked for. ConfigError when there is none."""
    found: list[Plan] = []
    refused: ConfigError | None = None
    known: Sizes = {}
    for place in _layouts(spec, gpus):
        dp = gpus // place.size
        for one in _dealings(config, spec, place):
            try:
                found.append(plan(one, spec, dtype, device, place, dp, streams=streams, length=length, known=known))
            except ConfigError as error:  # so many ranks don't go with whole experts or --pipeline-layer-partition
                refused = error
    if not found and refused:
        raise refused
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
    known: Sizes | None = None,
) -> Plan:
    """One layout; `known` grows by what is found out of layers."""
    device = device.placed(place)
    held = [_share(config, spec, place, stage) for stage in range(place.pp)]
    known = {} if known is None else known
    sizes = [_weights(share, dtype, known) for share in held]
    shape = layout(spec, length, stages(spec, place.pp, config.pipeline_layer_partition))
    kept = resolve_cache_dtype(config, dtype)
    block = max(KVCache.block_bytes(share.spec, config.block_size, kept, shape.height) for share in held)
    kind = torch.device(device.kind)
    free = min(
        int(device.memory * config.gpu_memory_utilization) - size - activation_bytes(config, share.spec, dtype, kind)
        for share, size in zip(held, sizes, strict=True)
    )
    room = Room(shape, config.block_size, token_budget(config, spec, kind))
    blocks = max(0, free) // block
    sequences = min(blocks // room.blocks(length), config.max_num_seqs) if blocks else 0
    batch = max(1, min(sequences or 1, -(-streams // dp)))
    kv = block * room.blocks(length) / length
    step, rate = _times(held, sizes, device, batch, kv * length, dp)
    prompt = _prompt(held, sizes, device, length, kv, room.budget, dp)
    return Plan(
        place.tp,
        place.pp,
        dp,
        held[0].expert_parallel,
        max(sizes),
        kv,
        room.longest(blocks, spec.max_len) if blocks else 0,
        sequences,
        step,
        prompt,
        rate * dp if sequences else 0.0,
        _traffic(held, dtype.itemsize),
    )


def find_device(name: str) -> Device:
    """ConfigError names those that are known."""
    found = next((device for known, device in DEVICES.items() if known.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"--gpu {name}: not known; known are {', '.join(DEVICES)} and cpu", param="gpu")
    return found


def _layouts(spec: Spec, gpus: int) -> Iterator[Place]:
    for tp, pp in product(range(1, gpus + 1), repeat=2):
        if gpus % (tp * pp) == 0 and tp <= spec.heads and pp <= len(spec.layers):
            yield Place(tp, pp)


def _dealings(config: EngineConfig, spec: Spec, place: Place) -> Sequence[EngineConfig]:
    if spec.experts is None or place.tp == 1 or config.enable_expert_parallel:
        return (config,)
    return config, replace(config, enable_expert_parallel=True)


def _share(config: EngineConfig, spec: Spec, place: Place, stage: int) -> Share:
    mesh = Mesh(Place(place.tp, place.pp, stage * place.tp + place.tp - 1))
    expert = config.enable_expert_parallel and (place.tp > 1 or spec.experts is None)  # which is refused
    return share_of(spec, mesh, expert_parallel=expert, partition=config.pipeline_layer_partition)


def _weights(share: Share, dtype: torch.dtype, known: Sizes) -> int:
    """Layers of a kind are made once: hundreds of experts take a second each time."""

    def size(layers: range) -> int:
        return weight_bytes(share.full, dtype, torch.device("meta"), replace(share, layers=layers))

    outside = total = size(share.layers[:0])
    for number in share.layers:
        kind = share.mesh.place.tp, share.expert_parallel, share.full.layers[number]
        if kind not in known:
            known[kind] = size(range(number, number + 1)) - outside
        total += known[kind]
    return total


def _times(
    held: Sequence[Share], sizes: Sequence[int], device: Device, batch: int, cached: float, dp: int
) -> tuple[float, float]:
    """(seconds of a step of `batch` streams, tokens per second); stages work on parts of the batch at the same time, as many
    of them as there are parts."""
    place = held[0].mesh.place
    parts = min(batch, place.pp)
    part = -(-batch // parts)
    seconds = _stages(held, sizes, device, parts * dp, part, part * cached, part)
    hand_over = (place.pp - 1) * _hand_over(held[0], device, part)
    step = max(sum(seconds), parts * max(seconds)) + hand_over
    return step, batch / step if parts < place.pp else part / max(seconds)


def _prompt(
    held: Sequence[Share], sizes: Sequence[int], device: Device, length: int, kv: float, budget: int, dp: int
) -> float:
    """Seconds of a prompt of so many tokens, `kv` bytes each: its pieces follow each other through the stages. While the first
    one goes through all of them, and the last one, one stage works; between, all do. One row's logits are wanted."""
    place = held[0].mesh.place
    count = -(-length // min(budget, length, piece(length, budget, place.pp)))
    rows, handed = length / count, 0.0
    if place.pp > 1:
        handed = max(_hand_over(share, device, rows) for share in held)

    def pieces(at_once: int) -> list[float]:
        scores = [rows * length / 2 * share.spec.heads * share.spec.head_dim * len(share.layers) for share in held]
        plain = _stages(held, sizes, device, at_once, rows, kv * length / 2, 0, [4 * pairs for pairs in scores])
        return [seconds + handed for seconds in plain]

    single, together = pieces(dp), pieces(place.pp * dp)
    return sum(single) + (count - 1) * max(together) + _logits(held[-1], device, 1)


def _stages(
    held: Sequence[Share],
    sizes: Sequence[int],
    device: Device,
    at_once: int,
    rows: float,
    cached: float,
    wanted: float,
    scores: Sequence[float] | None = None,
) -> list[float]:
    """`_stage` of each while so many stages, of all copies, work at once: between what ranks do alone and all together."""

    def seconds(device: Device) -> list[float]:
        speed = device.attention or device.rate
        return [
            _stage(share, size, device, rows, cached, wanted) + operations / speed
            for share, size, operations in zip(held, sizes, scores or [0.0] * len(held), strict=True)
        ]

    together = seconds(device)
    if device.alone is None or device.ranks == 1:
        return together
    crowd = (at_once * held[0].mesh.place.tp - 1) / (device.ranks - 1)
    return [
        least + min(1.0, crowd) * (most - least) for least, most in zip(seconds(device.alone), together, strict=True)
    ]


def _hand_over(share: Share, device: Device, rows: float) -> float:
    message = device.latency if device.message is None else device.message
    return message + rows * share.full.hidden * 2 / (device.message_link or device.link)


def _stage(share: Share, size: int, device: Device, rows: float, cached: float, wanted: float) -> float:
    """Of a step of so many rows, which read `cached` bytes of the cache and of which so many are `wanted` as logits."""
    spec, facts, tp = share.full, share.full.experts, share.mesh.place.tp
    head = _head(share)
    dense = float(size - _looked_up(share) - head)
    seconds = device.step + cached / device.bandwidth + len(share.layers) * (device.layer + rows * device.row / tp)
    if facts:
        mixtures = sum(spec.layers[number].experts for number in share.layers)
        expert = mixtures * 3 * spec.hidden * facts.ffn * 2 / tp
        idle = (1 - facts.per_token / facts.count) ** rows
        read, met, here = facts.count * (1 - idle), rows * facts.per_token, facts.count
        if share.expert_parallel:  # the others wait for the rank whose experts are asked for most
            here = len(share.experts) * tp
            read, met = min(float(here), _busiest(read, idle, tp)), _busiest(met, 1 - 1 / tp, tp)
        dense -= here * expert
        seconds += device.product(read * expert, met / rows * expert, rows)
    seconds += device.product(dense, dense, rows) + _logits(share, device, wanted)
    if tp > 1:
        row = 2 * (tp - 1) / tp * spec.hidden * 2
        seconds += _sums(share) * (device.latency + rows * row / device.link)
    return seconds


def _busiest(total: float, variance: float, ranks: int) -> float:
    """`total` things, each on one of the ranks by chance: about what all of them had if each had as many as the one with most."""
    mean = total / ranks
    return ranks * (mean + math.sqrt(2 * math.log(ranks) * mean * variance))


def _logits(share: Share, device: Device, wanted: float) -> float:
    """Of so many rows, until the rank that samples has them."""
    if not (share.last and wanted):
        return 0.0
    tp, head = share.mesh.place.tp, _head(share)
    part = share.full.vocab / tp * 2
    return device.product(head, head, wanted) + (tp > 1) * (device.latency + wanted * part / device.link)


def _head(share: Share) -> int:
    """Bytes of the output head that are here."""
    spec = share.full
    return len(share.vocab) * (spec.embed_dim or spec.hidden) * 2 if share.last and spec.lm_head else 0


def _looked_up(share: Share) -> int:
    """Bytes of an embedding that isn't the head: a row of it is read, not all."""
    spec = share.full
    apart = share.first and not (spec.tied and spec.lm_head and share.last)
    return len(share.vocab) * (spec.embed_dim or spec.hidden) * 2 if apart else 0


def _sums(share: Share) -> int:
    """Over the ranks of a stage in one step."""
    once = share.full.placement.startswith("parallel")
    return (1 if once else 2) * len(share.layers) + share.first


def _traffic(held: Sequence[Share], itemsize: int) -> float:
    """Of the rank that sends most."""
    return max(bytes_sent(share, itemsize) for share in held)


def bytes_sent(share: Share, itemsize: int) -> float:
    """For each row of a step: by ring sums 2 (n - 1) / n of a row, twice per layer and once for the embedding; a row per stage
    border; and the rank's part of the logits, if another one samples."""
    place, full = share.mesh.place, share.full
    row = full.hidden * itemsize
    logits = full.vocab / place.tp * itemsize if share.last and place.tp_rank and full.lm_head else 0
    return _sums(share) * 2 * (place.tp - 1) / place.tp * row + (not share.last) * row + logits
