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
from kvasir.cluster.anthropic_api import anthropic_routes
from kvasir.cluster.auth import check_exposure, load_keys
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.desk import Desk
from kvasir.cluster.error_shapes import openai_error
from kvasir.cluster.grpc_api import create_grpc_server
from kvasir.cluster.health import Health
from kvasir.cluster.http_front import HANDLERS, Front
from kvasir.cluster.ollama_models import ollama_routes
from kvasir.cluster.openai_api import Completions, Detokenize, Models, Tokenize
from kvasir.cluster.pooling_api import PoolingEndpoint
from kvasir.engine.errors import UnavailableError

__all__ = ["create_app", "create_grpc_server"]


def create_app(desk: Desk, config: GatewayConfig) -> FastAPI:
    """All HTTP routes. ConfigError when other machines could call without a key. The endpoints that POST are plain ASGI,
    so that nothing lies between them and the socket."""
    check_exposure(config, os.environ)
    app = FastAPI(title="Kvasir", openapi_url=None, docs_url=None, redoc_url=None)
    limit = config.max_body_bytes
    others = [*ollama_routes(desk, limit), *anthropic_routes(desk, limit)]
    app.router.routes.extend([*_openai_routes(desk, config), *others, *_operator_routes(desk)])
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Front, keys=load_keys(config, os.environ))
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "X-Kvasir-Warning", "Kvasir-Route", "Retry-After"],
        )
    return app


def _openai_routes(desk: Desk, config: GatewayConfig) -> list[Route]:
    limit, role = config.max_body_bytes, config.response_role
    models = Models(desk, int(time.time()))
    tokenize, detokenize = Tokenize(desk, limit), Detokenize(desk, limit)
    return [
        Route("/v1/chat/completions", Completions.chat(desk, limit, role), methods=["POST"]),
        Route("/v1/completions", Completions.text(desk, limit, role), methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{name:path}", models.get, methods=["GET"]),
        *(Route(path, tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
        *(Route(path, pool, methods=["POST"]) for path, pool in PoolingEndpoint.routes(desk, limit).items()),
    ]


def _operator_routes(desk: Desk) -> list[Route]:
    health = Health(desk)
    names = [model.name for model in desk.models]

    async def alive(request: Request) -> Response:
        return _health(health.dead())

    async def ready(request: Request) -> Response:
        return _health(await health.unready())

    async def scrape(request: Request) -> Response:
        return Response(desk.metrics.render(desk.directory, names), media_type=metrics.CONTENT_TYPE)

    async def show_version(request: Request) -> Response:
        return _json({"version": version("kvasir")})

    pages = {"/health": alive, "/health/ready": ready, "/metrics": scrape, "/version": show_version}
    return [Route(path, page, methods=["GET"]) for path, page in pages.items()]


def _health(wrong: dict[str, str]) -> Response:
    if not wrong:
        return _json({"status": "ok"})
    why = "; ".join(f"{model}: {reason}" for model, reason in wrong.items())
    return _json({"status": "unavailable", "models": wrong, **openai_error(UnavailableError(why))}, 503)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
