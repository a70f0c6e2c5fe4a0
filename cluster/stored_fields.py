"""Bodies that make or change what is stored: they hold nothing that isn't kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.cluster.openai_fields import Check
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.service_fields import check_metadata
from kvasir.engine.errors import ClientError

Json = dict[str, Any]


def stored_fields(body: Json, honoured: Mapping[str, Check], what: str) -> Json:
    """Fields that are set, checked. ClientError names one that `what`, such as a conversation, hasn't."""
    fields, unknown = sort_fields(body, honoured, {}, {})
    if unknown:
        raise ClientError(f"{unknown[0]:.60} is no field of {what}", param=unknown[0][:60])
    return fields


def new_metadata(body: Json, what: str) -> Json:
    """What the metadata of `what` is to be; nothing else of it can be changed."""
    fields = stored_fields(body, {"metadata": check_metadata}, f"{what} that can be changed")
    if "metadata" not in fields:
        raise ClientError("metadata is missing", param="metadata")
    found: Json = fields["metadata"]
    return found
