"""Peer fetch: time to the first token with a peer's blocks against computing the prompt; how fast blocks come; where it pays.

python benchmarks/checkpoint.py 125M FOLDER
python benchmarks/peer_fetch.py FOLDER
python benchmarks/peer_fetch.py FOLDER --tokens 1000 --tail 256   # 256 tokens that the peer doesn't have behind them
python benchmarks/peer_fetch.py FOLDER --tokens 1000 --tail 256 --ways tcp --link 100   # by a network of 100 MB/s
python benchmarks/peer_fetch.py FOLDER --tokens 1000 --tail 384 --ways tcp --link 50 --tp 2 --threads 1   # into two ranks
python benchmarks/peer_fetch.py FOLDER --workload system documents chat --tokens 32 64 125 250 500 1000    # and the crossover

Two groups, each in a process of its own, on one machine: one computes a prompt, then the other is asked for the same, with a
tail of its own: once in one piece, once layer by layer, so that the tail is computed on the first layers already.

--workload says what the two prompts have in common. prompt: all but the tail. system: a system prompt of so many tokens,
before questions of their own. documents: the first half of so many tokens, as of two documents the first. chat: the second turn
of a conversation whose first turn, of so many tokens, the peer has answered. Each line ends with what the group would have
chosen by what it had measured until then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from refusals import refuse, refuse_unknown

from kvasir.engine import channels
from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.prices import Prices
from kvasir.engine.request import Peer, Request, SamplingParams

BURST_S = 0.005
"""A slow link makes up for so much that its sender overslept."""
LENGTHS = (250, 500, 1000, 2000, 4000, 8000)
WORKLOADS = ("prompt", "system", "documents", "chat")
QUESTION = 32
"""Tokens of what a user says, where --tail doesn't."""
ANSWER = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths of prompts")
    parser.add_argument("--ways", nargs="+", default=["shm", "tcp", "gloo"], help="transports, as of --kv-transfer")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["prompt"])
    parser.add_argument(
        "--tail", type=int, help=f"tokens of one's own at the end (default: {QUESTION}, with --workload prompt none)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the group that fetches")
    parser.add_argument("--pp", type=int, default=1, help="and its stages")
    parser.add_argument("--threads", type=int, help="of each rank, as of --num-threads")
    parser.add_argument("--link", type=float, help="MB/s that the peer sends by tcp, as a slower network would")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "tcp" not in args.ways:
        refuse(parser, args, "where tcp isn't among --ways", "link")
    if args.serve:
        if args.link:
            slow_down(args.link * 1e6)
        serve(json.loads(args.serve))
        return
    refuse_unknown(parser, args.model)
    for way in args.ways:
        for workload in args.workload:
            tail = args.tail if args.tail is not None else 0 if workload == "prompt" else QUESTION
            measure(args, way, workload, tail)


