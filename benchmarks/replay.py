"""Replays a recorded trace, open loop: against a fleet of simulated groups on a virtual clock, policy by policy, or
against a real server.

    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 1 2 4 8             # four policies, a table
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 16 --max-ttft 2 --policy cost
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 1 2 4 8 --plot replay.svg
    .venv/bin/python benchmarks/replay.py TRACE --goals                                  # a table of what is wanted and found
    .venv/bin/python benchmarks/replay.py TRACE --groups 16 --speed 8 --policy cost --fetch --prefill 4   # peers, roles
    .venv/bin/python benchmarks/replay.py TRACE --url http://127.0.0.1:8000 --speed 0.5 --limit 200 --shrink 32
    .venv/bin/python benchmarks/replay.py --fit skald                                    # an engine's step times
    .venv/bin/python benchmarks/replay.py --route                                        # what a decision takes

TRACE: Mooncake's JSONL, a folder of agent sessions or one of them (JSON), Azure's CSV. Good is a request whose first token
came within --ttft and whose others took --itl each, on average. Hits are cached prompt tokens over those of one cache that
never forgets, for the requests that were answered. Speed 2 plays a trace in half its time. --shrink 32 leaves one token of
32 of prompts and answers, for models with little room; which requests begin alike stays the same. A real server's API key
is read from OPENAI_API_KEY; it finds nothing in its cache that was there before a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from refusals import refuse, refuse_others
from replay_costs import fit, route_times
from replay_goals import goals
from replay_report import HEAD, Outcome, Report, carried, plot
from traces import Ask, block_size, load

from kvasir.cluster.router import Policy, Router
from kvasir.cluster.simulated_group import Shape, StepTime
from kvasir.cluster.simulator import Arrival, Simulation, ideal_hits


def simulate(asks: Sequence[Ask], policy: Policy, speed: float, shape: Shape, args: argparse.Namespace) -> Report:
    """One policy at one speed."""
    routers = [Router(policy, max_ttft_s=args.max_ttft, draw=random.Random(n)) for n in range(args.gateways)]
    began = time.process_time()
    simulation = Simulation(args.groups, shape, routers, args.prefill)
    runs, refused = simulation.run(Arrival(ask.at / speed, ask.prompt, ask.output, ask.session) for ask in asks)
    spent = time.process_time() - began
    outcomes = [
        Outcome(run.first_token - run.arrived, (run.last.finished - run.first_token) / max(1, run.output - 1), run.cached,
                run.request.prompt_token_ids)
        for run in runs
    ]  # fmt: skip
    span = max(run.last.finished for run in runs)
    fetched = sum(group.stats().peer_bytes for group in simulation.groups) / 1e9
    moves = sum(run.heir is not None for run in runs)
    found = _report(policy, speed, asks, outcomes, shape.block_size, args)
    return replace(found, refused=len(refused), real_time=span / spent, fetched=fetched, moves=moves)


def _report(
    policy: str, speed: float, asks: Sequence[Ask], outcomes: Sequence[Outcome], size: int, args: argparse.Namespace
) -> Report:
    good = sum(one.ttft <= args.ttft and one.itl <= args.itl / 1e3 for one in outcomes)
    ideal = sum(ideal_hits([one.prompt for one in outcomes], size))
    hits = sum(one.cached for one in outcomes) / max(1, ideal)
    offered = len(asks) * speed / max(1e-9, asks[-1].at)
    return Report(policy, speed, offered, outcomes, good, hits)


# -- a real server


async def replay(asks: Sequence[Ask], speed: float, args: argparse.Namespace) -> Report:
    """POST /v1/completions with token ids, each at its time whether or not those before are answered. What others left in the
    server's cache, as runs before this one, isn't found."""
    import aiohttp

    key, salt = os.environ.get("OPENAI_API_KEY"), secrets.token_hex(8)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(None), connector=aiohttp.TCPConnector(limit=0), headers=headers
    ) as client:
        async with client.get(f"{args.url}/v1/models") as answer:
            answer.raise_for_status()
            card = (await answer.json())["data"][0]
        model, room = card["id"], card.get("max_model_len") or math.inf
        fitting = [ask for ask in asks if len(ask.prompt) + ask.output <= room]
        if len(fitting) < len(asks):
            print(f"{len(asks) - len(fitting)} of {len(asks)} requests are longer than {room} tokens and left out")
        if not fitting:
            raise SystemExit("no request fits into the server's max_model_len: --shrink makes them shorter")
        before = await _counters(client, args.url)
        began = time.perf_counter()

        async def one(ask: Ask) -> Outcome | str | None:
            """Its answer, or what went wrong; None: it was refused."""
            due = began + ask.at / speed
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            body = {"model": model, "prompt": list(ask.prompt), "max_tokens": ask.output, "ignore_eos": True}
            options = {"stream": True, "stream_options": {"include_usage": True}, "cache_salt": salt}
            session = {"kvasir-session": f"{salt} {ask.session}"} if ask.session else {}
            try:
                async with client.post(f"{args.url}/v1/completions", json=body | options, headers=session) as answer:
                    if answer.status in (429, 503):
                        return None
                    if answer.status != 200:
                        return f"HTTP {answer.status}: {(await answer.text())[:200]}"
                    times, cached = await _read(answer.content)
            except FailedError as error:
                return str(error)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            return Outcome(times[0] - due, (times[-1] - times[0]) / max(1, ask.output - 1), cached, ask.prompt)

        ends = await asyncio.gather(*map(one, fitting))
        fetched, moves = (after - was for after, was in zip(await _counters(client, args.url), before, strict=True))
    outcomes = [end for end in ends if isinstance(end, Outcome)]
    failures = Counter(end for end in ends if isinstance(end, str))
    found = _report("server", speed, fitting, outcomes, args.block_size or 16, args)
    refused = ends.count(None)
    return replace(found, refused=refused, failures=failures, fetched=fetched / 1e9, moves=int(moves), real_time=1.0)


class FailedError(Exception):
    """A request was taken and not answered, and why."""


async def _read(lines: "aiohttp.StreamReader") -> tuple[list[float], int]:  # type: ignore[name-defined]  # noqa: F821, UP037
    """(when each piece of the answer came, cached tokens of the prompt). FailedError when it isn't whole."""
    times, cached, whole = list[float](), 0, False
    async for line in lines:
        whole = whole or line.startswith(b"data: [DONE]")
        if line.startswith(b"data: {"):
            told = json.loads(line[6:])
            if "error" in told:
                error = told["error"]
                raise FailedError(str(error.get("message", error) if isinstance(error, dict) else error)[:200])
            cached = ((told.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or cached
            if told.get("choices"):
                times.append(time.perf_counter())
    if not whole or not times:
        raise FailedError("the stream ended before the answer did")
    return times, cached


async def _counters(client: "aiohttp.ClientSession", url: str) -> tuple[float, float]:  # type: ignore[name-defined]  # noqa: F821, UP037
    """(bytes that groups fetched, moves) since the server's start."""
    async with client.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return _total(text, "kvasir:kv_fetched_bytes_total"), _total(text, "kvasir:moves_total")


def _total(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--speed", type=float, nargs="+", default=[1.0])
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit in seconds")
    parser.add_argument("--itl", type=float, default=25.0, help="limit in milliseconds")
    parser.add_argument("--policy", nargs="+", choices=get_args(Policy), default=get_args(Policy))
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--max-ttft", type=float, default=0.0, help="as of kvasir serve; 0: nothing is refused")
    parser.add_argument("--block-size", type=int, help="of the groups; default: the trace's own unit")
    parser.add_argument(
        "--kv-tokens", type=int, default=Shape().num_blocks * Shape().block_size, help="a group's cache"
    )
    parser.add_argument("--fetch", action="store_true", help="simulated groups fetch blocks from each other")
    parser.add_argument("--link", type=float, default=Shape().fetch_bytes_per_s / 1e9, help="of each group, GB/s")
    parser.add_argument("--token-bytes", type=float, default=0.33e6, help="keys and values of a token")
    parser.add_argument("--prefill", type=int, default=0, help="so many simulated groups only compute prompts")
    parser.add_argument("--prefill-budget", type=int, default=Shape().prefill_budget, help="tokens of their steps")
    parser.add_argument("--shrink", type=int, default=1, help="leave one token of so many")
    parser.add_argument("--budget", type=int, default=Shape().budget, help="tokens of a step")
    parser.add_argument("--step", type=float, nargs=4, metavar="S", help="base, prefill, stream, context; see StepTime")
    parser.add_argument("--goals", action="store_true", help="what is wanted of the router, and whether it holds")
    parser.add_argument("--plot", type=Path, help="goodput over load, as SVG")
    parser.add_argument("--url", help="a real server instead of simulated groups")
    parser.add_argument("--vocab", type=int, default=2**17, help="token ids stay below")
    parser.add_argument("--fit", metavar="MODEL", help="measure an engine's step times, for --step")
    parser.add_argument("--threads", type=int, help="of the engine that is measured, as of --num-threads")
    parser.add_argument("--route", action="store_true", help="time the decision: 64 groups, 8,000 tokens")
    args = parser.parse_args()
    _check(parser, args)
    if args.fit:
        found = fit(args.fit, args.threads)
        print(f"--step {found.base_s:.3g} {found.prefill_s:.3g} {found.stream_s:.3g} {found.context_s:.3g}")
    elif args.route:
        print(route_times(64, 8000))
    elif args.trace is None:
        parser.error("which trace?")
    else:
        _replay_all(args)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Nothing that was given is ignored."""
    if args.fit or args.route:
        if args.trace is not None:
            parser.error("a trace means nothing with --fit and --route")
        read = ("fit", "threads") if args.fit else ("route",)
        refuse_others(parser, args, f"with --{read[0]}", *read)
        return
    refuse(parser, args, "without --fit", "threads")
    if args.url:
        read = ("url", "trace", "speed", "limit", "ttft", "itl", "block_size", "shrink", "vocab", "plot")
        refuse_others(parser, args, "with --url", *read)
    if args.goals:
        refuse(parser, args, "with --goals", "speed", "policy", "max_ttft", "plot")
    if not args.prefill:
        refuse(parser, args, "without --prefill", "prefill_budget")
        if not args.fetch:
            refuse(parser, args, "without --fetch or --prefill", "link", "token_bytes")


def _replay_all(args: argparse.Namespace) -> None:
    asks = load(args.trace, vocab=args.vocab, limit=args.limit, shrink=args.shrink)
    print(HEAD, flush=True)
    if args.goals:
        shape = _shape(args)

        def run(policy: str, speed: float, max_ttft: float) -> Report:
            limited = argparse.Namespace(**{**vars(args), "max_ttft": max_ttft})
            return simulate(asks, policy, speed, shape, limited)  # type: ignore[arg-type]

        for line in goals(run, asks, shape, args.ttft):
            print(line, flush=True)
        return
    reports = []
    for speed in args.speed:
        for policy in ("server",) if args.url else args.policy:
            reports.append(_one(asks, policy, speed, args))
            print(reports[-1].row(), flush=True)
    for one in reports:
        for why, count in one.failures.most_common(5):
            print(f"\nspeed {one.speed:g}, failed: {count} x {why}")
    for share in (0.95, 0.9):
        best = {policy: carried([one for one in reports if one.policy == policy], share) for policy in
                dict.fromkeys(one.policy for one in reports)}  # fmt: skip
        print(
            f"\nload of which {share:.0%} is good, 1/s: "
            + ", ".join(f"{name} {rate:.1f}" for name, rate in best.items())
        )
    if args.plot:
        plot(reports, args.plot)


def _one(asks: Sequence[Ask], policy: str, speed: float, args: argparse.Namespace) -> Report:
    if args.url:
        return asyncio.run(replay(asks, speed, args))
    return simulate(asks, policy, speed, _shape(args), args)  # type: ignore[arg-type]


def _shape(args: argparse.Namespace) -> Shape:
    size = args.block_size or block_size(args.trace)
    step = (
        StepTime(**dict(zip(("base_s", "prefill_s", "stream_s", "context_s"), args.step, strict=True)))
        if args.step
        else StepTime()
    )
    return Shape(
        step_time=step,
        block_size=size,
        num_blocks=args.kv_tokens // size,
        budget=args.budget,
        prefill_budget=args.prefill_budget,
        token_bytes=args.token_bytes if args.fetch or args.prefill else 0.0,
        fetch_bytes_per_s=args.link * 1e9,
    )


if __name__ == "__main__":
    main()
