"""How each dialect writes an error; the path says which dialect a client speaks, and where two share one, the headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.errors import KvasirError

Json = dict[str, Any]

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(
    error: KvasirError, path: str = "", request_id: str | None = None, headers: Mapping[str, str] = {}
) -> Json:
    """The body of an error response: Ollama's below /api/, Anthropic's at /v1/messages and to its clients who look for models,
    OpenAI's everywhere else."""
    if path.startswith("/api/"):
        return ollama_error(error)
    if f"{path}/".startswith("/v1/messages/") or (f"{path}/".startswith("/v1/models/") and of_anthropic(headers)):
        return anthropic_error(error, request_id)
    return openai_error(error)


def of_anthropic(headers: Mapping[str, str]) -> bool:
    """A client of Anthropic's sent them."""
    return "anthropic-version" in headers or ("x-api-key" in headers and "authorization" not in headers)


def openai_error(error: KvasirError) -> Json:
    """{"error": {message, type, param, code}}."""
    kind = _openai_type(error.status)
    code = None if error.code == kind else error.code
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def ollama_error(error: KvasirError) -> Json:
    """{"error": text}."""
    return {"error": error.message}


def anthropic_error(error: KvasirError, request_id: str | None = None) -> Json:
    """{"type": "error", "error": {type, message}, "request_id"}."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def _openai_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