def asked(
    workload: str, tokens: int, tail: int, draw: random.Random
) -> tuple[list[int], Callable[[list[int]], list[int]]]:
    """(the peer's prompt, its answer -> ours)"""

    def some(count: int) -> list[int]:
        return [draw.randrange(100, 20000) for _ in range(count)]

    common, own = some(tokens // 2 if workload == "documents" else tokens), some(tail)
    if workload == "chat":
        return common, lambda answer: [*common, *answer, *own]
    if workload == "prompt":
        return common, lambda answer: common + own
    second, other = some(tokens - len(common)), some(tokens - len(common))
    return common + second + some(QUESTION), lambda answer: common + other + own


def measure(args: argparse.Namespace, way: str, workload: str, tail: int) -> None:
    """A line per length: medians of the seconds to the first token, and of their ratio; both groups say the same."""
    longest = max(args.tokens) + max(tail, QUESTION) + 2 * ANSWER + 16
    options = {"model": args.model, "dtype": args.dtype, "kv_transfer": way, "max_model_len": longest}
    options |= {"num_threads": args.threads}
    options |= {"skip_tokenizer_init": True, "max_num_seqs": 4, "hf_overrides": {"max_position_embeddings": longest}}
    command = [sys.executable, __file__, args.model, "--serve", json.dumps(options)]
    command += ["--link", str(args.link)] if args.link else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address, secret = json.loads(process.stdout.readline())
        ranks = {"tensor_parallel_size": args.tp, "pipeline_parallel_size": args.pp}
        group = Group({**options, **ranks})
        for tokens in args.tokens:
            timed = []
            for seed in range(args.repeat):
                theirs, ours = asked(workload, tokens, tail, random.Random(1000 * tokens + seed))
                print(json.dumps(theirs), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline())["tokens"]
                prompt = ours(answer)
                pairs = zip([*theirs, *answer], prompt, strict=False)
                common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                there = Peer(address, secret, common, ordered=True)
                order = [False, True] if seed % 2 else [True, False]
                warm = {layered: group.ask(prompt, there, layered=layered, forget=True) for layered in order}
                cold = group.ask(prompt, forget=True)
                if any(one["tokens"] != cold["tokens"] for one in warm.values()):
                    print(f"seed {seed}, {tokens} tokens: the answers differ")
                timed.append((cold["first"], warm[False]["first"], warm[True]["first"], warm[False]["cached"]))
            computed, whole, layers, cached = (statistics.median(each) for each in zip(*timed, strict=True))
            size = cached * group.engine.info.block_bytes / group.engine.info.block_size / 1e6
            times = f"computed {computed:7.3f} s, fetched {whole:7.3f} s ({size:6.1f} MB): {computed / whole:6.1f} x"
            if tail:
                times += f"; layer by layer {layers:7.3f} s, {group.begun} began before all was there"
            chosen = "fetches" if group.engine._prices.pays(address, common) else "computes"
            print(f"{way:>4} {workload:>9} {tokens:>6} tokens: {times}; {chosen}", flush=True)
        time.sleep(0.3)  # figures are published every 50 ms
        stats = group.engine.stats()
        speed = stats.fetch_bytes_per_s / 1e6
        print(f"{way:>4}: {stats.peer_failed} blocks were asked for and didn't come in time")
        if tail:
            ways = group.engine._prices._ways
            chosen = "layer by layer" if Prices.layers_pay(group.engine._prices) else "in one piece"
            print(f"{way:>4}: over what was expected {ways[False].ratio:.2f}, {ways[True].ratio:.2f}; now {chosen}")
        print(f"{way:>4}: {1000 * stats.fetch_floor_s:.1f} ms before the first byte, then {speed:.0f} MB/s", flush=True)
        group.engine.shutdown()
        process.stdin.close()


class Group:
    """An engine and its events."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._events: queue.SimpleQueue[tuple[float, Sequence[Event]]] = queue.SimpleQueue()
        config = EngineConfig(**options)
        self.engine = Engine(config, lambda events: self._events.put((time.perf_counter(), events)))
        self.address = self.engine.serve_blocks("127.0.0.1")
        self.engine.start()
        self._asked = self.begun = 0
        """Fetches on whose first layers a step began."""
        assert self.engine._exchange is not None
        arrivals = self.engine._exchange.arrivals
        begin = arrivals.begin

        def noted(*landing: Any) -> None:
            self.begun += 1
            begin(*landing)

        arrivals.begin = noted  # type: ignore[method-assign]

    def ask(self, prompt: Sequence[int], *peers: Peer, layered: bool = True, forget: bool = False) -> dict[str, Any]:
        """{"first": seconds to the first token, "tokens": the answer, "cached": tokens that weren't computed}"""
        self._asked += 1
        assert self.engine._pulls is not None
        self.engine._pulls._prices.layers_pay = lambda: layered  # type: ignore[method-assign]
        if forget:
            self.engine.pool.reset()
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
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
                    return {"first": first, "tokens": tokens, "cached": event.cached_tokens}


def slow_down(bytes_per_s: float) -> None:
    """This process sends pieces of blocks no faster."""
    send, lock = channels.send_all, threading.Lock()
    free_at = 0.0

    def paced(connection: socket.socket, pieces: list[memoryview]) -> None:
        nonlocal free_at
        size = sum(map(len, pieces))
        send(connection, pieces)
        with lock:
            free_at = max(free_at, time.monotonic() - BURST_S) + size / bytes_per_s
            left = free_at - time.monotonic()
        time.sleep(max(0.0, left))

    channels.send_all = paced


def serve(options: dict[str, Any]) -> None:
    """Compute each prompt that comes in a line."""
    group = Group(options)
    print(json.dumps(group.address), flush=True)
    for line in sys.stdin:
        print(json.dumps(group.ask(json.loads(line))), flush=True)
    group.engine.shutdown()


if __name__ == "__main__":
    main()
