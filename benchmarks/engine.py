"""Speed of the bare engine, in process and without HTTP, beside a plain eager torch loop of the same work in the same run.

    .venv/bin/python benchmarks/engine.py --random 1B 125M --threads 2     prefill and decode against the plain loop
    .venv/bin/python benchmarks/engine.py --model ~/models/Qwen3-0.6B      the same for a real model, without the loop
    .venv/bin/python benchmarks/engine.py --sweep 1B --batch 1 32 --contexts 512 8000    as shares of the machine's ceilings
    .venv/bin/python benchmarks/engine.py --prefix-cache-cost              what the prefix cache costs when nothing hits
    .venv/bin/python benchmarks/engine.py --kv-waste                       share of KV cache slots held but not used
    .venv/bin/python benchmarks/engine.py --startup                        seconds until LLM("skald") can be used

Prefill: prompt tokens over the time until every sequence has its first token. Decode: the tokens after that moment over
the time until all have ended. Ratios above 1 mean that the engine is faster than the loop. A step's time is that between two
deliveries of tokens while all decode: median and 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from decoder import (
    CPU,
    SHAPES,
    STEPS,
    Plain,
    Speed,
    fastest,
    measure,
    spec_of,
)  # the plain loop, a script beside this one
from recorded import recorded
from refusals import refuse, refuse_others
from sweep import RANDOM, sweep

from kvasir.engine.blocks import BlockPool
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.decoder import Decoder
from kvasir.engine.engine import Engine, Loaded
from kvasir.engine.event import Event, Failed, Finished, Token
from kvasir.engine.hub import locate
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Scheduler
from kvasir.engine.step import Result, Step
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.weights import random_decoder

BLOCK = 16
MT_BENCH = "fastchat/llm_judge/data/mt_bench/question.jsonl"
START = "import time; t = time.perf_counter(); from kvasir.engine import LLM; LLM({!r}); print(time.perf_counter() - t)"


class Bench:
    """An engine and the times of its deliveries."""

    def __init__(self, config: EngineConfig, loaded: Loaded | None = None) -> None:
        self.events: queue.SimpleQueue[tuple[float, Sequence[Event]]] = queue.SimpleQueue()
        self.engine = Engine(config, lambda events: self.events.put((time.perf_counter(), events)), loaded)
        self.engine.start()
        self._runs = 0

    def run(self, prompts: Sequence[Sequence[int]], outputs: int) -> tuple[Speed, list[int]]:
        """Greedy continuation of all prompts at once, nothing cached; also the first one's ids."""
        self.engine.pool.reset()
        self._runs += 1
        sampling = SamplingParams(temperature=0, max_tokens=outputs + 1, ignore_eos=True)
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts):
            name = f"{self._runs}/{number}"
            self.engine.submit(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        arrived: list[tuple[float, str, int]] = []
        ended = 0
        while ended < len(prompts):
            at, events = self.events.get()
            for event in events:
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                ended += isinstance(event, Finished)
                if isinstance(event, Token):
                    arrived += [(at, event.request_id, token) for token in event.token_ids]
        first: dict[str, float] = {}
        for at, name, _ in arrived:
            first.setdefault(name, at)
        middle, end = max(first.values()), arrived[-1][0]
        after = sum(at > middle for at, _, _ in arrived)
        deliveries = sorted({at for at, _, _ in arrived if at >= middle})
        steps = [end - start for start, end in pairwise(deliveries)]
        speed = Speed(sum(map(len, prompts)) / (middle - begin), after / (end - middle), steps)
        return speed, [token for _, name, token in arrived if name.endswith("/0")]


def loaded(decoder: Decoder, name: str, tokens: int) -> Loaded:
    """A decoder with a cache of that many tokens, as `engine.load` would make it."""
    spec, blocks = decoder.spec, -(-tokens // BLOCK)
    info = ModelInfo(name=name, max_model_len=spec.max_len, vocab_size=spec.vocab, num_blocks=blocks, block_size=BLOCK)
    return Loaded(decoder, KVCache(spec, blocks, BLOCK, decoder.dtype, CPU), info)


def prompts_of(batch: int, length: int, vocab: int = 32000) -> list[list[int]]:
    """The prompts that the plain loop's `measure` draws."""
    drawn: list[list[int]] = torch.randint(
        0, vocab, (batch, length), generator=torch.Generator().manual_seed(batch)
    ).tolist()
    return drawn


def best(run: Callable[[], tuple[Speed, list[int]]], repeat: int) -> tuple[Speed, list[int]]:
    """Of several runs."""
    return fastest([run() for _ in range(repeat)])


def compare(model: str, args: argparse.Namespace) -> None:
    """Plain loop and engine over the same random weights and prompts."""
    spec, dtype = spec_of(model), getattr(torch, args.dtype)
    decoder = random_decoder(spec, dtype, CPU, pack=False)
    weights = {name: tensor.clone() for name, tensor in decoder.places()}
    decoder.pack()
    longest = args.prompt + args.outputs + 1
    config = EngineConfig(model=model, max_num_seqs=max(args.batch), max_num_batched_tokens=args.budget)
    bench = Bench(config, loaded(decoder, model, max(args.batch) * (longest + 2 * BLOCK)))
    bench.run(prompts_of(1, 16), 1)
    for batch in args.batch:
        plain = Plain(spec, weights, batch, longest, dtype)
        measure(plain, batch, 16, 1)
        a, ids_a = best(lambda: measure(plain, batch, args.prompt, args.outputs), args.repeat)  # noqa: B023
        b, ids_b = best(lambda: bench.run(prompts_of(batch, args.prompt), args.outputs), args.repeat)  # noqa: B023
        same = next((i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=True)) if x != y), len(ids_a))
        print(
            f"{model:>6} {batch:>5} | {a.prefill:9.1f} {b.prefill:9.1f} {b.prefill / a.prefill:6.2f}"
            f" | {a.decode:9.1f} {b.decode:9.1f} {b.decode / a.decode:6.2f} | {a.said()} | {b.said()} | {same}/{len(ids_a)}",
            flush=True,
        )
    bench.engine.shutdown()


