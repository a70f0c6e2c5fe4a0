"""From an EngineConfig to a rank's part in exchanging blocks, and what must be equal in both groups for that."""

from __future__ import annotations

from kvasir.engine.blocks import salted
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.exchange import Exchange
from kvasir.engine.open_tiers import FORMAT, own_version
from kvasir.engine.share import Share
from kvasir.engine.tiers import Tiers


def open_exchange(
    config: EngineConfig, version: bytes, share: Share, cache: KVCache, tiers: Tiers | None
) -> Exchange | None:
    """None: --kv-transfer off, or blocks outlive no request."""
    if config.kv_transfer == "off" or not (config.enable_prefix_caching and share.full.causal):
        return None
    read_below = tiers.read if tiers is not None else lambda content, into: False
    return Exchange(config, share, cache, mark(version, cache), read_below)


def mark(version: bytes, cache: KVCache) -> bytes:
    """16 bytes for everything that keys and values depend on besides tokens, and how they lie: the model's version, the
    cache's type, our own version. Not the ranks, nor the block size: those are cut anew."""
    return salted(version, repr((FORMAT, own_version(), str(cache.dtype), cache.arena.device.type)))
