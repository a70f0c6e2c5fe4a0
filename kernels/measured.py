"""How long the backends of ops took on the GPUs that were measured: backends.json, a new one of which benchmarks/gpu.sh writes."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """On one kind of GPU."""

    date: str
    gpu: str
    torch: str
    triton: str
    us: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Microseconds by op, kind of call (`Op.kind`) and backend, each the geometric mean over the shapes that all of them did."""
    sums: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the largest sum over so many GPUs that was faster through shared memory than over NCCL, as were all smaller."""


def table() -> dict[str, dict[str, object]]:
    """The fields of a `Measured` by the kind of GPU."""
    found: dict[str, dict[str, object]] = json.loads(
        importlib.resources.files("kvasir.kernels").joinpath("backends.json").read_text()
    )
    return found


def save(path: Path, **figures: Mapping[str, Any]) -> None:
    """`us` or `sums` of this GPU into a file that is to become backends.json. What the file, or else the table, says already stays:
    of another GPU, and of this very one what isn't measured anew."""
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else table()
    versions = {"torch": torch.__version__, "triton": version("triton") if importlib.util.find_spec("triton") else "-"}
    here = {"date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(), **versions}
    before = known.get(kind_of_gpu(), {})
    if before.get("gpu") != here["gpu"]:
        before = {}
    known[kind_of_gpu()] = here | {name: before.get(name, {}) | figures.get(name, {}) for name in ("us", "sums")}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def means(figures: Iterable[tuple[str, str, str, str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """What a `Measured` says of (op, kind of call, backend, shape, microseconds)."""
    by: defaultdict[tuple[str, str], defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, kind, backend, shape, us in figures:
        by[name, kind][backend][shape] = us
    found: defaultdict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, kind), backends in by.items():
        if shapes := set.intersection(*map(set, backends.values())):
            found[name][kind] = {
                backend: round(geometric_mean(all_[shape] for shape in shapes), 2) for backend, all_ in backends.items()
            }
    return dict(found)


@functools.cache
def measured() -> Measured | None:
    """On GPUs like this process's."""
    fields = table().get(kind_of_gpu())
    return None if fields is None else Measured(**fields)  # type: ignore[arg-type]


@functools.cache
def kind_of_gpu() -> str:
    """Of this process: its compute capability (sm_90), or AMD's architecture (gfx942); empty: there is none."""
    if not torch.cuda.device_count():
        return ""
    if torch.version.hip:
        architecture: str = torch.cuda.get_device_properties().gcnArchName
        return architecture.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
