"""The C++ kernels of this folder as one shared library, compiled by the system's compiler for this CPU on first use.

It is kept in the user's cache folder under a hash of all that shaped it: sources, flags, compiler and CPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvasir.kernels.quantise import Cache, Quantised

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-math-errno", "-w")
TIMEOUT_S = 300
"""Half a minute on an idle core; a machine that is busy loading models takes its time."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers that the sources know types by."""
CACHE_TYPES = TYPES | {torch.int8: 3, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
Types = tuple[type, ...]
SIGNATURES: dict[str, Types] = {
    "use_threads": (P, P, P),
    "attention": (N, P, N, N, P, P, N, P, P, N, N, N, N, N, F, F, N, N, N, P, P, P, N),
    "rms_norm": (N, P, N, N, N, P, F, P, F, F, P, P, N, N, N),
    "allow": (P, N, P, P, N, P, N, N, N),
    "gated": (N, P, P, N, N, N, N),
    "turn_and_write": (N, P, N, P, N, P, N, P, P, P, P, N, N, N, N, N, N, N),
    "run_layers": (P, N, P, P, P, P, N, P, N),
    "sum_between": (P, N, P, P, N),
    "scatter_between": (P, N, P, P, N),
    "gather_between": (P, P, P, N),
    "abort_between": (P,),
    "board_bytes": (N,),
    "post": (P, P, N, N, P, N),
    "take": (P, N, N, P, N),
    "pack_linear": (N, P, P, N, N, N),
    "linear": (N, P, N, P, P, P, N, N, N, N),
}
ANSWERS = (
    "multiplies_pairs", "run_layers", "sum_between", "scatter_between", "gather_between", "board_bytes", "post", "take",
)  # fmt: skip
"""Functions that return a number."""


@dataclass(frozen=True)
class Native:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    text: str


class CacheC(ctypes.Structure):
    """Where keys and values lie (native.h)."""

    _fields_ = (
        ("type", N),
        *((name, P) for name in ("k", "v", "k_scales", "v_scales")),
        *((name, N) for name in ("block", "slot", "head", "scale_block", "scale_slot", "scale_head", "block_size")),
    )


def cache_of(k_cache: Cache, v_cache: Cache | None) -> CacheC | None:
    """None: keys and values aren't laid out alike, or not as the compiled code can read them."""
    k, k_scales = _parts(k_cache)
    v, v_scales = (None, None) if v_cache is None else _parts(v_cache)
    alike = v is None or (v.stride() == k.stride() and v.shape == k.shape and v.dtype == k.dtype)
    if not alike or k.stride(-1) != 1 or k.dtype not in CACHE_TYPES:
        return None
    steps = (0, 0, 0) if k_scales is None else k_scales.stride()
    if v_scales is not None and v_scales.stride() != steps:
        return None
    addresses = (None if t is None else t.data_ptr() for t in (k, v, k_scales, v_scales))
    return CacheC(CACHE_TYPES[k.dtype], *addresses, *k.stride()[:3], *steps, k.shape[1])


def _parts(cache: Cache) -> tuple[Tensor, Tensor | None]:
    return (cache.values, cache.scales) if isinstance(cache, Quantised) else (cache, None)


class NativeError(Exception):
    """Why the library can't be had."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they can't be had: then everything runs in torch."""
    return native().library


@functools.cache
def native() -> Native:
    """Found or compiled once per process; the reason for doing without is logged once."""
    if forced := os.environ.get("KVASIR_KERNELS"):
        return Native(None, f"not used: KVASIR_KERNELS={forced}")
    try:
        path, text = _compiled()
        return Native(_opened(path), text)
    except (NativeError, OSError, subprocess.SubprocessError, AttributeError) as error:
        logger.warning("CPU kernels run in torch, which is slower: %s", error)
        return Native(None, f"{error}; kernels run in torch, which is slower")


def multiplies_pairs() -> bool:
    """Whether the CPU multiplies pairs of bfloat16 and adds them up in float32, and the library makes use of it."""
    compiled = library()
    return compiled is not None and bool(compiled.multiplies_pairs())


def compiler() -> str | None:
    """The system's."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def command(program: str, target: Path, *flags: str) -> list[str]:
    """The call that compiles everything into `target`."""
    # Apple's clang for ARM knows -mcpu alone
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [program, *FLAGS, tune, *flags, *map(str, sources()), "-o", str(target)]


def _compiled() -> tuple[Path, str]:
    """The library's path, and how it came there."""
    program = compiler()
    if program is None:
        raise NativeError("there is no C++ compiler (c++, g++ or clang++; on Debian: apt-get install g++)")
    folder = _folder()
    target = folder / f"kernels-{_key(program)}.so"
    if target.exists():
        return target, f"{target}, compiled before"
    with _alone(folder):
        if target.exists():
            return target, f"{target}, compiled by another process"
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            run = subprocess.run(command(program, made), capture_output=True, text=True, timeout=TIMEOUT_S)
            if run.returncode:
                raise NativeError(f"{program} failed: {run.stderr.strip()[:500]}")
            made.replace(target)
    seconds = time.perf_counter() - begin
    logger.info("compiled the CPU kernels in %.1f s: %s", seconds, target)
    return target, f"{target}, compiled in {seconds:.1f} s"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of ranks that start at once one compiles; on file systems without locks all do, and each ends with a whole file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _folder() -> Path:
    """Where compiled code is kept: the user's own folder, closed to others."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvasir"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(program: str) -> str:
    """A hash of everything that the compiled code depends on."""
    digest = hashlib.blake2b(digest_size=12)
    version = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_S).stdout
    for part in (*_texts(), " ".join(command(program, Path("-"))).encode(), version, _cpu()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _texts() -> Iterator[bytes]:
    for path in (*sources(), *sorted(HERE.glob("*.h"))):
        yield path.read_bytes()


def _cpu() -> bytes:
    """What -march=native goes by: the model and the instructions that the system lets us use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().split(b"\n\n")[0].splitlines() if info.exists() else []
    kept = (b"model name", b"flags", b"Features", b"CPU implementer", b"CPU part", b"model\t", b"stepping")
    return b"\n".join(
        [platform.machine().encode(), platform.processor().encode(), *(x for x in lines if x.startswith(kept))]
    )


def _opened(path: Path) -> ctypes.CDLL:
    """The library with its signatures, on the threads of torch's own OpenMP library."""
    found = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    for name in ANSWERS:
        getattr(found, name).restype = N
    openmp = ctypes.CDLL(torch._C.__file__)  # looks through all that torch was linked with
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if not all(hasattr(openmp, name) for name in names):
        raise NativeError("torch has no OpenMP library here whose threads could be shared")
    found.use_threads(*(ctypes.cast(getattr(openmp, name), P) for name in names))
    return found
