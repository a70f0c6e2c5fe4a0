"""What every gRPC method of ours has in common: metadata, and errors as status codes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

from kvasir.cluster.http_front import warning_header
from kvasir.engine.errors import KvasirError, ServerError

log = logging.getLogger(__name__)

STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    410: grpc.StatusCode.OUT_OF_RANGE,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC's; others are INTERNAL."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@asynccontextmanager
async def as_status(context: Context) -> AsyncIterator[None]:
    """An error ends the call with its status."""
    try:
        yield
    except Exception as error:
        await abort(context, told(error))


def told(error: Exception) -> KvasirError:
    """What clients are told; of what isn't a KvasirError the log alone has the text."""
    if isinstance(error, KvasirError):
        return error
    log.error("a gRPC call failed", exc_info=error)
    return ServerError("internal error; the server's log says more")


async def abort(context: Context, error: KvasirError) -> None:
    """End the call."""
    trailers = [("kvasir-code", error.code)]
    if error.param is not None:
        trailers.append(("kvasir-param", error.param))
    if error.retry_after_s is not None:
        trailers.append(("retry-after", str(max(1, round(error.retry_after_s)))))
    status = STATUS.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(status, error.message, tuple(trailers))


def metadata(context: Context) -> dict[str, str]:
    """Names are lower case in gRPC; binary values are left out."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def warning_metadata(names: Iterable[str], truncated_tokens: int) -> list[tuple[str, str]]:
    """As `warning_header`."""
    return [(name.decode(), text.decode()) for name, text in warning_header(names, truncated_tokens)]
