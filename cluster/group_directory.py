"""Where the groups of a gateway's models are: `GroupDirectory` finds the `GroupClient` that takes a `Request`.

All of it belongs to one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from kvasir.cluster.directory import BlockDirectory
from kvasir.cluster.group_client import GroupClient, Placement
from kvasir.cluster.member import Member
from kvasir.cluster.router import Policy, Router
from kvasir.cluster.wire import Endpoint
from kvasir.engine.errors import ModelNotFoundError, UnavailableError
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request

POLL_S = (0.2, 2.0)
"""How often the directory asks where a model's groups are: while it has none, and then; at once when one breaks."""

Fetch: TypeAlias = "Callable[[], Awaitable[Sequence[Endpoint]]]"


@dataclass
class _Model:
    """What the directory knows about one model."""

    name: str
    clients: dict[Endpoint, GroupClient]
    router: Router
    follower: asyncio.Task[None] | None = None
    wakeup: asyncio.Event | None = None
    why: str = "starting"

    @property
    def alive(self) -> list[GroupClient]:
        return [client for client in self.clients.values() if client.alive]


class GroupDirectory:
    """Model names -> the groups that serve them, each with its `GroupClient`.

    `models` maps every name that clients may use to the first of the model's names.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        *,
        max_stream_buffer: int = 4096,
        policy: Policy = "cost",
        max_ttft_s: float = 0.0,
    ) -> None:
        self._limit = max_stream_buffer
        self._names = dict(models)
        routers = {name: Router(policy, max_ttft_s=max_ttft_s, later=_soon) for name in models.values()}
        self._models = {name: _Model(name, {}, router) for name, router in routers.items()}
        self._leaving: dict[asyncio.Task[None], GroupClient] = {}

    @property
    def names(self) -> list[str]:
        """Every name under which a model is served, the models' first names first."""
        return list(dict.fromkeys([*self._models, *self._names]))

    def find(self, model: str) -> GroupClient:
        """The least loaded living group. Raises ModelNotFoundError or UnavailableError."""
        return min(self._alive(self._known(model)), key=lambda client: client.load)

    def place(self, model: str, request: Request, begun: Placement | None = None, session: str = "") -> Placement:
        """Choose a living group for `request` and reserve: one of the version with which it was `begun`. Requests of one
        session stay together while that is good for them. Raises ModelNotFoundError, UnavailableError or
        OverloadedError."""
        known = self._known(model)
        return self._placed(known, self._alive(known, begun.client if begun else None), request, session)

    def move(self, model: str, request: Request, source: Placement, session: str = "") -> Placement:
        """Another group of the same version for a request that runs at `source`: one that decodes if there is any. Raises
        as `place`."""
        known, old = self._known(model), source.client
        others = [client for client in self._alive(known, old) if client is not old]
        decoders = [client for client in others if client.member.role != "prefill"]
        if not decoders and not (old.draining and others):
            raise UnavailableError(f"no other group of {known.name!r} can take it over", retry_after_s=1.0)
        return self._placed(known, decoders or others, request, session, old.member)

    def _placed(
        self,
        known: _Model,
        clients: Sequence[GroupClient],
        request: Request,
        session: str,
        source: Member | None = None,
    ) -> Placement:
        members = [client.member for client in clients]
        route = known.router.place(request, members, time.monotonic(), session, source)
        client = next(client for client in clients if client.member is route.member)
        return Placement(client, replace(request, peers=route.peers) if route.peers else request, route)

    def clients(self, model: str | None = None) -> list[GroupClient]:
        """All groups of one model, or of all, the living and the dead."""
        models = self._models.values() if model is None else [self._known(model)]
        return [client for known in models for client in known.clients.values()]

    def blocks(self) -> dict[str, BlockDirectory]:
        """Model -> which of its groups hold which blocks."""
        return {name: known.router.directory for name, known in self._models.items()}

    def models(self) -> list[ModelInfo]:
        """One per model that has a living group."""
        infos = (known.alive[0].info for known in self._models.values() if known.alive)
        return [info for info in infos if info is not None]

    def missing(self) -> dict[str, str]:
        """Model -> why it can't be served now."""
        return {name: self._why(known) for name, known in self._models.items() if not known.alive}

    def update(self, model: str, endpoints: Sequence[Endpoint]) -> None:
        """The groups of `model` are now these: connect to the new ones, let go of those that are no more."""
        known = self._models[model]
        for endpoint in endpoints:
            if endpoint not in known.clients:
                known.clients[endpoint] = self._connect(known, endpoint)
        for endpoint in known.clients.keys() - set(endpoints):
            client = known.clients.pop(endpoint)
            leaving = asyncio.ensure_future(_leave(client, known.router))
            self._leaving[leaving] = client
            leaving.add_done_callback(self._leaving.pop)

    def follow(self, model: str, fetch: Fetch) -> None:
        """Keep `model` up to date by asking `fetch`; it may raise UnavailableError to say why there is no group."""
        known = self._models[model]
        known.wakeup = asyncio.Event()
        known.follower = asyncio.get_running_loop().create_task(self._follow(known, fetch, known.wakeup))

    async def close(self) -> None:
        """Close every stream, those to groups that are leaving too."""
        leaving = [*self._leaving.values()]
        tasks = [known.follower for known in self._models.values() if known.follower] + [*self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in [*self.clients(), *leaving]))

    def _alive(self, known: _Model, like: GroupClient | None = None) -> list[GroupClient]:
        """Those of the version of `like`. Those that fail are asked only where there are no others, those that drain never."""
        alive = [client for client in known.alive if not client.draining]
        if not alive:
            raise UnavailableError(f"model {known.name!r} isn't available: {self._why(known)}", retry_after_s=2.0)
        if like is not None and not (alive := [client for client in alive if _alike(client, like)]):
            why = f"all groups of {known.name!r} that are left have other weights or another configuration"
            raise UnavailableError(f"{why} than the one that began it", retry_after_s=2.0)
        return [client for client in alive if not client.failing] or alive

    def _known(self, model: str) -> _Model:
        if model not in self._names:
            why = f"model {model!r} isn't served here; there is: {', '.join(self.names)}"
            raise ModelNotFoundError(why, param="model")
        return self._models[self._names[model]]

    def _why(self, known: _Model) -> str:
        clients = known.clients.values()
        why = "it is draining" if any(client.draining for client in clients) else known.why
        return next((client.last_error for client in clients if client.last_error), why)

    def _connect(self, known: _Model, endpoint: Endpoint) -> GroupClient:
        wake = known.wakeup.set if known.wakeup else lambda: None
        member = known.router.join(endpoint.incarnation[:8], (endpoint.kv_address, endpoint.kv_secret))
        client = GroupClient(endpoint, max_stream_buffer=self._limit, on_break=wake, member=member)
        client.start()
        return client

    async def _follow(self, known: _Model, fetch: Fetch, wakeup: asyncio.Event) -> None:
        while True:
            wakeup.clear()
            try:
                self.update(known.name, await fetch())
            except UnavailableError as error:
                known.why = error.message
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(wakeup.wait(), POLL_S[bool(known.alive)])


def _soon(work: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(work)


def _alike(one: GroupClient, other: GroupClient) -> bool:
    """What one has begun the other would go on with in the same way."""
    return one.member.version == other.member.version


async def _leave(client: GroupClient, router: Router) -> None:
    """It gets no more requests; what runs there moves, or finishes."""
    try:
        await client.finish()
    finally:
        router.leave(client.member)
