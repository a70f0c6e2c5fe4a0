"""The decoder with its paged cache beside a plain eager torch loop with contiguous caches: same weights, same machine.

.venv/bin/python benchmarks/decoder.py --model 1B --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.decoder import Decoder
from kvasir.engine.memory import keep_freed_memory
from kvasir.engine.rope import turning
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.weights import random_decoder
from kvasir.kernels.ragged import Ragged

CPU = torch.device("cpu")
ROPE = Rope(10000.0, dim=64)
BLOCK = 16
STEPS = f"{'ms, p50':>8} {'p99':>8} | {'ours':>8} {'p99':>8}"
"""Heads of the columns that `Speed.said` fills: the plain loop's steps, and ours."""
SHAPES = {
    "1B": {"hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8, "depth": 16},
    "125M": {"hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "depth": 30},
}


def spec_of(model: str) -> Spec:
    """The Llama shapes of random weights that every speed in this repository is measured on."""
    s = dict(SHAPES[model])
    layers = (Layer(ROPE),) * s.pop("depth")
    return Spec(**s, vocab=32000, head_dim=64, eps=1e-5, max_len=2048, layers=layers, tied=True)


class Plain:
    """One page of eager torch: separate projections, contiguous caches [S, K, L, D], scaled_dot_product_attention."""

    def __init__(self, spec: Spec, weights: dict[str, Tensor], batch: int, longest: int, dtype: torch.dtype) -> None:
        self.spec, self.w = spec, weights
        shape = (len(spec.layers), batch, spec.kv_heads, longest, spec.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.inv = turning(ROPE).frequencies

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (self.spec.hidden,), self.w[name], self.spec.eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """SDPA as fast as it goes: a decode step's grouped heads as rows of their kv head, else repeated kv heads."""
        s, h, n, d = q.shape
        if n == 1:
            return F.scaled_dot_product_attention(q.view(s, k.shape[1], -1, d), k, v).view(s, h, 1, d)
        k, v = (t.repeat_interleave(h // k.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        """tokens[S, n] from position `start` -> logits[S, V] of the last ones."""
        w, d = self.w, self.spec.head_dim
        s, n = tokens.shape
        angle = torch.cat((torch.arange(start, start + n)[:, None] * self.inv,) * 2, -1)
        cos, sin = angle.cos().to(self.k.dtype), angle.sin().to(self.k.dtype)
        x = F.embedding(tokens, w["embed.weight"])
        for i in range(len(self.spec.layers)):
            p = f"blocks.{i}."
            h = self.norm(x, f"{p}attn_norm.weight")
            q, k, v = (F.linear(h, w[f"{p}attn.{m}.weight"]).view(s, n, -1, d).transpose(1, 2) for m in "qkv")
            self.k[i][:, :, start : start + n] = self.rotate(k, cos, sin)
            self.v[i][:, :, start : start + n] = v
            y = self.attend(self.rotate(q, cos, sin), self.k[i][:, :, : start + n], self.v[i][:, :, : start + n])
            x = x + F.linear(y.transpose(1, 2).reshape(s, n, -1), w[f"{p}attn.o.weight"])
            h = self.norm(x, f"{p}mlp_norm.weight")
            h = F.silu(F.linear(h, w[f"{p}mlp.gate.weight"])) * F.linear(h, w[f"{p}mlp.up.weight"])
            x = x + F.linear(h, w[f"{p}mlp.down.weight"])
        return F.linear(self.norm(x[:, -1], "norm.weight"), w["embed.weight"]).float()


class Paged:
    """The decoder over blocks in random order; prompts go in chunks of at most `budget` rows, several to a step."""

    def __init__(self, decoder: Decoder, batch: int, longest: int, budget: int) -> None:
        self.decoder, self.budget = decoder, budget
        per = -(-longest // BLOCK)
        self.cache = KVCache(decoder.spec, batch * per, BLOCK, decoder.dtype, CPU)
        self.table = torch.randperm(batch * per).view(batch, per).int()

    def ragged(self, parts: list[tuple[int, int, int]]) -> Ragged:
        """For (sequence, start, count) each."""
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in parts])
        table = self.table[[s for s, _, _ in parts]]
        row = torch.repeat_interleave(torch.tensor([count for _, _, count in parts]))
        slots = table[row, positions // BLOCK].long() * BLOCK + positions % BLOCK
        starts = np.cumsum([0] + [count for _, _, count in parts]).astype(np.int32)
        lengths = np.array([start + count for _, start, count in parts], np.int32)
        host = (torch.from_numpy(starts), torch.from_numpy(lengths))
        return Ragged(positions, slots, *host, table, starts, lengths)

    def chunks(self, n: int, batch: int) -> Iterator[list[tuple[int, int, int]]]:
        parts: list[tuple[int, int, int]] = []
        room = self.budget
        for s in range(batch):
            done = 0
            while done < n:
                count = min(room, n - done)
                parts.append((s, done, count))
                done, room = done + count, room - count
                if room == 0:
                    yield parts
                    parts, room = [], self.budget
        if parts:
            yield parts

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        """As Plain: prompts when start is 0, else one token each."""
        batch, n = tokens.shape
        steps = self.chunks(n, batch) if start == 0 else [[(s, start, n) for s in range(batch)]]
        logits = []
        for parts in steps:
            ragged = self.ragged(parts)
            ends = [i for i, (_, first, count) in enumerate(parts) if first + count == start + n]
            rows = ragged.starts[1:].long()[ends] - 1
            flat = torch.cat([tokens[s, first - start : first - start + count] for s, first, count in parts])
            logits.append(self.decoder(flat, ragged, self.cache, rows))
        return torch.cat(logits)


@dataclass
class Speed:
    """Tokens per second, and how long each decoding step took in seconds."""

    prefill: float
    decode: float
    steps: Sequence[float]

    def late(self) -> tuple[float, float]:
        """Median and 99th percentile of a step in seconds."""
        times = sorted(self.steps)
        return statistics.median(times), times[int(0.99 * (len(times) - 1))]

    def said(self) -> str:
        """The same in ms."""
        return " ".join(f"{seconds * 1e3:8.1f}" for seconds in self.late())


def fastest(runs: Sequence[tuple[Speed, list[int]]]) -> tuple[Speed, list[int]]:
    """The fastest of several runs, the steps of all, and the ids of the first."""
    speeds = [speed for speed, _ in runs]
    steps = [seconds for speed in speeds for seconds in speed.steps]
    return Speed(max(s.prefill for s in speeds), max(s.decode for s in speeds), steps), runs[0][1]


def measure(run: Callable[[Tensor, int], Tensor], batch: int, prompt: int, outputs: int) -> tuple[Speed, list[int]]:
    """Greedy decoding of `batch` random prompts; also the first sequence's ids, to compare."""
    tokens = torch.randint(0, 32000, (batch, prompt), generator=torch.Generator().manual_seed(batch))
    begin = time.perf_counter()
    token = run(tokens, 0).argmax(-1, keepdim=True)
    middle = time.perf_counter()
    ids, ends = [int(token[0])], [middle]
    for i in range(outputs):
        token = run(token, prompt + i).argmax(-1, keepdim=True)
        ids.append(int(token[0]))
        ends.append(time.perf_counter())
    steps = [end - start for start, end in pairwise(ends)]
    return Speed(batch * prompt / (middle - begin), batch * outputs / sum(steps), steps), ids


def best(run: Callable[[Tensor, int], Tensor], batch: int, args: argparse.Namespace) -> tuple[Speed, list[int]]:
    """The faster of --repeat runs (after one on short prompts, to warm up)."""
    measure(run, batch, 16, 1)
    return fastest([measure(run, batch, args.prompt, args.outputs) for _ in range(args.repeat)])


def compare(model: str, args: argparse.Namespace) -> None:
    """Prints one line per batch size."""
    spec, dtype = spec_of(model), getattr(torch, args.dtype)
    unpacked = random_decoder(spec, dtype, CPU, pack=False)
    plain_weights = {name: tensor.clone() for name, tensor in unpacked.places()}
    unpacked.pack()
    for batch in args.batch:
        longest = args.prompt + args.outputs + 1
        a, ids_a = best(Plain(spec, plain_weights, batch, longest, dtype), batch, args)
        b, ids_b = best(Paged(unpacked, batch, longest, args.budget), batch, args)
        same = next((i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=True)) if x != y), len(ids_a))
        print(
            f"{model:>5} {batch:>5} | {a.prefill:9.1f} {b.prefill:9.1f} {b.prefill / a.prefill:6.2f}"
            f" | {a.decode:9.1f} {b.decode:9.1f} {b.decode / a.decode:6.2f} | {a.said()} | {b.said()} | {same}/{len(ids_a)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=list(SHAPES), help="shapes to time")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--outputs", type=int, default=32, help="tokens decoded for each")
    parser.add_argument("--budget", type=int, default=256, help="rows in a step of our prefill")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {args.dtype}, {args.threads} threads; tokens/s; ids: greedy ones until they differ"
    )
    print(
        f"model batch | {'prefill':>9} {'ours':>9} {'ratio':>6} | {'decode':>9} {'ours':>9} {'ratio':>6} | {STEPS} | ids"
    )
    for model in args.model:
        compare(model, args)


if __name__ == "__main__":
    main()
