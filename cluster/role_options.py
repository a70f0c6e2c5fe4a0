"""`groups` of a deployment spec: how many groups of a model are for what, and what they run otherwise than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from kvasir.engine.config import Role
from kvasir.engine.errors import ConfigError

ROLES: tuple[Role, ...] = get_args(Role)
SHORT = "prefill=1,decode=3"
_BESIDE = frozenset({"model", "models", "served_model_name", "data_parallel_size", "groups"})


def by_role(entry: Mapping[str, Any]) -> list[tuple[Role, dict[str, Any]]]:
    """(role, options with the number of copies) of each kind of groups that a model has; its own options where it names
    none. Raises ConfigError."""
    options = {**entry}
    groups = options.pop("groups", None)
    if groups is None:
        return [("both", options)]
    if "data_parallel_size" in options:
        text = "give either groups (--groups) or data_parallel_size (--data-parallel-size)"
        raise ConfigError(f"{text}: the counts of groups are the copies", param="groups")
    if isinstance(groups, str):
        groups = counts_of(groups)
    if isinstance(groups, Mapping):
        groups = [{"role": role, "count": count} for role, count in groups.items()]
    if not isinstance(groups, list) or not groups:
        text = f"groups must be {SHORT} or a list of {{role: prefill, count: 1, ...}}"
        raise ConfigError(f"{text}, got {groups!r:.60}", param="groups")
    found = [_group(options, one, f"groups[{number}]") for number, one in enumerate(groups)]
    _check_distinct([role for role, _ in found], "groups")
    return found


def counts_of(text: str, at: str = "groups") -> list[dict[str, Any]]:
    """`groups` in its short form. `at`: where that was given."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"{at} must be {SHORT}, got {text!r:.60}", param="groups")
    found = [{"role": role.strip(), "count": count.strip()} for role, _, count in pairs]
    for one in found:
        _check(one["role"], one["count"], at)
    _check_distinct([one["role"] for one in found], at)
    return found


def _group(options: Mapping[str, Any], group: Any, at: str) -> tuple[Role, dict[str, Any]]:
    if not isinstance(group, Mapping):
        raise ConfigError(f"{at} must be {{role: prefill, count: 1, ...}}, got {group!r:.60}", param="groups")
    own = {str(key).replace("-", "_"): value for key, value in group.items()}
    role, count = own.pop("role", "both"), own.pop("count", 1)
    _check(role, count, at)
    if barred := sorted(own.keys() & _BESIDE):
        raise ConfigError(f"{at}: {barred[0]} belongs beside groups, not into an entry of it", param="groups")
    return cast(Role, role), {**options, **own, "data_parallel_size": int(count)}


def _check(role: Any, count: Any, at: str) -> None:
    if role not in ROLES:
        raise ConfigError(f"{at}: role must be one of {', '.join(ROLES)}, got {role!r:.60}", param="groups")
    if not str(count).isdecimal() or not 0 < int(count) < 10_000:
        raise ConfigError(f"{at}: count must be a whole number from 1 to 9999, got {count!r:.60}", param="groups")


def _check_distinct(roles: Sequence[str], at: str) -> None:
    if len(set(roles)) < len(roles):
        raise ConfigError(f"{at} names a role twice", param="groups")
