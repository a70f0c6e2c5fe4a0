"""`kvasir bench engine`: tokens per second of the engine in this process, without HTTP and Ray."""

from __future__ import annotations

import argparse
import json
import queue
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvasir.engine.config import EngineConfig
from kvasir.engine.event import Event, Failed, Finished
from kvasir.engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from kvasir.engine.engine import Engine


def bench_engine(config: EngineConfig, args: argparse.Namespace) -> int:
    """Time batches of several sizes; prints a table."""
    from kvasir.engine.engine import Engine

    events: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
    started = time.perf_counter()
    engine = Engine(config, events.put)
    engine.start()
    print(
        f"{config.model}: {engine.info.dtype} on {engine.info.device},"
        f" ready after {time.perf_counter() - started:.1f} s"
    )
    print(f"{'sequences':>10}{'prefill tok/s':>15}{'decode tok/s':>14}{'first token ms':>16}")
    rows = []
    try:
        for count in args.sequences:
            row = measure(engine, events, count, args.input_len, args.output_len)
            rows.append(row)
            if args.out:  # whoever stops this keeps what was measured
                args.out.write_text(json.dumps({"model": config.model, "rows": rows}, indent=1))
            print(
                f"{count:10}{row['prefill_tok_s']:15.0f}{row['decode_tok_s']:14.1f}{row['ttft_ms']:16.1f}", flush=True
            )
    finally:
        engine.shutdown()
    return 0


def measure(
    engine: Engine, events: queue.SimpleQueue[Sequence[Event]], sequences: int, prompt: int, output: int
) -> dict[str, float]:
    """Prefill: prompt tokens until every sequence has its first token. Decode: tokens after that, until the last."""
    draw = random.Random(sequences)
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    started = time.time()
    for number in range(sequences):
        ids = [draw.randrange(engine.info.vocab_size) for _ in range(prompt)]
        engine.submit(Request(request_id=f"{sequences}-{number}", prompt_token_ids=ids, sampling=sampling))
    ends: list[Finished] = []
    while len(ends) < sequences:
        for event in events.get():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            ends += [event] if isinstance(event, Finished) else []
    first = max(end.timing.first_token for end in ends)
    last = max(end.timing.finished for end in ends)
    # what a sequence generated before the last one had its first token is neither prefill nor full-batch decode
    late = sum((output - 1) * _share_after(first, end.timing.first_token, end.timing.finished) for end in ends)
    return {
        "sequences": sequences,
        "prefill_tok_s": sequences * prompt / max(first - started, 1e-9),
        "decode_tok_s": late / max(last - first, 1e-9) if output > 1 else 0.0,
        "ttft_ms": 1000 * sum(end.timing.first_token - started for end in ends) / sequences,
    }


def _share_after(moment: float, start: float, end: float) -> float:
    """How much of the time from start to end lies behind `moment`."""
    return min(1.0, (end - moment) / max(end - start, 1e-9))
