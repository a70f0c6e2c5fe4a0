"""`groups` of a deployment spec: how many groups of a model are for what, and what they run otherwise than the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from kvasir.engine.config import Role
from kvasir.engine.errors import ConfigError

ROLES: tuple[Role, ...] = get_args(Role)
FORMS = "prefill=1,decode=3 or a list of {role: prefill, count: 1, ...}"


def by_role(entry: Mapping[str, Any]) -> list[tuple[Role, dict[str, Any]]]:
    """(role, options with the number of copies) of each kind of groups that a model has; its own options where it names
    none. Raises ConfigError."""
    options = {**entry}
    groups = options.pop("groups", None)
    if groups is None:
        return [("both", options)]
    if "data_parallel_size" in options:
        raise ConfigError(
            "give either groups or --data-parallel-size: the counts of groups are the copies", param="groups"
        )
    if isinstance(groups, str):
        groups = [_pair(part) for part in groups.split(",") if part.strip()]
    if isinstance(groups, Mapping):
        groups = [{"role": role, "count": count} for role, count in groups.items()]
    if not isinstance(groups, list) or not groups:
        raise ConfigError(f"groups must be {FORMS}, got {groups!r:.60}", param="groups")
    found = [_group(options, one) for one in groups]
    if len({role for role, _ in found}) < len(found):
        raise ConfigError("groups names a role twice", param="groups")
    return found


def _pair(text: str) -> dict[str, Any]:
    role, equals, count = text.strip().partition("=")
    if not equals:
        raise ConfigError(f"groups must be {FORMS}, got {text!r:.60}", param="groups")
    return {"role": role.strip(), "count": count.strip()}


def _group(options: Mapping[str, Any], group: Any) -> tuple[Role, dict[str, Any]]:
    if not isinstance(group, Mapping):
        raise ConfigError(f"groups must be {FORMS}, got {group!r:.60} in it", param="groups")
    own = {str(key).replace("-", "_"): value for key, value in group.items()}
    role, count = own.pop("role", "both"), own.pop("count", 1)
    if role not in ROLES:
        raise ConfigError(f"groups: a role is one of {', '.join(ROLES)}, got {role!r:.60}", param="groups")
    if barred := sorted(own.keys() & {"model", "models", "served_model_name", "data_parallel_size", "groups"}):
        raise ConfigError(f"groups: {barred[0]} belongs beside groups, not into an entry of it", param="groups")
    if not str(count).isdecimal() or not 0 < int(count) < 10_000:
        raise ConfigError(f"groups: count must be a whole number from 1 to 9999, got {count!r:.60}", param="groups")
    return cast(Role, role), {**options, **own, "data_parallel_size": int(count)}