def speeds(args: argparse.Namespace) -> None:
    """The tables of prefill and decode speeds."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.prompt} + {args.outputs} tokens, tok/s")
    if args.model is None:
        print(f"{args.dtype}: plain loop, engine, engine / loop; how many greedy ids are equal")
        print(
            f" model batch | {'prefill':>9} {'engine':>9} {'ratio':>6} | {'decode':>9} {'engine':>9} {'ratio':>6}"
            f" | {STEPS} | ids"
        )
        for model in args.random:
            compare(model, args)
        return
    dtype = args.dtype or "auto"
    facts = {"num_threads": args.threads, "max_num_batched_tokens": args.budget, "dtype": dtype}
    bench = Bench(EngineConfig(model=args.model, **facts))
    vocab = bench.engine.info.vocab_size
    bench.run(prompts_of(1, 16, vocab), 1)
    print(
        f"batch | {'prefill':>9} | {'decode':>9} | {'ms, p50':>8} {'p99':>8}   ({args.model}, {bench.engine.info.dtype})"
    )
    for batch in args.batch:
        speed, _ = best(lambda: bench.run(prompts_of(batch, args.prompt, vocab), args.outputs), args.repeat)  # noqa: B023
        print(f"{batch:5} | {speed.prefill:9.1f} | {speed.decode:9.1f} | {speed.said()}", flush=True)
    bench.engine.shutdown()


def prefix_cache_cost(args: argparse.Namespace) -> None:
    """Time in the scheduler, which is all that differs, as a share of the whole: the wall clock is too coarse for 1 %."""
    model, batch = args.random[-1], max(args.batch)
    decoder = random_decoder(spec_of(model), getattr(torch, args.dtype), CPU)
    shares: dict[bool, list[float]] = {True: [], False: []}
    total = 0.0
    for caching in [True, False] * args.repeat:
        config = EngineConfig(
            model=model, max_num_seqs=batch, max_num_batched_tokens=args.budget, enable_prefix_caching=caching
        )
        bench = Bench(config, loaded(decoder, model, batch * (args.prompt + args.outputs + 2 * BLOCK)))
        clock = Clock()
        clock.watch(bench.engine._scheduler, ("add", "plan", "commit"))
        begin = time.perf_counter()
        bench.run(prompts_of(batch, args.prompt), args.outputs)
        total = time.perf_counter() - begin
        shares[caching].append(clock.spent / total)
        bench.engine.shutdown()
    on, off = statistics.median(shares[True]), statistics.median(shares[False])
    print(f"{model}, {batch} sequences of {args.prompt} + {args.outputs} tokens, {total:.1f} s a run, nothing hits")
    print(f"scheduler's share of the time: {on:.3%} with the prefix cache, {off:.3%} without: it costs {on - off:.3%}")


@dataclass
class Clock:
    """Seconds inside some methods of an object."""

    spent: float = 0.0

    def watch(self, target: object, names: Sequence[str]) -> None:
        for name in names:
            setattr(target, name, self._timed(getattr(target, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - begin

        return timed


@dataclass
class Waste:
    """Slots of held blocks that hold no token, over those that do: sums over all steps."""

    held: int = 0
    used: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)

    def note(self, step: Step) -> None:
        """Follows the seats as a rank does."""
        for seat in step.freed:
            del self.tokens[seat], self.blocks[seat]
        for new in step.new:
            self.tokens[new.seat], self.blocks[new.seat] = len(new.token_ids), 0
        for seat, _, blocks in step.blocks:
            self.blocks[seat] += len(blocks)
        self.held += sum(self.blocks.values()) * BLOCK
        self.used += sum(self.tokens.values())
        for part in step.slices:
            self.tokens[part.seat] += part.sample

    @property
    def share(self) -> float:
        return self.held / self.used - 1


def kv_waste(args: argparse.Namespace) -> None:
    """The scheduler alone decides over blocks: it runs here with a model that answers at once."""
    tokenizer = Tokenizer.load(locate(args.model or "skald"))
    lines = (recorded("prompts-mtbench") / MT_BENCH).read_text().splitlines()
    turns = [json.loads(line)["turns"] for line in lines]
    print(f"MT-Bench, {len(turns)} conversations of two turns, blocks of {BLOCK} tokens")
    for outputs in args.answers:
        waste = Waste()
        prompts = list(conversations(turns, tokenizer, outputs))
        for step in simulate(prompts, outputs):
            waste.note(step)
        mean = sum(map(len, prompts)) / len(prompts)
        print(
            f"answers of {outputs:4} tokens, prompts of {mean:5.0f} on average: wasted / used slots {waste.share:.2%}"
        )


def conversations(turns: Sequence[Sequence[str]], tokenizer: Tokenizer, outputs: int) -> Iterator[list[int]]:
    """First and second prompt of each conversation, the first answer made of some token."""
    for first, second in turns:
        begin = tokenizer.encode(first)
        yield begin
        yield begin + [0] * outputs + tokenizer.encode(second)


def simulate(prompts: Sequence[Sequence[int]], outputs: int) -> Iterator[Step]:
    """The steps of serving all prompts, 32 at once."""
    pool = BlockPool(16384, BLOCK, prefix_caching=False)
    scheduler = Scheduler(block_pool=pool, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=8192)
    sampling = SamplingParams(temperature=0, max_tokens=outputs)
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling), 0.0)
    while (step := scheduler.plan(0.0)) is not None:
        yield step
        scheduler.commit(step, Result(step.id, [0] * sum(part.sample for part in step.slices)), 0.0)


def startup(args: argparse.Namespace) -> None:
    """A new process each time; the first one may have to read files from disk."""
    model = args.model or "skald"
    inside, whole = [], []
    for _ in range(max(3, args.repeat)):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", START.format(model)], check=True, capture_output=True, text=True)
        whole.append(time.perf_counter() - begin)
        inside.append(float(done.stdout))
    print(
        f"from kvasir.engine import LLM; LLM({model!r}): {statistics.median(inside):.2f} s (median of {len(inside)}),"
    )
    print(f"the whole process {statistics.median(whole):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder, hub id or bundled name of a real model")
    model.add_argument("--random", choices=SHAPES, nargs="+", default=["125M"], help="Llama shapes of random weights")
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--sweep",
        nargs="+",
        metavar="MODEL",
        help=f"of every --batch over all --contexts, beside the ceilings: random shapes ({', '.join(RANDOM)}) or real models",
    )
    task.add_argument("--prefix-cache-cost", action="store_true", help="of the last shape of --random, largest --batch")
    task.add_argument("--kv-waste", action="store_true", help="on MT-Bench prompts, by the scheduler without a model")
    task.add_argument("--startup", action="store_true", help="of --model, default skald")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--outputs", type=int, default=32, help="tokens decoded for each")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2000], help="tokens in each prompt of --sweep")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of --sweep")
    parser.add_argument("--json", type=Path, help="where --sweep also writes its figures")
    parser.add_argument("--answers", type=int, nargs="+", default=[128, 256, 512], help="output lengths of --kv-waste")
    parser.add_argument(
        "--budget", type=int, help="tokens in a step (--max-num-batched-tokens); default: 256, on cuda 8192"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; by default bfloat16, or the model's own",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts (costs: the median)")
    args = parser.parse_args()
    if args.startup:
        refuse_others(parser, args, "with --startup", "startup", "model", "repeat")
    elif args.kv_waste:
        refuse_others(parser, args, "with --kv-waste", "kv_waste", "model", "answers")
    else:
        refuse(parser, args, "without --kv-waste", "answers")
    if args.sweep:
        refuse(parser, args, "with --sweep", "prompt", "model", "random")
    else:
        refuse(parser, args, "without --sweep", "contexts", "device", "json")
        args.budget = args.budget or 256
    if args.prefix_cache_cost:
        refuse(parser, args, "with --prefix-cache-cost", "model")
    if not (args.model or args.sweep):
        args.dtype = args.dtype or "bfloat16"
    torch.set_num_threads(args.threads)
    if args.sweep:
        sweep(Bench, prompts_of, args)
        return
    tasks = {"prefix_cache_cost": prefix_cache_cost, "kv_waste": kv_waste, "startup": startup}
    asked = [task for name, task in tasks.items() if getattr(args, name)]
    (asked or [speeds])[0](args)


if __name__ == "__main__":
    main()
