"""Processors: logits processors that others wrote, installed as entry points and enabled by --logits-processors.

An entry point of the group `kvasir.logits_processors` is a function `make(arguments, prompt_token_ids)`, called for each
sequence with the request's JSON object; it returns a function `process(output_token_ids, logits)`, called for each next token
with logits[V] on the model's device, which returns logits[V]. What it returns must depend on its arguments alone: sequences
are interrupted and go on elsewhere. A ValueError of `make` is the client's mistake.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from kvasir.engine.batch import Ints
from kvasir.engine.errors import ClientError, ConfigError, UnsupportedError
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import NewSequence

GROUP = "kvasir.logits_processors"
Process = Callable[[Sequence[int], Tensor], Tensor]
Make = Callable[[Mapping[str, Any], Sequence[int]], Process]
logger = logging.getLogger(__name__)


class Processors:
    """Those that requests may use. ConfigError when one isn't installed, or can't be loaded."""

    def __init__(self, names: Sequence[str]) -> None:
        installed = {point.name: point for point in entry_points(group=GROUP)} if names else {}
        self._made = {name: _load(name, installed) for name in names}

    def check(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Raise ClientError when `sampling` asks for one that isn't there, or with wrong arguments."""
        for name in sampling.logits_processors:
            if name not in self._made:
                known = ", ".join(self._made) or "none"
                text = f"logits processor {name!r} isn't enabled here (--logits-processors); enabled: {known}"
                raise UnsupportedError(text, param="logits_processors")
        try:
            self.make(sampling, prompt_token_ids)
        except (TypeError, ValueError, KeyError) as error:
            raise ClientError(f"logits_processors: {error}", param="logits_processors") from error

    def make(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> list[Process]:
        """A sequence's own, in the order in which they were enabled."""
        wanted = sampling.logits_processors
        return [make(json.loads(wanted[name]), prompt_token_ids) for name, make in self._made.items() if name in wanted]


class Processing:
    """What processes the logits of each seat. Nothing is kept of seats without one."""

    def __init__(self) -> None:
        self._seats: dict[int, tuple[list[Process], list[int]]] = {}
        """seat -> (its processors, its output)"""

    def enter(self, new: NewSequence, processes: list[Process]) -> None:
        """A sequence takes a seat."""
        self._seats.pop(new.seat, None)
        if processes:
            self._seats[new.seat] = processes, list(new.token_ids[new.prompt_len :])

    def apply(self, logits: Tensor, seats: Ints) -> tuple[Tensor, dict[int, str]]:
        """(logits[R, V] after the processors, row -> why its processor failed)."""
        failed: dict[int, str] = {}
        rows = [row for row, seat in enumerate(seats.tolist()) if seat in self._seats] if self._seats else []
        if not rows:
            return logits, failed
        logits = logits.clone()
        for row in rows:
            processes, output = self._seats[seats[row]]
            try:
                for process in processes:
                    logits[row] = _checked(process(tuple(output), logits[row].clone()), logits[row])
            except Exception as error:  # code of others: its own request fails, not the step
                logger.exception("a logits processor failed")
                failed[row] = f"a logits processor failed: {type(error).__name__}: {error}"
        return logits, failed

    def remember(self, seats: Ints, token_ids: Callable[[], Sequence[int]]) -> None:
        """The tokens that were sampled."""
        if self._seats and not self._seats.keys().isdisjoint(taken := seats.tolist()):
            for seat, token in zip(taken, token_ids(), strict=True):
                if seat in self._seats:
                    self._seats[seat][1].append(token)


def _load(name: str, installed: Mapping[str, EntryPoint]) -> Make:
    if name not in installed:
        there = ", ".join(sorted(installed)) or "none"
        text = f"--logits-processors {name}: no entry point of that name in the group {GROUP}; installed: {there}"
        raise ConfigError(text, param="logits_processors")
    try:
        found: Make = installed[name].load()
    except (ImportError, AttributeError) as error:
        text = f"--logits-processors {name}: {installed[name].value} can't be loaded: {error}"
        raise ConfigError(text, param="logits_processors") from error
    return found


def _checked(found: object, before: Tensor) -> Tensor:
    if not isinstance(found, torch.Tensor) or found.shape != before.shape:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"it must return logits of shape {tuple(before.shape)}, got {got}")
    return found
