"""What a KV cache in 8 bits costs in accuracy: with one scale for each token and head, and with one for all (1.0, or fitted).

    .venv/bin/python benchmarks/kv_dtypes.py                 rows of random numbers, and log probabilities of skald
    .venv/bin/python benchmarks/kv_dtypes.py --model FOLDER --text FILE

Rows: root mean square of the change, in standard deviations. Log probabilities: mean and largest difference from the float32
cache over the tokens of a text, and how many of them stay the likeliest where they were.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kvasir.engine.llm import LLM
from kvasir.engine.request import SamplingParams
from kvasir.kernels.quantise import LARGEST, quantise

TEXT = """Once upon a time there was a king who had three daughters, and the youngest was so beautiful that the sun itself,
which has seen so much, was astonished whenever it shone in her face. Close by the castle lay a great dark forest, and under
an old lime-tree in the forest was a well, and when the day was very warm, the child went out into the forest and sat down by
the side of the cool fountain."""
KINDS = ("float32", "bfloat16", "float16", "int8", "fp8", "fp8_e5m2")


def fixed(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """x behind one scale for all rows, as checkpoints without calibration are served elsewhere."""
    y = (x / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (y.round() if dtype == torch.int8 else y).to(dtype).float() * scale


def rows() -> None:
    torch.manual_seed(0)
    plain = torch.randn(4096, 64)
    spread = plain * torch.logspace(-4, 4, 4096)[:, None]
    outliers = plain.clone()
    outliers[:, :2] *= 30
    kinds = {"normal": plain, "rows of size 1e-4 to 1e4": spread, "2 of 64 dimensions 30 times larger": outliers}
    print(f"{'rows':36} {'type':14} {'per row':>9} {'1.0':>9} {'fitted':>9}")
    for name, x in kinds.items():
        size = x.square().mean(-1, keepdim=True).sqrt()
        for dtype, largest in LARGEST.items():
            values, scales = quantise(x, dtype)
            found = [
                values.float() * scales[:, None],
                fixed(x, dtype, 1.0),
                fixed(x, dtype, float(x.abs().max()) / largest),
            ]
            off = [float(((y - x) / size).square().mean().sqrt()) for y in found]
            print(f"{name:36} {str(dtype).removeprefix('torch.'):14}" + "".join(f" {o:9.4f}" for o in off))


def log_probabilities(model: str, text: str) -> None:
    found = {}
    for kind in KINDS:
        with LLM(model, dtype="float32", kv_cache_dtype=kind) as llm:
            (output,) = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
            entries = [next(iter(row.values())) for row in output.prompt_logprobs or () if row]
            found[kind] = torch.tensor([[e.logprob, float(e.rank == 1)] for e in entries])
    base = found["float32"]
    print(f"\n{model}, {len(base)} tokens: {'mean':>9} {'largest':>9} {'perplexity':>10} {'same best':>9}")
    for kind, scores in found.items():
        off = (scores - base)[:, 0].abs()
        same = float((scores[:, 1] == base[:, 1]).float().mean())
        print(f"{kind:24} {off.mean():9.5f} {off.max():9.5f} {(-scores[:, 0].mean()).exp():10.4f} {same:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="skald")
    parser.add_argument("--text", type=Path, help="a file instead of the opening of a tale")
    args = parser.parse_args()
    rows()
    log_probabilities(args.model, args.text.read_text() if args.text else TEXT)


if __name__ == "__main__":
    main()
