"""What HTTP costs: the same requests to the bare engine in process and through `kvasir serve`, in one run.

Prints, for each: output tokens per second with 32 streams at once, and the median time to first token of one stream;
then the ratio and the difference. Also the seconds from `kvasir serve` to the first token of the first request.

    python benchmarks/http_overhead.py --model skald
    python benchmarks/http_overhead.py --model DIR --streams 32 --tokens 128 --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass

PROMPT = "Tell me about Kvasir, and then about the weather in the north."


@dataclass(frozen=True)
class Figures:
    """tokens_per_s with all streams at once, ttft_ms: median of single streams, one after the other."""

    tokens_per_s: float
    ttft_ms: float


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def engine_figures(options: argparse.Namespace) -> Figures:
    """The bare engine in this process."""
    from kvasir.engine import AsyncLLM, SamplingParams

    llm = AsyncLLM(options.model, max_num_seqs=options.max_num_seqs, num_threads=options.threads)

    async def one(name: str, tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started, first = time.perf_counter(), 0.0
        async for _ in llm.generate(PROMPT + name, sampling, name):
            first = first or time.perf_counter() - started
        return first

    async def rate(attempt: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(one(f"r{attempt}-{i}", options.tokens) for i in range(options.streams)))
        return options.streams * options.tokens / (time.perf_counter() - started)

    try:
        await one("warm", 8)
        firsts = [await one(f"t{i}", 8) for i in range(options.singles)]
        rates = [await rate(attempt) for attempt in range(options.repeat)]
    finally:
        llm.shutdown()
    return Figures(statistics.median(rates), 1000 * statistics.median(firsts))


async def http_one(port: int, body: dict[str, object]) -> tuple[float, int]:
    """One streamed completion over a fresh connection: (seconds to the first event, events). As light as a client can be."""
    payload = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started, first, events = time.perf_counter(), 0.0, 0
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + payload)
    while data := await reader.read(65536):
        if b"data: " in data:
            first = first or time.perf_counter() - started
            events += data.count(b"data: ")
    writer.close()
    if not events:
        raise SystemExit(f"no event came back: {data!r}")
    return first, events


async def http_figures(options: argparse.Namespace, port: int) -> Figures:
    """The same through the server on `port`."""

    def body(name: str, tokens: int) -> dict[str, object]:
        # token ids, because a random model's tokens may have no text, and an event without news isn't sent
        fixed = {"model": "bench", "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
        return fixed | {"prompt": PROMPT + name, "max_tokens": tokens}

    async def rate(attempt: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(http_one(port, body(f"r{attempt}-{i}", options.tokens)) for i in range(options.streams)))
        return options.streams * options.tokens / (time.perf_counter() - started)

    await http_one(port, body("warm", 8))
    firsts = [(await http_one(port, body(f"t{i}", 8)))[0] for i in range(options.singles)]
    rates = [await rate(attempt) for attempt in range(options.repeat)]
    return Figures(statistics.median(rates), 1000 * statistics.median(firsts))


def serve(options: argparse.Namespace, folder: str) -> tuple[subprocess.Popen[str], int, float]:
    """Start `kvasir serve`; returns it, its port and the seconds until the first token of the first request."""
    started = time.perf_counter()
    flags = [
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--served-model-name",
        "bench",
        "--max-num-seqs",
        str(options.max_num_seqs),
    ]
    flags += ["--num-threads", str(options.threads)] if options.threads else []
    command = [sys.executable, "-m", "kvasir.cluster.cli", "serve", options.model, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    assert process.stdout is not None
    log = ""
    for line in process.stdout:
        log += line
        if found := re.search(r"http://[\w.]+:(\d+)", line):
            port = int(found.group(1))
            break
    else:
        raise SystemExit(f"kvasir serve did not come up:\n{log}")
    threading.Thread(target=process.stdout.read, daemon=True).start()
    body = {"model": "bench", "prompt": PROMPT, "max_tokens": 1, "stream": True}
    asyncio.run(http_one(port, body))
    return process, port, time.perf_counter() - started


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="skald", help="folder, hub id or bundled name (default: skald)")
    parser.add_argument("--streams", type=int, default=32, help="streams at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each stream (default: 128)")
    parser.add_argument(
        "--singles", type=int, default=30, help="single streams for the time to first token (default: 30)"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="times the throughput is measured; the median counts (default: 3)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: its own choice)")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    say("bare engine ...")
    bare = asyncio.run(engine_figures(options))
    say("kvasir serve ...")
    with tempfile.TemporaryDirectory() as folder:
        process, port, start_s = serve(options, folder)
        try:
            http = asyncio.run(http_figures(options, port))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    print(f"{'':24}{'engine':>10}{'http':>10}")
    ratio = http.tokens_per_s / bare.tokens_per_s
    print(f"{f'tok/s, {options.streams} streams':24}{bare.tokens_per_s:10.0f}{http.tokens_per_s:10.0f}   {ratio:.1%}")
    difference = http.ttft_ms - bare.ttft_ms
    print(f"{'first token, 1 stream':24}{bare.ttft_ms:8.1f}ms{http.ttft_ms:8.1f}ms   {difference:+.1f} ms")
    print(f"kvasir serve to first token: {start_s:.1f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"engine": asdict(bare), "http": asdict(http), "start_s": start_s}, file, indent=1)


if __name__ == "__main__":
    main()
