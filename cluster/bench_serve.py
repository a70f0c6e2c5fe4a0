"""`kvasir bench serve`: load any OpenAI-compatible server, and report what its clients feel.

With --rate the load is open: requests come at random moments, whether or not the server keeps up. Without, as many as
--concurrency are always running. With both, a request that has to wait for a place counts from when it was due: a
server that can't keep up doesn't look better for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from kvasir.engine.errors import ConfigError

WORDS = ("amber", "river", "stone", "copper", "silver", "garden", "window", "bridge", "candle", "forest", "meadow")
PERCENTILES = (50, 90, 99)
CONCURRENCY = 32


@dataclass(slots=True)
class Stream:
    """What one request felt, in seconds."""

    started: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Between chunks, after the first one."""
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def bench_serve(args: argparse.Namespace) -> int:
    """Run the load; prints a table. 1 when any request failed."""
    if not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, got {args.url!r:.60}", param="url")
    streams, seconds = asyncio.run(_load(args))
    report = summary(streams, seconds)
    _print(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    return 1 if report["failed"] else 0


async def _load(args: argparse.Namespace) -> tuple[list[Stream], float]:
    draw = random.Random(args.seed)
    prompts = _prompts(args, draw)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limit = asyncio.Semaphore(args.concurrency or (len(prompts) if args.rate else CONCURRENCY))
    async with aiohttp.ClientSession(args.url, headers=headers, timeout=aiohttp.ClientTimeout(total=3600)) as session:
        model = args.model or await _first_model(session, args.url)
        started = time.perf_counter()
        with tqdm(total=len(prompts), desc="requests") as bar:

            async def one(prompt: str, due: float | None) -> Stream:
                async with limit:
                    stream = Stream(time.perf_counter() if due is None else due)
                    await _stream(session, model, prompt, args.output_len, stream)
                bar.update()
                return stream

            tasks = []
            for prompt in prompts:
                if args.rate:
                    await asyncio.sleep(draw.expovariate(args.rate))
                tasks.append(asyncio.create_task(one(prompt, time.perf_counter() if args.rate else None)))
            streams = await asyncio.gather(*tasks)
    return streams, time.perf_counter() - started


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get("/v1/models") as reply:
            reply.raise_for_status()
            return str((await reply.json())["data"][0]["id"])
    except (aiohttp.ClientError, LookupError) as error:
        raise ConfigError(
            f"--url {url}: no list of models there ({error}); is the server running?", param="url"
        ) from error


async def _stream(session: aiohttp.ClientSession, model: str, prompt: str, tokens: int, stream: Stream) -> None:
    """One streamed completion; fills in what it felt."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        async with session.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as reply:
            if reply.status != 200:
                stream.error = f"{reply.status}: {(await reply.text())[:200]}"
                return
            await _read(reply, stream)
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    stream.ended = time.perf_counter()


async def _read(reply: aiohttp.ClientResponse, stream: Stream) -> None:
    last = stream.started
    async for line in reply.content:
        if not line.startswith(b"data: {"):
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            stream.error = str(event["error"])
        if event.get("choices"):
            now = time.perf_counter()
            if stream.first is None:
                stream.first = now
            else:
                stream.gaps.append(now - last)
            last = now
        if usage := event.get("usage"):
            stream.prompt_tokens, stream.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _prompts(args: argparse.Namespace, draw: random.Random) -> list[str]:
    if args.prompts is None:
        return [" ".join(draw.choices(WORDS, k=args.input_len)) for _ in range(args.num_requests)]
    lines = [line for line in _lines(args.prompts) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {args.prompts} holds no prompt", param="prompts")
    found = [_prompt(line) for line in lines]
    return [found[i % len(found)] for i in range(args.num_requests)]


def _prompt(line: str) -> str:
    """A line of text, or of JSON with `prompt` or (as MT-Bench has it) `turns`."""
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
        return str(entry["prompt"] if "prompt" in entry else entry["turns"][0])
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise ConfigError(f"--prompts: no JSON with `prompt` or `turns`: {line[:60]}", param="prompts") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}", param="prompts") from error


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    """Totals, rates, and percentiles in milliseconds."""
    good = [stream for stream in streams if stream.error is None and stream.first is not None]
    prompt, output = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    latencies = {
        "time to first token": [s.first - s.started for s in good if s.first is not None],
        "between tokens": [gap for s in good for gap in s.gaps],
        "whole request": [s.ended - s.started for s in good],
    }
    return {
        "requests": len(streams),
        "failed": len(streams) - len(good),
        "errors": sorted({s.error for s in streams if s.error})[:5],
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "prompt_tok_s": prompt / seconds,
        "output_tok_s": output / seconds,
        "latency_ms": {name: _percentiles(values) for name, values in latencies.items() if values},
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {f"p{p}": 1000 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)] for p in PERCENTILES}
    return {"mean": 1000 * statistics.fmean(ordered)} | found


def _print(report: dict[str, Any]) -> None:
    print(f"{report['requests']} requests in {report['seconds']:.1f} s, {report['failed']} failed")
    for error in report["errors"]:
        print(f"  {error}")
    rates = (report[key] for key in ("requests_per_s", "prompt_tok_s", "output_tok_s"))
    print("{:.2f} requests/s, {:.0f} prompt tok/s, {:.0f} output tok/s".format(*rates))
    names = ("mean", *(f"p{p}" for p in PERCENTILES))
    print(f"{'ms':22}" + "".join(f"{name:>10}" for name in names))
    for kind, values in report["latency_ms"].items():
        print(f"{kind:22}" + "".join(f"{values[name]:10.1f}" for name in names))
