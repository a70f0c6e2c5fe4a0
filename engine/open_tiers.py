"""From an EngineConfig to the tiers below a rank's cache, and what must be equal for blocks on a disk to be taken."""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvasir.engine.blocks import salted
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.disk import Disk
from kvasir.engine.disk_folder import MOST_COPIES, Claim, claim
from kvasir.engine.host import Host
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.share import Share
from kvasir.engine.tiers import Tiers

logger = logging.getLogger(__name__)

FORMAT = "1"
"""Changes when blocks of equal content get other bytes."""
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}


def open_tiers(config: EngineConfig, files: ModelFiles, share: Share, cache: KVCache) -> Tiers | None:
    """The tiers that the configuration asks for; all ranks call it at once. None: there are none, or no prefix caching."""
    if not (config.enable_prefix_caching and share.full.causal):
        why = "the model isn't causal" if config.enable_prefix_caching else "there is no prefix caching"
        if share.mesh.place.rank == 0 and (asked := _asked(config)):
            logger.warning("%s: no effect, no KV blocks outlive a request: %s", ", ".join(asked), why)
        return None
    host_bytes = int(config.kv_offloading_size * 2**30) // config.ranks
    host = None
    if host_bytes >= cache.bytes_per_block:
        host = Host(cache.bytes_per_block, host_bytes, pinned=cache.arena.is_cuda)
    elif config.kv_offloading_size:
        small = (
            "--kv-offloading-size %s: no KV blocks are kept in host memory: a rank's part is %d bytes, a block has %d"
        )
        logger.warning(small, config.kv_offloading_size, host_bytes, cache.bytes_per_block)
    disk = _open_disk(config, files, share, cache)
    return None if host is None and disk is None else Tiers(cache, host, disk)


def _asked(config: EngineConfig) -> list[str]:
    """The flags of tiers that somebody has set, other than to none or as `kvasir serve` does."""
    flags = {
        "--kv-offloading-size": config.kv_offloading_size,
        "--kv-disk-path": config.kv_disk_path not in (None, "auto"),
        "--kv-disk-size": config.kv_disk_size,
    }
    return [flag for flag, is_set in flags.items() if is_set]


def _open_disk(config: EngineConfig, files: ModelFiles, share: Share, cache: KVCache) -> Disk | None:
    """This rank's folder of rank 0's copy; when one rank can't have its own, none has one."""
    if config.kv_disk_path is None and config.kv_disk_size and share.mesh.place.rank == 0:
        logger.warning("--kv-disk-size %d: no effect without --kv-disk-path", config.kv_disk_size)
    if config.kv_disk_path is None or config.kv_disk_size == 0:
        return None
    place, mark = share.mesh.place, fingerprint(config, files, cache)
    own = _claimed(config.kv_disk_path, mark, 0, None) if place.rank == 0 else None
    (copy,) = share.mesh.least(own.copy if own is not None else MOST_COPIES)
    if place.rank and copy < MOST_COPIES:
        own = _claimed(config.kv_disk_path, mark, place.rank, copy)
    (all_have,) = share.mesh.least(own is not None)
    if own is None or not all_have:
        if own is not None:
            own.close()
        return None
    part = salted(mark, f"rank {place.rank} of {place.size}")
    return Disk(own, part, cache.bytes_per_block, config.kv_disk_size, place.local_ranks)


def disk_root(path: str) -> Path:
    """The folder of --kv-disk-path."""
    if path != "auto":
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvasir" / "kv"


def _claimed(path: str, mark: bytes, rank: int, copy: int | None) -> Claim | None:
    try:
        found = claim(disk_root(path), mark.hex(), rank, copy)
        why: object = "another process has their folder"
    except (OSError, RuntimeError) as error:  # pathlib's RuntimeError: there is no home
        found, why = None, error
    if found is None:
        logger.warning("--kv-disk-path %s: no KV blocks are kept on disk: %s", path, why)
    return found


def fingerprint(config: EngineConfig, files: ModelFiles, cache: KVCache) -> bytes:
    """16 bytes for everything that a block's bytes depend on besides its tokens: weights, configuration, type, shapes,
    ranks, our own version. Weights count as the same when names, sizes and times of their files are."""
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(files.path)]
    seed = config.seed if config.load_format == "dummy" else None
    parallel = (config.tensor_parallel_size, config.pipeline_parallel_size, config.pipeline_layer_partition)
    shapes = (cache.layout, cache.block_size, str(cache.dtype), cache.arena.device.type)
    parts = (FORMAT, own_version(), weights, config.load_format, seed, parallel, shapes)
    return salted(repr(parts), json.dumps(files.config, sort_keys=True, default=repr))


def weight_files(path: Path) -> list[Path]:
    """The files of a folder; of a GGUF file its parts."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    first = path.name.partition("-00001-of-")[0]
    return sorted(path.parent.glob(f"{first}*")) if first != path.name else [path]


def own_version() -> str:
    """Of Kvasir."""
    try:
        return version("kvasir")
    except PackageNotFoundError:  # run from a checkout that isn't installed
        return ""
