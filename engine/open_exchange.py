"""From an EngineConfig to a rank's part in exchanging blocks, and what must be equal in both groups for that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kvasir.engine.blocks import salted
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.exchange import Exchange
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.open_tiers import FORMAT, own_version, weight_files
from kvasir.engine.share import Share
from kvasir.engine.tiers import Tiers

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Of all weights together: where so many places are equal, and all names and sizes, weights count as the same."""


def open_exchange(
    config: EngineConfig, files: ModelFiles, share: Share, cache: KVCache, tiers: Tiers | None
) -> Exchange | None:
    """None: --kv-transfer off, or blocks outlive no request."""
    if config.kv_transfer == "off" or not (config.enable_prefix_caching and share.full.causal):
        return None
    read_below = tiers.read if tiers is not None else lambda content, into: False
    return Exchange(config, share, cache, mark(config, files, cache), read_below)


def mark(config: EngineConfig, files: ModelFiles, cache: KVCache) -> bytes:
    """16 bytes for everything that keys and values depend on besides tokens, and how they lie: weights, configuration, type,
    our own version. Not the ranks, nor the block size: those are cut anew."""
    seed = config.seed if config.load_format == "dummy" else None
    weights = _samples(weight_files(files.path)) if seed is None else []
    parts = (FORMAT, own_version(), weights, config.load_format, seed, str(cache.dtype), cache.arena.device.type)
    return salted(repr(parts), json.dumps(files.config, sort_keys=True, default=repr))


def _samples(paths: Sequence[Path]) -> list[tuple[str, int, str]]:
    """(name, size, hash of places all over it) of each file: times of files differ between machines."""
    found = []
    for path in paths:
        count = max(8, SAMPLES // len(paths))
        hash_ = hashlib.blake2b(digest_size=16)
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(count):
                file.seek(max(0, size - SAMPLE_BYTES) * number // (count - 1))
                hash_.update(file.read(SAMPLE_BYTES))
        found.append((path.name, size, hash_.hexdigest()))
    return found
