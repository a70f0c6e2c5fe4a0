"""Whose fault it is: `ClientError` is the caller's (4xx), `ServerError` is ours (5xx).

Every error that reaches a user says what is wrong, the limit and the flag or field to change.
"""

from __future__ import annotations


class KvasirError(Exception):
    """Base of all errors meant for users. `code` is a stable word for programs, `status` the HTTP status."""

    code = "internal_error"
    status = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """Name of the request field or flag that is to blame."""
        self.retry_after_s = retry_after_s
        self.counted = False
        """Metrics have it already, under its model."""


class ClientError(KvasirError, ValueError):
    """The caller asked for something that can't be done; asking the same again will fail again."""

    code = "invalid_request_error"
    status = 400


class UnsupportedError(ClientError):
    """The request constrains the output in a way that isn't supported: refused by name, never ignored."""

    code = "unsupported_parameter"


class ContextLengthError(ClientError):
    """Prompt and max_tokens don't fit into the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(ClientError):
    """No model of that name is served."""

    code = "model_not_found"
    status = 404


class ServerError(KvasirError):
    """Ours: asking again may succeed."""


class OverloadedError(ServerError):
    """A queue is full. `retry_after_s` says when to ask again."""

    code = "overloaded"
    status = 429


class UnavailableError(ServerError):
    """Draining, starting, or the group died."""

    code = "unavailable"
    status = 503


class DeadlineError(ServerError):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"
    status = 504


class ConfigError(KvasirError, ValueError):
    """A flag or a configuration key is wrong; raised before anything is started."""

    code = "config_error"
    status = 400


ERRORS: dict[str, type[KvasirError]] = {
    cls.code: cls
    for cls in (
        ClientError,
        UnsupportedError,
        ContextLengthError,
        ModelNotFoundError,
        OverloadedError,
        UnavailableError,
        DeadlineError,
        ConfigError,
    )
}
"""code -> class, to rebuild an error on the other side of a process border; unknown codes are `ServerError`."""
