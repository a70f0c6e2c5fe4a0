"""Content ids of whole prompts, by compiled code once that is there: a gateway hashes every prompt that it routes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from kvasir.engine.blocks import ContentId, content_ids, token_bytes
from kvasir.kernels.block_directory import Holders as Holders
from kvasir.kernels.block_directory import Stored as Stored
from kvasir.kernels.block_ids import BlockIds, load
from kvasir.kernels.group_costs import NOBODY as NOBODY
from kvasir.kernels.group_costs import Floats
from kvasir.kernels.group_costs import GroupCosts as GroupCosts


@functools.cache
def loading() -> Future[BlockIds | None]:
    """Begun with the first call, once per process, and mostly over at once. Nobody waits for a compiler."""
    future: Future[BlockIds | None] = Future()
    threading.Thread(target=lambda: future.set_result(load()), name="kvasir-block-ids", daemon=True).start()
    return future


def hashed(before: ContentId, tokens: bytes, block_size: int) -> bytes:
    """What `content_ids` gives, behind each other."""
    found = _compiled()
    return found.hash(before, tokens, block_size) if found else b"".join(content_ids(before, tokens, block_size))


def words(token_ids: Sequence[int]) -> bytes:
    """What `token_bytes` gives."""
    found = _compiled()
    return found.words(token_ids) if found and isinstance(token_ids, list) else token_bytes(token_ids)


def holders() -> Holders | None:
    """A directory's tables by compiled code, once that is there."""
    found = _compiled()
    return Holders(found.path) if found else None


def group_costs(saved: Floats, others: float, affinity: float, like: float) -> GroupCosts | None:
    """What a request costs at each group by compiled code, once that is there."""
    found = _compiled()
    return GroupCosts(found.path, saved, others, affinity, like) if found else None


def _compiled() -> BlockIds | None:
    future = loading()
    return future.result() if future.done() else None
