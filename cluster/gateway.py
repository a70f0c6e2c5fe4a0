"""The gateway's two servers, without their sockets: the HTTP application and the gRPC server around one `Desk`."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvasir.cluster import metrics
from kvasir.cluster.all_metrics import OtherMetrics, merged, no_others
from kvasir.cluster.anthropic_api import anthropic_routes
from kvasir.cluster.auth import check_exposure, load_keys
from kvasir.cluster.batches_api import batches_routes
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.conversations_api import conversation_routes
from kvasir.cluster.decisions_api import Decisions
from kvasir.cluster.desk import Desk
from kvasir.cluster.docs_api import docs_routes
from kvasir.cluster.error_shapes import openai_error
from kvasir.cluster.files_api import files_routes
from kvasir.cluster.groups_api import Groups, SetRole, no_coordinators
from kvasir.cluster.grpc_api import create_grpc_server
from kvasir.cluster.health import Health
from kvasir.cluster.http_front import HANDLERS, Front
from kvasir.cluster.ollama_models import ollama_routes
from kvasir.cluster.openai_api import Completions, Detokenize, Models, Tokenize
from kvasir.cluster.origins import Origins
from kvasir.cluster.pooling_api import PoolingEndpoint
from kvasir.cluster.recordings import STREAM_ID
from kvasir.cluster.responses_api import responses_routes
from kvasir.cluster.shelf import Shelf
from kvasir.cluster.stored_chats import Chats, stored_chat_routes
from kvasir.cluster.stream_api import FindGateway, Streams, nowhere
from kvasir.cluster.system_one import SystemOne
from kvasir.engine.errors import UnavailableError

__all__ = ["close_app", "create_app", "create_grpc_server"]


def create_app(
    desk: Desk,
    config: GatewayConfig,
    find_gateway: FindGateway = nowhere,
    other_metrics: OtherMetrics = no_others,
    set_role: SetRole = no_coordinators,
) -> FastAPI:
    """All HTTP routes. ConfigError when other machines could call without a key. The endpoints that POST are plain ASGI,
    so that nothing lies between them and the socket. `find_gateway`: where other gateways are, that hold streams."""
    check_exposure(config, os.environ)
    app = FastAPI(title="Kvasir", openapi_url=None, docs_url=None, redoc_url=None)
    limit = config.max_body_bytes
    streams = Route("/v1/streams/{id}", Streams(desk.recordings, find_gateway), methods=["GET", "DELETE"])
    app.state.shelf = shelf = Shelf(desk, config, os.environ)
    others = [
        *stored_chat_routes(shelf.chats),
        *ollama_routes(desk, limit),
        *anthropic_routes(desk, limit),
        streams,
        *Groups(desk, set_role, limit).routes(),
        *_stored_routes(shelf, limit),
        *(docs_routes() if config.enable_docs else []),
    ]
    app.router.routes.extend(
        [*_openai_routes(desk, shelf.chats, config), *others, *_operator_routes(desk, other_metrics)]
    )
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    keys = load_keys(config, os.environ)
    app.add_middleware(Front, keys=keys, origins=Origins(config, keys), refused=desk.metrics.refused)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                "X-Request-ID",
                "X-Kvasir-Warning",
                "Kvasir-Route",
                "Retry-After",
                "Server-Timing",
                STREAM_ID,
            ],
        )
    return app


def _openai_routes(desk: Desk, chats: Chats, config: GatewayConfig) -> list[Route]:
    limit, role = config.max_body_bytes, config.response_role
    models = Models(desk, int(time.time()))
    tokenize, detokenize = Tokenize(desk, limit), Detokenize(desk, limit)
    return [
        Route("/v1/chat/completions", Completions.chat(desk, limit, role, chats), methods=["POST"]),
        Route("/v1/completions", Completions.text(desk, limit, role), methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{name:path}", models.get, methods=["GET"]),
        *(Route(path, tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
        Route("/v1/decisions", Decisions(desk, limit), methods=["POST"]),
        Route("/v1/systemone", SystemOne(desk, limit), methods=["POST"]),
        *(Route(path, pool, methods=["POST"]) for path, pool in PoolingEndpoint.routes(desk, limit).items()),
    ]


def _stored_routes(shelf: Shelf, max_body_bytes: int) -> list[Route]:
    return [
        *responses_routes(shelf.responses, max_body_bytes),
        *conversation_routes(shelf.conversations, max_body_bytes),
        *files_routes(shelf.files, shelf.background, shelf.ttl_s),
        *batches_routes(shelf.batches, max_body_bytes),
    ]


async def close_app(app: FastAPI) -> None:
    """End what runs behind the routes; what is stored stays."""
    await app.state.shelf.close()


def _operator_routes(desk: Desk, other_metrics: OtherMetrics) -> list[Route]:
    health = Health(desk)
    names = [model.name for model in desk.models]

    async def alive(request: Request) -> Response:
        return _health(health.dead())

    async def ready(request: Request) -> Response:
        return _health(await health.unready())

    async def scrape(request: Request) -> Response:
        own, others = desk.metrics.render(), await other_metrics()
        if others is not None:  # with the label even while nobody else is known: series mustn't change their names
            own = merged({**others, desk.recordings.gateway: own.decode()})
        groups = desk.metrics.render_groups(desk.directory, names)
        return Response(groups + own, media_type=metrics.CONTENT_TYPE)

    async def show_version(request: Request) -> Response:
        return _json({"version": version("kvasir")})

    async def serving(request: Request) -> Response:
        """As Serve's own proxies answer, whom KubeRay asks which pods get traffic. It looks for this word."""
        return Response("draining", 503) if desk.draining else Response("success", media_type="text/plain")

    pages = {
        "/-/healthz": serving,
        "/health": alive,
        "/health/ready": ready,
        "/metrics": scrape,
        "/version": show_version,
    }
    return [Route(path, page, methods=["GET"]) for path, page in pages.items()]


def _health(wrong: dict[str, str]) -> Response:
    if not wrong:
        return _json({"status": "ok"})
    why = "; ".join(f"{model}: {reason}" for model, reason in wrong.items())
    return _json({"status": "unavailable", "models": wrong, **openai_error(UnavailableError(why))}, 503)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
