"""Stats: what an engine says of its load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment's load, and totals since the start (tokens, unless named otherwise)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of blocks in use, 0 to 1."""
    queued_prefill_tokens: int = 0
    """Tokens that must be computed before every accepted request streams."""
    prefills: int = 0
    """Sequences that these tokens belong to: they share a step evenly."""
    decode_blocks: int = 0
    """Blocks that sequences hold."""
    free_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    """How many times."""
    ended: int = 0
    """Sequences that ended, however."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefill_rate: float = 0.0
    """Prompt tokens in a second, in those of the last steps that computed little else; 0: there was none."""
    steps: int = 0
    step_tokens: int = 0
    """Tokens that all steps computed."""
    host_bytes: int = 0
    """In rank 0's host tier now; the others hold their share of the same blocks."""
    host_stored: int = 0
    """Blocks since the start, here and below."""
    host_loaded: int = 0
    host_evicted: int = 0
    disk_bytes: int = 0
    disk_stored: int = 0
    disk_loaded: int = 0
    disk_evicted: int = 0
    disk_failed: int = 0
    """Could not be written, or were bad when they were read."""
    peer_loaded: int = 0
    """Came from other groups to rank 0, and were good."""
    peer_served: int = 0
    """Went from rank 0 to other groups."""
    peer_failed: int = 0
    """Were asked of other groups and didn't come, or were bad."""
    peer_bytes: int = 0
    """Came from other groups, to all ranks together."""
    fetch_floor_s: float = 0.0
    """What a fetch from a peer took lately before its first byte; 0: nothing was fetched yet."""
    fetch_bytes_per_s: float = 0.0
    """How fast the rest of it came, to all ranks together; 0: nothing was fetched yet."""
