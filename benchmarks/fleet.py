"""The simulator against a real fleet: the same trace, at the same times, by groups of `kvasir serve` and by simulated ones whose
step times were fitted from an engine on the same machine just before.

    .venv/bin/python benchmarks/fleet.py skald TRACE --limit 120 --shrink 32 --speed 1 2
    .venv/bin/python benchmarks/fleet.py skald TRACE --groups 1 --limit 80 --speed 0.5 1    # with two cores

TRACE: as of replay.py. One thread a group; a machine needs a core for each group and one for the gateway, else the groups
wait for each other, which simulated ones don't. What HTTP, gateway and client add to a first token isn't simulated either: it
is measured with a few short prompts while the groups are idle, and added to what is simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from replay import replay, simulate
from replay_costs import fit
from replay_report import HEAD, Report, percentile
from traces import Ask, load

from kvasir.cluster.simulated_group import Shape, StepTime

BLOCK, BUDGET, SEATS, START_S = 16, 256, 64, 200.0
SHORT, IDLE = 16, 20
"""Tokens of prompts that measure what isn't simulated, and how many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--speed", type=float, nargs="+", default=[1.0])
    parser.add_argument("--limit", type=int, default=120, help="only the first so many requests")
    parser.add_argument("--shrink", type=int, default=32, help="leave one token of so many")
    parser.add_argument("--vocab", type=int, default=3072, help="token ids stay below")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="a group's cache")
    parser.add_argument("--step", type=float, nargs=4, metavar="S", help="step times that were fitted before")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit in seconds")
    parser.add_argument("--itl", type=float, default=100.0, help="limit in milliseconds")
    args = parser.parse_args()
    args.block_size, args.gateways, args.max_ttft, args.prefill = BLOCK, 1, 0.0, 0
    step = _step_time(*args.step) if args.step else fit(args.model, threads=1)
    print(f"--step {step.base_s:.3g} {step.prefill_s:.3g} {step.stream_s:.3g} {step.context_s:.3g}")
    shape = Shape(
        step_time=step, block_size=BLOCK, num_blocks=args.kv_tokens // BLOCK, budget=BUDGET, max_num_seqs=SEATS
    )
    asks = load(args.trace, vocab=args.vocab, limit=args.limit, shrink=args.shrink)
    print(HEAD)
    for speed in args.speed:
        with served(args) as args.url:  # with empty caches each time
            overhead_s = max(0.0, asyncio.run(idle_s(args)) - step(SHORT, 0, 0))
            measured = asyncio.run(replay(asks, speed, args))
        found = simulate(asks, "cost", speed, shape, args)
        outcomes = [replace(one, ttft=one.ttft + overhead_s) for one in found.outcomes]
        good = sum(one.ttft <= args.ttft and one.itl <= args.itl / 1e3 for one in outcomes)
        simulated = replace(found, outcomes=outcomes, good=good)
        print(measured.row().replace("server", "measured"))
        print(simulated.row().replace("cost", "simulated"))
        print(f"{1e3 * overhead_s:.0f} ms added; measured over simulated: {over(measured, simulated)}\n", flush=True)


async def idle_s(args: argparse.Namespace) -> float:
    """The median time to the first token of short prompts, one after the other; nobody has seen them before."""
    draw = random.Random(0)
    prompts = [[draw.randrange(args.vocab // 2) for _ in range(SHORT)] for _ in range(IDLE)]
    asks = [Ask(0.0, prompt, 2) for prompt in prompts]
    reports = [await replay([ask], 1.0, args) for ask in asks]
    return statistics.median(one.ttft for report in reports for one in report.outcomes)


def over(measured: Report, simulated: Report) -> str:
    """Ratios of what matters."""
    found = {"goodput": (measured.attained, simulated.attained), "hits": (measured.hits, simulated.hits)}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found[f"TTFT {name}"] = tuple(
            percentile((o.ttft for o in one.outcomes), share) for one in (measured, simulated)
        )  # type: ignore[assignment]
    found["ITL p50"] = tuple(percentile((o.itl for o in one.outcomes), 0.5) for one in (measured, simulated))  # type: ignore[assignment]
    return ", ".join(f"{name} {one / other:.2f}" for name, (one, other) in found.items() if other)


def _step_time(base_s: float, prefill_s: float, stream_s: float, context_s: float) -> StepTime:
    return StepTime(base_s=base_s, prefill_s=prefill_s, stream_s=stream_s, context_s=context_s)


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server that has answered once."""
    command = [sys.executable, "-m", "kvasir.cluster.cli", "serve", args.model, "-dp", str(args.groups)]
    command += ["--port", "0", "--grpc-port", "0", "--num-threads", "1", "--block-size", str(BLOCK)]
    command += ["--kv-disk-size", "0", "--kv-transfer", "off", "--max-num-batched-tokens", str(BUDGET)]
    command += ["--max-num-seqs", str(SEATS)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            yield _ready(process, log.fileno())
        finally:
            process.terminate()
            process.wait(60)


def _ready(process: subprocess.Popen[str], log: int) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        text = Path(f"/proc/self/fd/{log}").read_text()
        if found := re.search(r"http://[\w.]+:\d+", text):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{found.group()}/health") as said:
                if said.status == 200:
                    return found.group()
    raise SystemExit(f"kvasir serve did not come up:\n{Path(f'/proc/self/fd/{log}').read_text()}")


if __name__ == "__main__":
    main()
