"""What grammars cost: time per token of many streams, with them and without.

    .venv/bin/python benchmarks/constrained.py --model skald --threads 2
    .venv/bin/python benchmarks/checkpoint.py 125M /tmp/llama-125m
    .venv/bin/python benchmarks/constrained.py --model /tmp/llama-125m --repeat 3

Runs take turns in one process, so that the machine's moods hit all alike. A token's time is the mean of the middle half of
the steps in which all stream: one forward that another process delayed is more than what a grammar costs. "gap" is the time
between two steps in which the rank executes nothing, "of free" what each turn says by its own free run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

from engine import Bench, prompts_of  # a script beside this one
from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Failed, Finished, Token
from kvasir.engine.executor import LocalExecutor
from kvasir.engine.outcome import Outcome
from kvasir.engine.request import Request, SamplingParams, StructuredOutput
from kvasir.engine.step import Step

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 5}, "age": {"type": "integer"},
                   "mails": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "age", "mails"], "additionalProperties": False,
}  # fmt: skip
SCHEMA = {"type": "array", "minItems": 50, "items": PERSON}
KINDS: dict[str, StructuredOutput | None] = {
    "free": None,
    "schema": StructuredOutput(json=json.dumps(SCHEMA)),
    "regex": StructuredOutput(regex="([a-z]+ )*"),
}


@dataclass
class Gaps:
    """When the rank had nothing to do between two steps."""

    seconds: list[float] = field(default_factory=list)
    ended: float = 0.0

    def watch(self, executor: LocalExecutor) -> None:
        launch = executor.rank.launch

        def launched(step: Step) -> Outcome:
            self.seconds.append(time.perf_counter() - self.ended)
            outcome = launch(step)
            self.ended = time.perf_counter()
            return outcome

        executor.rank.launch = launched  # type: ignore[method-assign]


def run(bench: Bench, name: str, kind: str, streams: int, outputs: int, temperature: float = 0.0) -> float:
    """Seconds per token of each stream, while all stream."""
    for number, prompt in enumerate(prompts_of(streams, 16, bench.engine.info.vocab_size)):
        sampling = SamplingParams(
            temperature=temperature, seed=number, max_tokens=outputs, ignore_eos=True, structured_outputs=KINDS[kind]
        )
        bench.engine.submit(Request(request_id=f"{name}/{number}", prompt_token_ids=prompt, sampling=sampling))
    delivered: list[float] = []
    begun: set[str] = set()
    ended = 0
    while ended < streams:
        at, events = bench.events.get()
        for event in events:
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            ended += isinstance(event, Finished)
            if isinstance(event, Token):
                begun.add(event.request_id)
        if len(begun) == streams and not ended:
            delivered.append(at)
    times = sorted(later - sooner for sooner, later in pairwise(delivered))
    return statistics.fmean(times[len(times) // 4 : -(len(times) // 4) or None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="skald")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=100, help="tokens of each stream")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 every token needs its mask")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    bench = Bench(EngineConfig(model=args.model, num_threads=args.threads, max_num_seqs=args.streams))
    executor = bench.engine._executor
    assert isinstance(executor, LocalExecutor)
    gaps = Gaps()
    gaps.watch(executor)
    found: dict[str, list[float]] = {}
    between: dict[str, list[float]] = {}
    for turn in range(args.repeat + 1):  # the first compiles, and is left out
        for kind in KINDS:
            gaps.seconds.clear()
            seconds = run(bench, f"{turn}/{kind}", kind, args.streams, args.outputs, args.temperature)
            if turn:
                found.setdefault(kind, []).append(seconds)
                between.setdefault(kind, []).append(statistics.median(gaps.seconds))
    named = f"{args.model}, {args.streams} streams, temperature {args.temperature:g}, {args.threads} threads"
    print(f"{named}, medians of {args.repeat} runs")
    print(f"{'':8}{'ms/token':>10}{'gap, us':>10}{'of free':>9}{'lowest':>9}{'highest':>9}")
    for kind in KINDS:
        seconds, gap = statistics.median(found[kind]), statistics.median(between[kind])
        ratios = [held / free for held, free in zip(found[kind], found["free"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"{kind:8}{seconds * 1e3:10.3f}{gap * 1e6:10.0f}{ratio:9.3f}{min(ratios):9.3f}{max(ratios):9.3f}")
    bench.engine.shutdown()


if __name__ == "__main__":
    main()
