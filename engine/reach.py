"""Reach: whether every two ranks on different nodes can connect, tried before NCCL and gloo do, whose own errors name neither
rank nor node."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from kvasir.engine.mesh import Place, reach_store

REACH_S = 10.0
"""So long a connection may take: three of its first packets may be lost."""
LOOK_S = 0.02
ADVICE = (
    "Ranks listen on ports that the system chooses: a firewall between their nodes has to let them through. `kvasir doctor"
    " --cluster` tries every link"
)


class UnreachableError(RuntimeError):
    """Names every link that is broken; the message is a block of text for its reader."""


def meeting_place(host: str, port: int, size: int, timeout_s: float) -> Any:
    """Rank 0's store (`mesh.host_store`) from another rank. UnreachableError where it isn't reached."""
    try:
        store = reach_store(host, port, size, min(timeout_s, REACH_S))
    except RuntimeError as error:
        text = f"it can't reach rank 0 on {host} by port {port}, though it has by the one where it said hello"
        raise UnreachableError(f"{text}\n{ADVICE}") from error
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def check_reach(
    store: Any, place: Place, host: str, timeout_s: float, *, going: Callable[[], None] = lambda: None
) -> None:
    """All ranks call it at once; those of one node alone have nothing to try. UnreachableError on all of them where one can't
    connect to another. `going` raises when nobody needs to wait any longer."""
    if place.local_ranks == place.size:
        return
    with socket.create_server((host, 0), backlog=place.size) as listener:
        own = f"{host}:{listener.getsockname()[1]}"
        at = _told(store, "reach", place, own, timeout_s, going)
        broken = _broken(place.rank, host, at[: place.rank])
        answers = _told(store, "reached", place, json.dumps(broken), timeout_s + REACH_S, going)
    if lines := [line for answer in answers for line in json.loads(answer)]:
        raise UnreachableError("\n".join([*lines, ADVICE]))


def _broken(own: int, host: str, lower: Sequence[str]) -> list[str]:
    """Which of the ranks before this one don't let it in, and how. Whether they accept doesn't matter: the system answers."""
    others: Mapping[int, Sequence[str]] = {rank: where.rpartition(":")[::2] for rank, where in enumerate(lower)}
    tried = {rank: (there, int(port)) for rank, (there, port) in others.items() if there != host}
    if not tried:
        return []
    with ThreadPoolExecutor(len(tried)) as pool:
        found = zip(tried.items(), pool.map(refusal, tried.values()), strict=True)
        return [
            f"rank {own} on {host} can't reach rank {rank} on {there}: {why}"
            for (rank, (there, _)), why in found
            if why
        ]


def refusal(address: tuple[str, int]) -> str | None:
    """Why there is no connection; None: there is."""
    try:
        socket.create_connection(address, REACH_S).close()
    except TimeoutError:
        return f"no answer within {REACH_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _told(store: Any, what: str, place: Place, said: str, timeout_s: float, going: Callable[[], None]) -> Sequence[str]:
    """What every rank says."""
    keys = [f"{what} {rank}" for rank in range(place.size)]
    store.set(keys[place.rank], said)
    end = time.monotonic() + timeout_s
    while not store.check(keys):
        going()
        if time.monotonic() > end:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            raise UnreachableError(
                f"rank {missing} of {place.size} said nothing for {timeout_s:g} s while links were tried"
            )
        time.sleep(LOOK_S)
    return [store.get(key).decode() for key in keys]
