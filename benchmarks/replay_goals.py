"""What a router is wanted to reach on a trace, and what it does: a table that says what holds. See `replay.py --goals`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from replay_report import Report, carried
from traces import Ask

from kvasir.cluster.simulated_group import Shape
from kvasir.cluster.simulator import ideal_hits

SHARE = 0.9
"""Of requests that must be good at a load that is carried (DistServe, Zhong et al. 2024, arXiv:2401.09670, section 2.1)."""
SPEEDS = {"round-robin": (1.0, 8.0), "prefix": (4.0, 6.0, 7.0, 8.0), "cost": (4.0, 6.0, 7.0, 8.0, 9.0)}
"""Where each leaves what it carries, on the Mooncake trace with 16 groups."""
Run = Callable[[str, float, float], Report]
"""(policy, speed, max_ttft_s) -> what came of it"""


def goals(run: Run, asks: Sequence[Ask], shape: Shape, ttft_s: float) -> Iterator[str]:
    """Rows of runs as they end, then those of the table."""
    reports = []
    for policy, speeds in SPEEDS.items():
        for speed in speeds:
            reports.append(run(policy, speed, 0.0))
            yield reports[-1].row()
    load = {policy: carried([one for one in reports if one.policy == policy], SHARE) for policy in SPEEDS}
    at_one = reports[0].offered
    if not load["cost"]:
        raise SystemExit(
            f"cost carries less than {SPEEDS['cost'][0]:g} times this trace's speed: it isn't the one for which this is made"
        )
    twice = run("cost", round(2 * load["cost"] / at_one, 1), ttft_s)
    yield twice.row()
    yield "\n| wanted | found | |\n|---|---|---|"
    yield from _table(reports, twice, load)
    best = ceiling(asks, shape, ttft_s)
    yield f"\nNo policy can have more than {best:.1%} good: the other prompts take longer on an idle group that has all hits."
    same = {one.policy: one.attained for one in reports if one.speed == max(SPEEDS["prefix"])}
    most = f"{best / same['prefix']:.2f}"
    yield (
        f"At speed {max(SPEEDS['prefix']):g} cost has {same['cost'] / same['prefix']:.2f} times what prefix has in time ({most} is"
        f" the most that there can be), and {same['cost'] / same['round-robin']:.1f} times what round robin has."
    )


def _table(reports: Sequence[Report], twice: Report, load: dict[str, float]) -> Iterator[str]:
    least = min(one.offered for one in reports if one.policy == "round-robin")
    below = load["round-robin"] == 0.0  # then it carries less than the least that was tried
    others = {"prefix": load["prefix"], "round-robin": least if below else load["round-robin"]}
    hits = min(one.hits for one in reports if one.policy == "cost" and one.offered <= load["cost"])
    admitted = twice.good / len(twice.outcomes)
    text = {
        name: f"{load['cost']:.1f} / {other:.1f} 1/s = {load['cost'] / other:.2f}" for name, other in others.items()
    }
    rows: list[tuple[str, str, bool]] = [
        ("hits >= 90 % of one infinite cache's, at every load that is carried", f"{hits:.1%}", hits >= 0.9),
        (
            f"load of which {SHARE:.0%} is good >= 2 x round robin's",
            text["round-robin"].replace("/ ", "/ less than ") + (" or more" if below else ""),
            load["cost"] >= 2 * others["round-robin"],
        ),
        ("and >= 1.2 x prefix alone's", text["prefix"], load["cost"] >= 1.2 * others["prefix"]),
        (
            f"no collapse at twice that load ({twice.offered:.1f} 1/s): what is admitted is in time",
            f"{admitted:.1%}, {twice.refused / twice.total:.1%} are refused at once",
            admitted == 1.0,
        ),
        (
            "and more requests are in time than at the load itself",
            f"{twice.attained * twice.offered:.1f} 1/s in time",
            twice.attained * twice.offered >= SHARE * load["cost"],
        ),
    ]
    for wanted, found, holds in rows:
        yield f"| {wanted} | {found} | {'holds' if holds else 'DOES NOT HOLD'} |"


def ceiling(asks: Sequence[Ask], shape: Shape, ttft_s: float) -> float:
    """Share of requests whose first token an idle group has in time, if it holds all that one infinite cache would."""
    hits = ideal_hits([ask.prompt for ask in asks], shape.block_size)
    left = [len(ask.prompt) - hit for ask, hit in zip(asks, hits, strict=True)]
    return sum(_alone_s(shape, tokens) <= ttft_s for tokens in left) / len(asks)


def _alone_s(shape: Shape, uncached: int) -> float:
    steps, step = -(-uncached // shape.budget), shape.step_time
    return steps * step.base_s + uncached * step.prefill_s
