"""What must be equal in two groups for one to go on with what the other has begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from mmap import mmap
from pathlib import Path

from kvasir.engine.blocks import salted
from kvasir.engine.config import EngineConfig
from kvasir.engine.gguf import GGUF, Mapped
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.open_tiers import weight_files

SAMPLE_BYTES = 1024
"""At the start, in the middle and at the end of each tensor: what trained it further has changed these, too."""
STRETCHES = 256
"""Of a file that doesn't tell where its tensors lie."""


def model_version(config: EngineConfig, files: ModelFiles, *types: str) -> bytes:
    """16 bytes for everything that tokens depend on besides a request: weights, configuration with its overrides, types.
    Not the folder's name, nor how ranks share the work: copies on two machines are one version."""
    seed = config.seed if config.load_format == "dummy" else None
    weights = _weights(files.path, files.gguf) if seed is None else []
    parts = (weights, config.load_format, seed, types)
    return salted(repr(parts), json.dumps(files.config, sort_keys=True, default=repr))


def _weights(path: Path, stored: GGUF | None) -> list[tuple[str, int] | str]:
    """Names and sizes of the files, and a hash of places all over them: times of files differ between machines."""
    hash_ = hashlib.blake2b(digest_size=16)
    for piece in _pieces(path, stored):
        hash_.update(piece)
    return [*((file.name, file.stat().st_size) for file in weight_files(path)), hash_.hexdigest()]


def _pieces(path: Path, stored: GGUF | None) -> Iterator[bytes]:
    """Headers, and samples of each tensor."""
    if stored is not None:
        for tensor in stored.tensors.values():
            yield repr((tensor.name, tensor.shape, tensor.type.name)).encode()
            yield from _samples(tensor.file.memory, tensor.start, tensor.start + tensor.nbytes)
        return
    for file in weight_files(path):
        if size := file.stat().st_size:
            whole = Mapped(file).memory
            first, tensors = _table(whole) if file.suffix == ".safetensors" else (0, [])
            yield whole[:first]
            for start, stop in tensors or pairwise(size * n // STRETCHES for n in range(STRETCHES + 1)):
                yield from _samples(whole, start, stop)


def _table(whole: mmap) -> tuple[int, list[tuple[int, int]]]:
    """(bytes of a safetensors header, first byte and byte behind the last of each tensor); (0, []) when it isn't one."""
    first = 8 + int.from_bytes(whole[:8], "little")
    try:
        header = json.loads(whole[8:first])
        spans = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
        return first, [(first + start, first + stop) for start, stop in spans]
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0, []  # who loads it says so


def _samples(whole: mmap, start: int, stop: int) -> Iterator[bytes]:
    for place in (start, (start + stop - SAMPLE_BYTES) // 2, stop - SAMPLE_BYTES):
        yield whole[max(start, place) : min(stop, max(start, place) + SAMPLE_BYTES)]
