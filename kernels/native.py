"""The C++ kernels of this folder as one shared library, compiled for this CPU on first use."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvasir.kernels.compiled import NativeError, compiled
from kvasir.kernels.quantise import Cache, Quantised

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
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
    "bar": (P, N, P, P, N, N, N, N),
    "best_allowed": (P, N, P, P, N, P, N, N, N),
    "draw": (P, N, P, P, P, P, P, P, N, N, N),
    "score": (P, N, P, N, P, P, P, P, N, N, N),
    "penalise": (P, N, P, P, P, P, P, P, P, N, N, N),
    "gated": (N, P, P, N, N, N, F, N),
    "turn_and_write": (N, P, N, P, N, P, N, P, P, P, P, N, N, N, N, N, N, N),
    "run_layers": (N, P, N, P, P, P, P, N, P, N),
    "sum_between": (P, N, P, P, N),
    "scatter_between": (P, N, P, P, N),
    "gather_between": (P, P, P, N),
    "abort_between": (P,),
    "board_bytes": (N,),
    "post": (P, P, N, N, P, N),
    "take": (P, N, N, P, N),
    "nudge": (P,),
    "pack_linear": (N, P, P, N, N, N),
    "linear": (N, P, N, P, P, P, N, N, N, N),
    "linear_heads": (N, P, N, N, P, N, P, N, N, N, N, N),
    "route": (P, P, P, P, N, N),
    "run_experts": (P, P, P, P, P, P, P, N, N, N),
    "mixture_bytes": (P, N),
    "run_mixture": (P, P, P, P, N, N),
}
ANSWERS = (
    "multiplies_pairs", "vector_bytes", "run_layers", "sum_between", "scatter_between", "gather_between", "board_bytes", "post",
    "take", "mixture_bytes",
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


def vector_bytes() -> int:
    """Bytes of the registers that the library's vectors are in; 0 without it."""
    compiled = library()
    return int(compiled.vector_bytes()) if compiled is not None else 0


def sources() -> list[Path]:
    """All of this library; each is named for the CPUs it is for."""
    return sorted(HERE.glob("*_cpu.cpp"))


def _compiled() -> tuple[Path, str]:
    return compiled("kernels", sources())


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
