"""What a replay found: a row of a table, the load that is carried, a plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLOURS = {
    "round-robin": "#999999",
    "least-load": "#d08000",
    "prefix": "#4070d0",
    "cost": "#c02030",
    "server": "#c02030",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that was answered."""

    ttft: float
    itl: float
    cached: int
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Report:
    """One replay."""

    policy: str
    speed: float
    offered: float
    """Requests a second."""
    outcomes: Sequence[Outcome]
    good: int
    hits: float
    refused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that were neither refused nor answered, by what was said of them."""
    real_time: float = 0.0
    """Simulated seconds in a second of one core."""
    fetched: float = 0.0
    """GB of blocks that came from peers."""
    moves: int = 0
    """Requests that another group took over."""

    @property
    def total(self) -> int:
        """All requests."""
        return len(self.outcomes) + self.refused + self.failures.total()

    @property
    def attained(self) -> float:
        """Share of all requests that were good."""
        return self.good / self.total

    def row(self) -> str:
        ttft, itl = ([getattr(one, name) for one in self.outcomes] for name in ("ttft", "itl"))
        admitted = self.good / max(1, self.total - self.refused)
        return " | ".join(
            [
                f"| {self.policy} | {self.speed:g} | {self.offered:.1f} | {self.attained * self.offered:.1f}",
                f"{self.attained:.1%} | {self.refused / self.total:.1%} | {self.failures.total()}",
                f"{admitted:.1%} | {self.hits:.1%}",
                *(f"{percentile(ttft, share):.2f}" for share in (0.5, 0.9, 0.99)),
                *(f"{percentile(itl, share) * 1e3:.1f}" for share in (0.5, 0.99)),
                f"{self.fetched:.3g} | {self.moves} | {self.real_time:.0f} |",
            ]
        )


COLUMNS = (
    "policy", "speed", "offered, 1/s", "goodput, 1/s", "good", "refused", "failed", "good of admitted", "hits over ideal",
    "TTFT p50, s", "p90", "p99", "ITL p50, ms", "p99", "fetched, GB", "moves", "x real time",
)  # fmt: skip
HEAD = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def carried(reports: Sequence[Report], share: float) -> float:
    """Goodput as DistServe defines it: the highest load, between those measured, of which `share` is good."""
    points = sorted((one.offered, one.attained) for one in reports)
    best = 0.0
    for (load_, attained), (more, less) in zip(points, [*points[1:], (math.inf, 0.0)], strict=True):
        if attained >= share:
            best = (
                load_
                if more == math.inf or less >= share
                else load_ + (more - load_) * (attained - share) / (attained - less)
            )
    return best


def plot(reports: Sequence[Report], path: Path) -> None:
    """Goodput over offered load, a line for each policy; SVG."""
    wide, high, left, low = 640, 360, 50, 320
    most = max(one.offered for one in reports)
    top = max(one.attained * one.offered for one in reports) * 1.05 or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + x / most * (wide - left - 110):.1f},{low - y / top * (low - 20):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<polyline points="{left},20 {left},{low} {wide - 110},{low}" fill="none" stroke="black"/>',
        f'<text x="{wide // 2 - 60}" y="{high - 8}">offered load, requests/s</text>',
        f'<text x="6" y="14">goodput, requests/s</text><text x="{left - 32}" y="30">{top:.0f}</text>',
        f'<text x="{wide - 130}" y="{low + 16}">{most:.0f}</text>',
        f'<polyline points="{place(0, 0)} {place(min(most, top), min(most, top))}" stroke="#ccc" stroke-dasharray="4"/>',
    ]
    for number, policy in enumerate(dict.fromkeys(one.policy for one in reports)):
        mine = sorted((one.offered, one.attained * one.offered) for one in reports if one.policy == policy)
        points, colour = " ".join(place(*pair) for pair in [(0.0, 0.0), *mine]), COLOURS[policy]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{wide - 100}" y="{40 + 18 * number}" fill="{colour}">{policy}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))
