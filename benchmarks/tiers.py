"""Tiers: the second turn of a long conversation after a restart, against computing it; and what writing behind costs.

python benchmarks/checkpoint.py 1B /tmp/llama-1b
python benchmarks/tiers.py /tmp/llama-1b

Every turn runs in a process of its own, which ends without a farewell (kill -9) once its blocks are written.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from refusals import refuse_unknown

from kvasir.engine.config import EngineConfig
from kvasir.engine.engine import Engine
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.step import Moves

ANSWER = 64
"""Tokens of the first answer; the second turn has the first one's prompt and answer, and as many new tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--tokens", type=int, default=4000, help="of the second turn's prompt (default: 4000)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(json.loads(args.turn))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    refuse_unknown(parser, args.model)
    runs = [conversation(args, seed) for seed in range(args.repeat)]
    for name in runs[0]:
        seconds = [run[name]["first"] for run in runs]
        cached = runs[0][name]["cached"]
        listed = ", ".join(f"{each:.3f}" for each in seconds)
        print(f"{name:<30}{statistics.median(seconds):9.3f} s to the first token ({listed}), {cached} tokens cached")
    ratio = statistics.median(
        run["second turn, cold"]["first"] / run["second turn, from disk"]["first"] for run in runs
    )
    aside = statistics.median(run["first turn, written to disk"]["aside"] for run in runs)
    print(f"steps of the first turn spent {1000 * aside:.1f} ms of CPU time on copying blocks aside")
    print(f"second turn after a restart: {ratio:.1f} x faster to its first token than cold")


def conversation(args: argparse.Namespace, seed: int) -> Mapping[str, Mapping[str, Any]]:
    """Two turns, each cold and with a disk; the tokens must be the same."""
    draw = random.Random(seed)
    prompt = [draw.randrange(100, 20000) for _ in range(args.tokens - 2 * ANSWER)]
    more = [draw.randrange(100, 20000) for _ in range(ANSWER)]
    with tempfile.TemporaryDirectory(prefix="kvasir-tiers-") as folder:
        off = {"model": args.model, "dtype": args.dtype, "max_model_len": args.tokens + ANSWER}
        on = {**off, "kv_disk_path": folder}
        found = {
            "first turn, no disk": child(args, off, prompt),
            "first turn, written to disk": child(args, on, prompt),
        }
        second = [*prompt, *found["first turn, no disk"]["tokens"], *more]
        found["second turn, cold"] = child(args, off, second)
        found["second turn, same process"] = child(args, off, prompt, second)
        found["second turn, from disk"] = child(args, on, second)
    names = list(found)
    for one, other in ((0, 1), (2, 3), (3, 4)):
        if found[names[one]]["tokens"] != found[names[other]]["tokens"]:
            print(f"seed {seed}: {names[other]!r} gave other tokens than {names[one]!r}")
    return found


def child(args: argparse.Namespace, options: Mapping[str, Any], *prompts: Sequence[int]) -> Any:
    """What `turn` says in a process of its own."""
    said = json.dumps({"options": options, "prompts": prompts})
    done = subprocess.run([sys.executable, __file__, args.model, "--turn", said], stdout=subprocess.PIPE, text=True)
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"a turn ended with {done.returncode}")
    return json.loads(done.stdout)


def turn(said: Mapping[str, Any]) -> dict[str, Any]:
    """Ask one after the other and time the last; returns when all blocks are written."""
    events: queue.SimpleQueue[tuple[float, Sequence[Event]]] = queue.SimpleQueue()
    engine = Engine(
        EngineConfig(skip_tokenizer_init=True, **said["options"]),
        lambda found: events.put((time.perf_counter(), found)),
    )
    engine.start()
    spent = timed(engine)
    for number, prompt in enumerate(said["prompts"]):
        found = ask(engine, events, str(number), prompt)
    wanted = (len(prompt) + ANSWER - 1) // engine.config.block_size
    limit = time.monotonic() + 30
    while said["options"].get("kv_disk_path") and time.monotonic() < limit:
        stats = engine.stats()
        if stats.disk_stored + stats.disk_loaded >= wanted:
            break
        time.sleep(0.05)
    return {**found, "aside": sum(spent)}


def timed(engine: Engine) -> list[float]:
    """Seconds of CPU time that each step spends on the tiers."""
    spent: list[float] = []
    tiers = engine._tiers
    if tiers is not None:
        apply = tiers.apply

        def measured(moves: Moves) -> None:
            began = time.thread_time()
            apply(moves)
            spent.append(time.thread_time() - began)

        tiers.apply = measured
    return spent


def ask(engine: Engine, events: queue.SimpleQueue[tuple[float, Sequence[Event]]], name: str, prompt: list[int]) -> Any:
    """{"first": seconds to the first token, "tokens": the answer, "cached": how many of the prompt's weren't computed}"""
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    began, first, tokens = time.perf_counter(), 0.0, list[int]()
    engine.submit(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    while True:
        at, found = events.get()
        for event in found:
            if isinstance(event, Token):
                first = first or at - began
                tokens += event.token_ids
            elif isinstance(event, Failed):
                raise SystemExit(event.message)
            elif isinstance(event, Finished):
                return {"first": first, "tokens": tokens, "cached": event.cached_tokens}


if __name__ == "__main__":
    main()
