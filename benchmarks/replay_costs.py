"""What a step of an engine takes, and what a decision of the router takes."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from array import array

from replay_report import percentile

from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.router import Router
from kvasir.cluster.simulated_group import Shape, StepTime
from kvasir.engine.block_ids import loading
from kvasir.engine.blocks import chain_start, content_ids, token_bytes
from kvasir.engine.request import Request, SamplingParams
from kvasir.engine.scheduler import Stats


def fit(model: str, threads: int | None = None) -> StepTime:
    """Least squares over what `engine.py` measures of prompts of several lengths, then streams, few and many, short and long."""
    import numpy as np

    from engine import Bench  # the script beside this one
    from kvasir.engine.config import EngineConfig

    bench = Bench(EngineConfig(model=model, enable_prefix_caching=False, num_threads=threads))
    engine = bench.engine
    rows, seconds = [], []
    longest = min(1024, engine.info.max_model_len // 2)
    for streams, length, output in itertools.product((1, 4, 16), (16, longest // 4, longest), (2, 34)):
        draw, before = random.Random(streams * length), engine.stats().steps
        prompts = [[draw.randrange(engine.info.vocab_size) for _ in range(length)] for _ in range(streams)]
        began = time.perf_counter()
        bench.run(prompts, output - 1)
        seconds.append(time.perf_counter() - began)
        while engine.stats().running:
            time.sleep(0.01)
        decoded = streams * (output - 1)
        rows.append([engine.stats().steps - before, streams * length, decoded, decoded * (length + output / 2)])
    engine.shutdown()
    weights = 1 / np.array(seconds)  # relative errors count, so that short measurements aren't drowned
    found = _not_negative(np.array(rows, float) * weights[:, None], np.ones(len(seconds)))
    return StepTime(base_s=found[0], prefill_s=found[1], stream_s=found[2], context_s=found[3])


def _not_negative(rows: "np.ndarray", wanted: "np.ndarray") -> list[float]:  # type: ignore[name-defined]  # noqa: F821, UP037
    """Least squares; a term that would be negative is left out."""
    import numpy as np

    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all():
            return [float(found[kept.index(term)]) if term in kept else 0.0 for term in range(rows.shape[1])]
        kept.pop(int(found.argmin()))


def route_times(groups: int, tokens: int) -> str:
    """Microseconds of the processor for a decision over `groups` groups and prompts of `tokens` tokens."""
    draw, router, shape = random.Random(0), Router(draw=random.Random(0)), Shape(token_bytes=0.33e6)
    common = [draw.randrange(2**17) for _ in range(tokens // 4)]
    prompts = [common + [draw.randrange(2**17) for _ in range(tokens - len(common))] for _ in range(400)]
    start = chain_start(shape.info.salt, "", None, False)
    members = [router.join(f"g{number}", (f"host:{number}", "secret")) for number in range(groups)]
    for number, member in enumerate(members):
        member.welcome(shape.info, str(number))
        journal = BlockJournal(str(number))
        for prompt in draw.sample(prompts, 20):
            held = prompt[: draw.randrange(len(common), tokens)]
            journal.take("device", dict.fromkeys(content_ids(start, token_bytes(held), shape.block_size), True))
        for message in (*journal.flush(), *journal.snapshot()):
            member.blocks(message)
        load_ = draw.randrange(4000)
        member.report(Stats(running=20, queued_prefill_tokens=load_, prefills=2, free_blocks=9999), 0, 0.0)
    loading().result()
    lines = []
    for label in ("prompts that are new here", "prompts whose tokens were seen before"):
        took = []
        for prompt in prompts:
            fresh = array("I", prompt).tolist()  # as a tokeniser has just made them: not out of the processor's cache
            asked = Request(request_id="r", prompt_token_ids=fresh, sampling=SamplingParams())
            began = time.thread_time()
            route = router.place(asked, members, 0.0)
            took.append(time.thread_time() - began)
            route.reservation.settle()
        lines.append(
            f"{label}: median {statistics.median(took) * 1e6:.0f} us, p99 {percentile(took, 0.99) * 1e6:.0f} us"
        )
    return "\n".join([*lines, _event_rate(router, members[0].group)])


def _event_rate(router: Router, group: int) -> str:
    draw, count = random.Random(1), 400_000
    keys = [draw.getrandbits(64) for _ in range(count)]
    began = time.process_time()
    for at in range(0, count, 500):
        router.directory.change(group, "device", keys[at : at + 500], keys[max(0, at - 50_000) : max(0, at - 49_500)])
    return (
        f"the directory takes in {count * 1.75 / (time.process_time() - began):,.0f} stored and evicted blocks a second"
    )
