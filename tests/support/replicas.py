"""What a test asks the replicas of a Serve deployment."""

from __future__ import annotations

from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle


def told(handle: DeploymentHandle[Any], method: str) -> list[Any]:
    """What those that live say. Nothing while there are none, and until the handle has heard of them: Serve keeps it for the next
    deployment of the same name, and tells it a little after it has said that all is running."""
    try:
        answers = handle.broadcast(method).results(timeout_s=60, return_exceptions=True)
    except (DeploymentUnavailableError, TimeoutError):
        return []
    return [answer for answer in answers if not isinstance(answer, Exception)]
