"""One op, several implementations: the decorated function is the definition, the others must equal it."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar, cast

from kvasir.kernels.measured import measured
from kvasir.kernels.native import library, native

P = ParamSpec("P")
R = TypeVar("R")

FORCED = os.environ.get("KVASIR_KERNELS", "")
"""`reference` makes every op run its definition, to find out whether a faster equal is to blame; `torch` does without
compiled code; empty: by device."""
BACKENDS = {"cpu": ("native", "cpu"), "cuda": ("triton", "torch")}
"""The default first. `native` is compiled on first use, and looks for itself whether it can be had; `triton` comes with the
builds of torch for GPUs (their type of device is `cuda`, AMD's too). `torch` there is one operator of torch's that does some of
an op's calls: nothing takes it but who asks for it, and `auto` where it was measured to be faster (backends.json). Its sibling
module also says why it can't be had here, `absent()`, and why it can't do a call, `unfit(...)`, both empty where it can."""
KINDS = (("any",), ("few rows", "many rows"))
"""Of calls, for ops that don't know which have few rows and for those that do."""
TOLD = {"cpu": "torch"}
"""Names of backends as users know them, where they are others."""


class Op(Generic[P, R]):
    """Calls the implementation for the device of the first argument; without one, the definition itself."""

    def __init__(
        self, reference: Callable[P, R], backends: tuple[str, ...], few: Callable[..., bool] | None = None
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._backends = backends if FORCED != "reference" else ()
        self._few = few
        self._loaded: dict[str, Callable[P, R]] = {}

    def backend(self, name: str, device: str) -> Callable[P, R]:
        """This op by this backend alone, on this type of device; auto: by the best, the op itself. ValueError, naming those
        there are, if it can't be had. `plain` is the definition, `torch` torch's own operators: what CPUs do without compiled
        code, and on GPUs a function that raises ValueError for a call that it can't do (`obstacle`)."""
        if name == "auto":
            return self
        there = self.choices(device)
        if name not in there:
            reason = f": {self._absent(name)}" if self._own_name(name, device) == "torch" else ""
            raise ValueError(f"there is no {name} backend on {device} here, only {', '.join(there)}{reason}")
        found = self._own_name(name, device)
        return self._checked(found) if found == "torch" else self._find(found)

    def obstacle(self, name: str, device: str, *args: Any, **options: Any) -> str:
        """Why this backend, which is there, can't do such a call, and another does; empty: it can. Tensors may be on meta."""
        found = self._own_name(name, device)
        unfit = None if found is None else getattr(self._sibling(found), "unfit", None)
        return "" if unfit is None else str(unfit(*args, **options))

    def choices(self, device: str) -> list[str]:
        """Names of the backends that can be had on a type of device, the default first."""
        usable = [b for b in BACKENDS.get(device, ()) if self._usable(b)]
        return [*(TOLD.get(b, b) for b in usable if b != "torch"), "plain", *(b for b in usable if b == "torch")]

    def kind(self, *args: Any, **options: Any) -> str:
        """The kind of call of which there is one best backend."""
        return KINDS[0][0] if self._few is None else KINDS[1][not self._few(*args, **options)]

    def fastest(self, device: str) -> dict[str, str]:
        """The backend that was measured to be the fastest of those there are here, by the kind of call."""
        found = measured() if device == "cuda" and not FORCED else None
        times = {} if found is None else found.us.get(self.reference.__name__, {})
        here = [b for b in BACKENDS["cuda"] if self._usable(b)]
        own = {kind: {b: by[b] for b in here if b in by} for kind, by in times.items()}
        return {kind: min(by, key=by.__getitem__) for kind, by in own.items() if by}

    def taken(self, device: str) -> str:
        """What `auto` takes on this type of device."""
        default, best = self.choices(device)[0], self.fastest(device)
        by = {kind: best.get(kind, default) for kind in KINDS[self._few is not None]}
        if len(set(by.values())) == 1:
            return next(iter(by.values()))
        return ", ".join(f"{backend} for {kind}" for kind, backend in by.items())

    def why(self, device: str) -> str:
        """Why that is taken."""
        written = [b for b in BACKENDS.get(device, ()) if b in self._backends]
        found = next((b for b in written if self._usable(b)), None)
        if FORCED:
            return f"KVASIR_KERNELS={FORCED}"
        if not written:
            return "nothing else is written"
        if found != written[0]:
            missing = native().text if written[0] == "native" else "Triton isn't installed"
            return f"no {written[0]} kernels: {missing}"
        return "the fastest that is written" if device == "cpu" else "; ".join(self._measured(device, written))

    def _measured(self, device: str, written: list[str]) -> Iterator[str]:
        """What was measured, and what can be said of the backend that does some calls."""
        found, name = measured(), self.reference.__name__
        if found is None or name not in found.us:
            yield "not measured on this GPU: the default"
        else:
            best = self.fastest(device)
            kinds = [_compared(kind, by, best.get(kind)) for kind, by in found.us[name].items()]
            yield f"measured {found.date} on {found.gpu} with torch {found.torch}, triton {found.triton}: {', '.join(kinds)}"
        if "torch" in written:
            absent = self._absent("torch")
            yield f"torch's can't be had: {absent}" if absent else f"torch's does {self._sibling('torch').LIMITS}"

    def implementation(self, device: str) -> Callable[P, R]:
        """What runs on this type of device. The sibling module (`attention_cpu`...) is imported on first use."""
        if device not in self._loaded:
            default = self._find(next((b for b in BACKENDS.get(device, ()) if b != "torch" and self._usable(b)), None))
            best = self.fastest(device)
            self._loaded[device] = self._either(default, best) if "torch" in best.values() else default
        return self._loaded[device]

    def _either(self, default: Callable[P, R], best: dict[str, str]) -> Callable[P, R]:
        """torch's operator for the kinds of call that it is best for, as far as it can do them."""
        other, unfit = self._find("torch"), self._sibling("torch").unfit

        def run(*args: P.args, **options: P.kwargs) -> R:
            wanted = best.get(self.kind(*args, **options)) == "torch" and not unfit(*args, **options)
            return (other if wanted else default)(*args, **options)

        return run

    def _checked(self, name: str) -> Callable[P, R]:
        """By this backend, or not at all."""
        run, unfit = self._find(name), self._sibling(name).unfit

        def checked(*args: P.args, **options: P.kwargs) -> R:
            if obstacle := unfit(*args, **options):
                raise ValueError(f"{self.reference.__name__} by the {name} backend: {obstacle}")
            return run(*args, **options)

        return checked

    def _usable(self, backend: str) -> bool:
        if backend not in self._backends:
            return False
        if backend == "torch":
            return not self._absent(backend)
        return library() is not None if backend == "native" else not backend.endswith("triton") or has_triton()

    def _absent(self, backend: str) -> str:
        """Why it can't be had here; empty: it can."""
        return str(self._sibling(backend).absent()) if backend in self._backends else "nobody has written it"

    def _own_name(self, told: str, device: str) -> str | None:
        """Of a backend's sibling module; None: the definition has none."""
        return next((b for b in BACKENDS.get(device, ()) if TOLD.get(b, b) == told), None)

    def _sibling(self, backend: str) -> ModuleType:
        return importlib.import_module(f"{self.reference.__module__}_{backend}")

    def _find(self, backend: str | None) -> Callable[P, R]:
        if backend is None:
            return self.reference
        return cast("Callable[P, R]", getattr(self._sibling(backend), self.reference.__name__))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.implementation(args[0].device.type)(*args, **kwargs)  # type: ignore[attr-defined]


def _compared(kind: str, us: Mapping[str, float], best: str | None) -> str:
    """few rows: torch 10.2 us, against 12.1 us (triton)."""
    first, *others = sorted(us, key=lambda name: (name != best, us[name]))
    against = ", ".join(f"{us[name]:.1f} us ({name})" for name in others)
    return f"{kind}: {first} {us[first]:.1f} us".removeprefix("any: ") + (f", against {against}" if against else "")


def every_op() -> dict[str, Op[Any, Any]]:
    """All ops of this package by name."""
    here = importlib.resources.files("kvasir.kernels")
    stems = sorted(path.name.removesuffix(".py") for path in here.iterdir() if path.name.endswith(".py"))
    siblings = ("_triton", "_cpu", "_native", "_torch", "__init__")
    modules = [importlib.import_module(f"kvasir.kernels.{stem}") for stem in stems if not stem.endswith(siblings)]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Op)}
    return dict(sorted(found.items()))


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, and wanted."""
    return not FORCED and importlib.util.find_spec("triton") is not None


def op(*backends: str, few: Callable[..., bool] | None = None) -> Callable[[Callable[P, R]], Op[P, R]]:
    """`@op("native", "cpu")`: the function is the definition, and the module's sibling `*_cpu` holds a faster equal. few: whether
    a call has few rows, which another backend may be best for than for many."""
    return lambda reference: Op(reference, backends, few)
