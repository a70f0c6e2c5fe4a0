"""`kvasir doctor`: what this machine can do, and what is wrong with it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from kvasir.cluster.options import options
from kvasir.engine.hub import bundled_models

State = Literal["ok", "note", "wrong"]
PACKAGES = ("torch", "ray", "grpcio", "transformers", "tokenizers", "safetensors", "opentelemetry-sdk", "triton")
MARKS = {"ok": "ok  ", "note": "note", "wrong": "BAD "}
MIN_SHM_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and, when something is wrong, what to do."""

    state: State
    about: str
    text: str


def doctor(*, as_json: bool, cluster: str | None = None) -> int:
    """Print all findings; 1 when something is wrong. `cluster`: look at the links of the Ray cluster at this address, too."""
    findings = [finding for look in LOOKS for finding in look()]
    if cluster is not None:
        from kvasir.cluster.doctor_cluster import look as look_at_cluster

        findings += look_at_cluster(cluster)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{MARKS[finding.state]} {finding.about:10} {finding.text}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    if not as_json:
        print(f"{wrong} thing(s) to mend" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _python() -> Iterator[Finding]:
    good = (3, 10) <= sys.version_info < (3, 14)
    advice = "" if good else "; Kvasir is tested on 3.10 to 3.13"
    yield Finding("ok" if good else "note", "python", f"{platform.python_version()} on {platform.platform()}{advice}")
    for name in PACKAGES:
        try:
            yield Finding("ok", "package", f"{name} {version(name)}")
        except PackageNotFoundError:
            missing: State = "note" if name == "triton" else "wrong"
            advice = "needed on GPUs only" if name == "triton" else f"pip install {name}"
            yield Finding(missing, "package", f"{name} is not installed ({advice})")


def _cpu() -> Iterator[Finding]:
    import torch

    from kvasir.engine.memory import available_ram, computes_well

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    isa = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "cpu", f"{cores} core(s), {isa}, torch uses {torch.get_num_threads()} thread(s)")
    fast = computes_well(torch.bfloat16, torch.device("cpu"))
    text = "as fast as float32, or faster" if fast else "slow on this CPU: --dtype auto takes float32"
    yield Finding("ok" if fast else "note", "bfloat16", text)
    yield from _kernels()
    yield from _huge_pages()
    yield from _threads()
    yield Finding("ok", "speed", _speed())
    ram = available_ram()
    low = ram < 2 * 2**30
    yield Finding(
        "wrong" if low else "ok", "memory", f"{ram / 2**30:.1f} GiB free" + ("; close something" if low else "")
    )


def _kernels() -> Iterator[Finding]:
    """Compiled here, if they weren't before."""
    from kvasir.engine.memory import compiled_kernels

    there, text = compiled_kernels()
    yield Finding("ok" if there else "note", "kernels", text)
    from kvasir.engine.memory import kernel_backends

    alike: dict[tuple[str, str, str], list[str]] = {}
    for taken in kernel_backends():
        alike.setdefault((taken.device, taken.backend, taken.why), []).append(taken.op)
        if taken.op == "attention":
            text = f"auto (which is {taken.backend}), {', '.join(taken.choices)}"
            yield Finding("ok", "backend", f"{taken.device}: --attention-backend {text}")
    for (device, backend, why), names in alike.items():
        yield Finding("ok", "backend", f"{device}: {', '.join(names)}: {backend} ({why})")


def _huge_pages() -> Iterator[Finding]:
    from kvasir.engine.memory import huge_pages

    setting = huge_pages()
    if setting in ("always", "madvise"):
        yield Finding("ok", "huge pages", f"{setting}: packed weights and the KV cache lie in them")
    elif setting:
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled makes reading weights faster"
        yield Finding("note", "huge pages", f"{setting}; as root, {advice}")


def _threads() -> Iterator[Finding]:
    from kvasir.engine.cores import binding, usable_cores
    from kvasir.engine.memory import allocator

    cores = usable_cores()
    text = f"ranks of one machine share its {cores} usable core(s) evenly, unless --num-threads says otherwise"
    if bound := binding():  # OpenMP binds the first thread when it is loaded, and processes inherit that
        text = f"{bound} leaves {cores} core(s) to this process and those it starts; unset it, or set --num-threads"
    yield Finding("note" if bound else "ok", "threads", text)
    yield Finding("ok", "allocator", allocator())


def _speed() -> str:
    from kvasir.engine.memory import linear_speed

    read, multiplied = linear_speed()
    return f"bfloat16 linear: {read / 1e9:.0f} GB/s for one row, {multiplied / 1e12:.2f} TFLOP/s for 256"


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("note", "gpu", "torch finds none: models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding("ok", "gpu", f"{index}: {facts.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if (count := torch.cuda.device_count()) > 1:
        from kvasir.engine.symmetric import border

        yield Finding("ok", "sums", f"over {count} GPUs: {border(count)}")


def _machine() -> Iterator[Finding]:
    for name in ("port", "grpc_port"):
        port = int(options()[name].default)
        taken = _taken(port)
        advice = f"taken; use {options()[name].flag} 0 for a free one" if taken else "free"
        yield Finding("note" if taken else "ok", "port", f"{port} is {advice}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        small = free < MIN_SHM_BYTES
        advice = "; Ray needs more (docker run --shm-size=1g)" if small else ""
        yield Finding("wrong" if small else "ok", "/dev/shm", f"{free / 2**20:.0f} MiB free{advice}")
    for variable in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "OTEL_EXPORTER_OTLP_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"):
        if value := os.environ.get(variable):
            yield Finding("note", "set", f"{variable}={value}")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _models() -> Iterator[Finding]:
    names = bundled_models()
    state: State = "ok" if "skald" in names else "wrong"
    found = ", ".join(names) or "none"
    yield Finding(
        state, "models", f"bundled: {found}" + ("" if state == "ok" else "; reinstall Kvasir, skald is missing")
    )


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _cpu, _gpu, _machine, _models)
