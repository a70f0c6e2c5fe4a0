"""/v1/groups: the groups that this gateway knows, and what each is for; POST gives one another role, while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, get_args

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvasir.cluster.described import described
from kvasir.cluster.desk import Desk
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.http_front import read_json
from kvasir.engine.config import Role
from kvasir.engine.errors import ClientError, ModelNotFoundError, UnavailableError

SetRole = Callable[[str, str, Role], Awaitable[bool]]
"""(model, name of a group, its new role) -> whether it was found. The group tells all gateways itself."""
ROLES = get_args(Role)


async def no_coordinators(model: str, name: str, role: Role) -> bool:
    """Of a gateway that reaches none."""
    return False


@described(enum=[*ROLES])
def check_role(name: str, value: Any) -> None:
    """ClientError unless it is a role."""
    if value not in ROLES:
        raise ClientError(f"{name} must be one of {', '.join(ROLES)}, got {value!r:.60}", param=name)


class Groups:
    """Endpoints."""

    def __init__(self, desk: Desk, set_role: SetRole, max_body_bytes: int) -> None:
        self._desk, self._set_role, self._max_body_bytes = desk, set_role, max_body_bytes

    async def show(self, request: Request) -> Response:
        found = [_shown(model.name, client) for model in self._desk.models for client in self._clients(model.name)]
        return _json({"object": "list", "data": found})

    async def change(self, request: Request) -> Response:
        """{"role": "prefill"}: no stream ends by it."""
        role = _role(await read_json(request.scope, request.receive, self._max_body_bytes))
        name: str = request.path_params["name"]
        for model in self._desk.models:
            for client in self._clients(model.name):
                if client.name == name:
                    if not await self._set_role(model.name, name, role):
                        raise UnavailableError(f"group {name} doesn't answer; its role is as it was", retry_after_s=1.0)
                    return _json({**_shown(model.name, client), "role": role})
        raise ModelNotFoundError(f"there is no group {name!r}; GET /v1/groups lists them", param="name")

    def routes(self) -> list[Route]:
        return [
            Route("/v1/groups", self.show, methods=["GET"]),
            Route("/v1/groups/{name}", self.change, methods=["POST"]),
        ]

    def _clients(self, model: str) -> list[GroupClient]:
        return self._desk.directory.clients(model)


def _shown(model: str, client: GroupClient) -> dict[str, Any]:
    stats = client.stats
    state = "dead" if not client.alive else "draining" if client.draining else "alive"
    load = {"running": stats.running, "waiting": stats.waiting} if stats is not None else {}
    return {"object": "group", "id": client.name, "model": model, "role": client.member.role, "state": state, **load}


def _role(told: dict[str, Any]) -> Role:
    if set(told) != {"role"}:
        raise ClientError('the body must be {"role": ...}', param="role")
    check_role("role", told["role"])
    role: Role = told["role"]
    return role


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
