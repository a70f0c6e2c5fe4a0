"""One op, several implementations: the decorated function is the definition, the others must equal it."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from kvasir.kernels.native import library, native

P = ParamSpec("P")
R = TypeVar("R")

FORCED = os.environ.get("KVASIR_KERNELS", "")
"""`reference` makes every op run its definition, to find out whether a faster equal is to blame; `torch` does without
compiled code; empty: by device."""
BACKENDS = {"cpu": ("native", "cpu"), "cuda": ("triton",)}
"""The best first. `native` is compiled on first use, and looks for itself whether it can be had; `triton` comes with the builds
of torch for GPUs (their type of device is `cuda`, AMD's too)."""


class Op(Generic[P, R]):
    """Calls the implementation for the device of the first argument; without one, the definition itself."""

    def __init__(self, reference: Callable[P, R], backends: tuple[str, ...]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._backends = backends if FORCED != "reference" else ()
        self._loaded: dict[str, Callable[P, R]] = {}

    def backend(self, name: str, device: str) -> Callable[P, R]:
        """This op by this backend alone, on this type of device; auto: by the best, the op itself. ValueError, naming those
        there are, if it can't be had. `plain` is the definition, `torch` what CPUs do without compiled code."""
        if name == "auto":
            return self
        there = self.choices(device)
        if name not in there:
            raise ValueError(f"there is no {name} backend on {device} here, only {', '.join(there)}")
        return self._find({"plain": None, "torch": "cpu"}.get(name, name))

    def choices(self, device: str) -> list[str]:
        """Names of the backends that can be had on a type of device, the one that is taken by itself first."""
        names = {"cpu": "torch"}
        return [*(names.get(b, b) for b in BACKENDS.get(device, ()) if self._usable(b)), "plain"]

    def why(self, device: str) -> str:
        """Why the first of `choices` is taken on this type of device."""
        written = [b for b in BACKENDS.get(device, ()) if b in self._backends]
        found = next((b for b in written if self._usable(b)), None)
        if FORCED:
            return f"KVASIR_KERNELS={FORCED}"
        if not written:
            return "nothing else is written"
        if found == written[0]:
            return "the fastest that is written"
        missing = native().text if written[0] == "native" else "Triton isn't installed"
        return f"no {written[0]} kernels: {missing}"

    def implementation(self, device: str) -> Callable[P, R]:
        """What runs on this type of device. The sibling module (`attention_cpu`...) is imported on first use."""
        if device not in self._loaded:
            self._loaded[device] = self._find(next((b for b in BACKENDS.get(device, ()) if self._usable(b)), None))
        return self._loaded[device]

    def _usable(self, backend: str) -> bool:
        if backend not in self._backends:
            return False
        return library() is not None if backend == "native" else not backend.endswith("triton") or has_triton()

    def _find(self, backend: str | None) -> Callable[P, R]:
        if backend is None:
            return self.reference
        module = importlib.import_module(f"{self.reference.__module__}_{backend}")
        return cast("Callable[P, R]", getattr(module, self.reference.__name__))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.implementation(args[0].device.type)(*args, **kwargs)  # type: ignore[attr-defined]


def every_op() -> dict[str, Op[Any, Any]]:
    """All ops of this package by name."""
    here = importlib.resources.files("kvasir.kernels")
    stems = sorted(path.name.removesuffix(".py") for path in here.iterdir() if path.name.endswith(".py"))
    siblings = ("_triton", "_cpu", "_native", "__init__")
    modules = [importlib.import_module(f"kvasir.kernels.{stem}") for stem in stems if not stem.endswith(siblings)]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Op)}
    return dict(sorted(found.items()))


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, and wanted."""
    return not FORCED and importlib.util.find_spec("triton") is not None


def op(*backends: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """`@op("native", "cpu")`: the function is the definition, and the module's sibling `*_cpu` holds a faster equal."""
    return lambda reference: Op(reference, backends)
