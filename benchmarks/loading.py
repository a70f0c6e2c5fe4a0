"""How fast a model's files become a model that is ready to run, beside what the machine reads and writes at all.

python benchmarks/checkpoint.py 1B /tmp/llama-1b
python benchmarks/loading.py /tmp/llama-1b
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvasir.engine.arch import load_spec
from kvasir.engine.config import EngineConfig
from kvasir.engine.memory import keep_freed_memory, resolve_device, resolve_dtype
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.weights import load_decoder


def timed(action: Callable[[], object], repeat: int) -> tuple[float, float]:
    """(seconds of the first time, median of the others)."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def weights(path: Path) -> list[Path]:
    """The files that hold the weights."""
    kinds = ("*.safetensors", "*.bin")
    return [path] if path.is_file() else [file for kind in kinds for file in path.glob(kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    config = EngineConfig(model=args.model, dtype=args.dtype)
    files = ModelFiles(config)
    device = resolve_device(config)
    dtype = resolve_dtype(config, files.config, device)
    paths = [str(path) for path in weights(files.path)]
    size = sum(Path(path).stat().st_size for path in paths) / 1e9
    spec = load_spec(files.config)
    cat = timed(lambda: subprocess.run(["cat", *paths], check=True, stdout=subprocess.DEVNULL), args.repeat)
    copy = timed(torch.ones(int(size * 1e9), dtype=torch.uint8).clone, args.repeat)
    load = timed(lambda: load_decoder(files.checkpoint(), spec, dtype=dtype, device=device), args.repeat)
    print(
        f"{size:.2f} GB on disk, {dtype} in memory, {torch.get_num_threads()} threads; first run / median of {args.repeat}"
    )
    for what, (first, rest) in (("cat to /dev/null", cat), ("a copy in memory", copy), ("load, ready to run", load)):
        print(f"{what:<20} {first:6.2f} / {rest:5.2f} s   {size / first:6.2f} / {size / rest:6.2f} GB/s")


if __name__ == "__main__":
    main()
