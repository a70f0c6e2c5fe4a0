"""Peer fetch: time to the first token with a peer's blocks against computing the prompt; how fast blocks come; where it pays.

python benchmarks/checkpoint.py 125M /tmp/llama-125m
python benchmarks/peer_fetch.py /tmp/llama-125m

Two groups, each in a process of its own, on one machine: one has computed the prompts, the other is asked.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.request import Peer, Request, SamplingParams

LENGTHS = (250, 500, 1000, 2000, 4000, 8000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths of prompts")
    parser.add_argument("--ways", nargs="+", default=["shm", "tcp", "gloo"], help="transports, as of --kv-transfer")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(json.loads(args.serve))
        return
    print(f"{'tokens':>7} {'computed':>10}" + "".join(f"{way:>10} {'MB/s':>7}" for way in args.ways))
    found: dict[str, dict[int, float]] = {way: {} for way in args.ways}
    rows: dict[int, str] = {}
    for way in args.ways:
        for tokens, (computed, fetched, megabytes, ratio) in measure(args, way).items():
            rows.setdefault(tokens, f"{tokens:>7} {computed:>8.3f} s")
            rows[tokens] += f"{fetched:>8.3f} s {megabytes / max(fetched, 1e-9):>7.0f}"
            found[way][tokens] = ratio
    print("\n".join(rows.values()))
    for way, ratios in found.items():
        pays = [tokens for tokens, ratio in ratios.items() if ratio > 1]
        best = max(ratios.values())
        print(f"{way}: fetching is faster from {min(pays, default=0)} tokens on; up to {best:.1f} x")


def measure(args: argparse.Namespace, way: str) -> dict[int, tuple[float, float, float, float]]:
    """Tokens -> (median seconds to the first token: computed, fetched; MB that came; median of the ratios)."""
    longest = max(args.tokens) + 16
    options = {"model": args.model, "dtype": args.dtype, "kv_transfer": way, "max_model_len": longest}
    options |= {"skip_tokenizer_init": True, "max_num_seqs": 4, "hf_overrides": {"max_position_embeddings": longest}}
    command = [sys.executable, __file__, args.model, "--serve", json.dumps(options)]
    found = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address, secret = json.loads(process.stdout.readline())
        group = Group(options)
        for tokens in args.tokens:
            timed = []
            for seed in range(args.repeat):
                draw = random.Random(1000 * tokens + seed)
                prompt = [draw.randrange(100, 20000) for _ in range(tokens)]
                print(json.dumps(prompt), file=process.stdin, flush=True)
                wanted = json.loads(process.stdout.readline())
                cold = group.ask(prompt)
                group.forget()
                before = group.engine.stats().peer_bytes
                warm = group.ask(prompt, Peer(address, secret, tokens, ordered=True))
                time.sleep(0.2)  # figures are published every 50 ms
                group.forget()
                if not cold["tokens"] == warm["tokens"] == wanted["tokens"]:
                    print(f"seed {seed}, {tokens} tokens: the answers differ")
                megabytes = (group.engine.stats().peer_bytes - before) / 1e6
                timed.append((cold["first"], warm["first"], megabytes, cold["first"] / warm["first"]))
            found[tokens] = tuple(statistics.median(each) for each in zip(*timed, strict=True))
        stats = group.engine.stats()
        print(f"{way}: floor {1000 * stats.fetch_floor_s:.1f} ms, {stats.fetch_bytes_per_s / 1e6:.0f} MB/s behind it")
        group.engine.shutdown()
        process.stdin.close()
    return found


class Group:
    """An engine and its events."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._events: queue.SimpleQueue[tuple[float, Sequence[Event]]] = queue.SimpleQueue()
        config = EngineConfig(**options)
        self.engine = Engine(config, lambda events: self._events.put((time.perf_counter(), events)))
        self.address = self.engine.serve_blocks("127.0.0.1")
        self.engine.start()
        self._asked = 0

    def ask(self, prompt: Sequence[int], *peers: Peer) -> dict[str, Any]:
        """{"first": seconds to the first token, "tokens": the answer}"""
        self._asked += 1
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        request = Request(request_id=str(self._asked), prompt_token_ids=prompt, sampling=sampling, peers=peers)
        began, first, tokens = time.perf_counter(), 0.0, list[int]()
        self.engine.submit(request)
        while True:
            at, events = self._events.get()
            for event in events:
                if isinstance(event, Token):
                    first = first or at - began
                    tokens += event.token_ids
                elif isinstance(event, Failed):
                    raise SystemExit(event.message)
                elif isinstance(event, Finished):
                    return {"first": first, "tokens": tokens}

    def forget(self) -> None:
        """What was computed is computed again. The engine is idle."""
        self.engine.pool.reset()


def serve(options: dict[str, Any]) -> None:
    """Compute each prompt that comes in a line."""
    group = Group(options)
    print(json.dumps(group.address), flush=True)
    for line in sys.stdin:
        group.forget()
        print(json.dumps(group.ask(json.loads(line))), flush=True)
    group.engine.shutdown()


if __name__ == "__main__":
    main()
