"""Agreement: a stage's ranks take a faster way of exchanging tensors together, or none of them does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
OBSTACLES = (RuntimeError, AttributeError, ImportError, OSError)
"""What may stand in the way: of torch no peer access or no such operator, of the system no memory."""


def agreed(
    make: Callable[[], T], store: Any, rank: int, size: int, host: str, timeout_s: float
) -> tuple[T | None, str]:
    """(what all ranks can `make`, "") or (None, why not). Each tells its host, then whether it could, and reads what the
    others say."""
    hosts = told(store, "host", rank, size, host, timeout_s)
    if len(set(hosts)) > 1:
        return None, f"the ranks of a stage are on {len(set(hosts))} nodes"
    made, why = None, ""
    try:
        made = make()
    except OBSTACLES as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
    reasons = told(store, "why", rank, size, why, 2 * timeout_s)
    return (None, next(filter(None, reasons))) if any(reasons) else (made, "")


def told(store: Any, what: str, rank: int, size: int, said: str, timeout_s: float) -> list[str]:
    """What every rank says."""
    keys = [f"shared {what} {number}" for number in range(size)]
    store.set(keys[rank], said)
    store.wait(keys, timedelta(seconds=timeout_s))
    return [store.get(key).decode() for key in keys]
