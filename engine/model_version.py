"""What must be equal in two groups for one to go on with what the other has begun."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kvasir.engine.blocks import salted
from kvasir.engine.config import EngineConfig
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.open_tiers import weight_files

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Of all weights together: where so many places are equal, and all names and sizes, weights count as the same."""


def model_version(config: EngineConfig, files: ModelFiles, *types: str) -> bytes:
    """16 bytes for everything that tokens depend on besides a request: weights, configuration with its overrides, types.
    Not the folder's name, nor how ranks share the work: copies on two machines are one version."""
    seed = config.seed if config.load_format == "dummy" else None
    weights = _samples(weight_files(files.path)) if seed is None else []
    parts = (weights, config.load_format, seed, types)
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
