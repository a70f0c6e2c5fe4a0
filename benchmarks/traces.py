"""Recorded traces as (arrival, prompt token ids, output tokens): Mooncake's JSONL, agent sessions, Azure's CSV.

The traces hold ids of blocks, not texts: a block's tokens are made from its id, so that equal ids make equal prefixes.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from recorded import TRACES


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a trace."""

    at: float
    """Seconds from the beginning."""
    prompt: Sequence[int]
    output: int
    session: str = ""


def load(path: Path, *, vocab: int = 2**17, limit: int | None = None, seed: int = 0, shrink: int = 1) -> list[Ask]:
    """Requests in the order of their arrival, with one token of `shrink`. A folder of agent sessions: each starts at a
    random moment of the time that the longest takes. Ends the script where there is none."""
    if not path.exists():
        sys.exit(f"there is no trace {path}. {TRACES}")
    if path.is_dir():
        asks = _sessions(sorted(path.glob("*.json")), vocab, random.Random(seed))
    elif path.suffix == ".csv":
        asks = _azure(path, vocab)
    elif path.suffix == ".json":
        asks = _session(path, 0.0, vocab)
    else:
        asks = _mooncake(path, vocab)
    asks = sorted(asks, key=lambda ask: ask.at)[:limit]
    return asks if shrink == 1 else [_shrunk(ask, block_size(path), shrink) for ask in asks]


def _shrunk(ask: Ask, size: int, shrink: int) -> Ask:
    """The first tokens of each block tell it from others: they stay."""
    kept, prompt = max(1, size // shrink), ask.prompt
    less = [token for start in range(0, len(prompt), size) for token in prompt[start : start + size][:kept]]
    return Ask(ask.at, less, max(1, ask.output // shrink), ask.session)


def block_size(path: Path) -> int:
    """Tokens that a block id of the trace stands for."""
    return 64 if path.is_dir() or path.suffix == ".json" else 512 if path.suffix == ".jsonl" else 16


def _mooncake(path: Path, vocab: int) -> list[Ask]:
    asks = []
    for line in path.read_text().splitlines():
        one = json.loads(line)
        prompt = _prompt("", one["hash_ids"], one["input_length"], 512, vocab)
        asks.append(Ask(one["timestamp"] / 1000, prompt, max(1, one["output_length"])))
    return asks


def _sessions(paths: Sequence[Path], vocab: int, draw: random.Random) -> list[Ask]:
    found = [_session(path, 0.0, vocab) for path in paths]
    longest = max(ask.at for session in found for ask in session)
    starts = [draw.uniform(0, longest) for _ in found]
    return [
        Ask(start + ask.at, ask.prompt, ask.output, ask.session)
        for start, session in zip(starts, found, strict=True)
        for ask in session
    ]


def _session(path: Path, start: float, vocab: int) -> list[Ask]:
    """Block ids are the session's own."""
    told = json.loads(path.read_text())
    size = told["block_size"]
    return [
        Ask(
            start + one["t"], _prompt(path.stem, one["hash_ids"], one["in"], size, vocab), max(1, one["out"]), path.stem
        )
        for one in _requests(told)
    ]


def _requests(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of sub-agents too."""
    for one in told["requests"]:
        if "hash_ids" in one:
            yield one
        elif "requests" in one:
            yield from _requests(one)


def _azure(path: Path, vocab: int) -> list[Ask]:
    """Nothing is known of what prompts have in common: all are different."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Ask(
            (at - times[0]).total_seconds(),
            _prompt(str(n), [n], tokens, tokens, vocab),
            max(1, int(row["GeneratedTokens"])),
        )
        for n, (at, row) in enumerate(zip(times, rows, strict=True))
        if (tokens := int(row["ContextTokens"]))
    ]


def _prompt(scope: str, ids: Sequence[int], length: int, size: int, vocab: int) -> list[int]:
    prompt: list[int] = []
    for one in ids:
        draw = random.Random(f"{scope}/{one}")
        prompt += [draw.randrange(vocab // 2, vocab) for _ in range(min(4, size))] + [vocab - 1] * (size - 4)
    return prompt[:length] + [vocab // 2] * (length - len(prompt))
