"""CUDA graphs: a decoding step recorded once for each of a few sizes, and replayed without Python between its kernels.

A step of T rows, one for each sequence, takes the next larger size. What fills it up repeats the shortest sequence, row for row:
it writes what is written anyway, and nobody reads its logits. Sizes are captured one by one, while no request waits or after
steps that could have used them: the server answers first. Tensor-parallel ranks do so in the same steps, all of them or none.
Stages do so each for itself: what they hand on to each other isn't recorded, and has as many rows as the step.
"""

from __future__ import annotations

import bisect
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.decoder import Decoder
from kvasir.engine.rows import dealing_wins
from kvasir.engine.share import Share
from kvasir.kernels.attention import attention
from kvasir.kernels.moe import stacked_experts
from kvasir.kernels.ragged import Ragged

if TYPE_CHECKING:
    from kvasir.engine.fallback import Fallback

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Ragged, KVCache, Tensor], Union[Tensor, None]]
Replay = Callable[[], None]
T = TypeVar("T")
MOST_ROWS = 512
"""Beyond this kernels take longer than launching them."""
LEAST_FREE_BYTES = 1 << 30
"""Of the device's memory. With less, no further size is captured."""


class Capture(Protocol):
    """Records what a function launches: (what launches it again, the tensor that its result is in afterwards). `rehearse` only
    runs it, with the memory that it will have."""

    def rehearse(self, run: Callable[[], Tensor]) -> None: ...
    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]: ...


class Stage(Protocol):
    """A `Decoder`, as far as it is used here."""

    share: Share

    def received(self, rows: int) -> Tensor | None: ...
    def part(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor, x: Tensor | None) -> Tensor: ...
    def handed_on(self, x: Tensor) -> Tensor | None: ...


def sizes_of(max_num_seqs: int, most: int | None = None) -> list[int]:
    """1, 2, 4, 8 and on in steps of 8, of 16 from 64 on, of 32 from 256 on; the last is `most` or what is served at once."""
    top = min(max_num_seqs, most or MOST_ROWS)
    found = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, top + 1, 32)]
    return [*(size for size in found if size < top), top]


def graphs_of(config: EngineConfig, decoder: Decoder | Fallback, cache: KVCache, max_model_len: int) -> Forward:
    """The decoder as steps call it: by graphs where they can be had."""
    if config.enforce_eager or decoder.device.type != "cuda":
        return decoder

    obstacle, mesh = unrecordable(decoder), decoder.mesh
    mesh.assemble()  # memory of a tier may have taken one longer than another
    if not mesh.stage_agrees(not obstacle) or not isinstance(decoder, Decoder):
        why = obstacle or "another rank has none"
        logger.info("no CUDA graphs: %s; every kernel of a step is launched by Python", why)
        return decoder
    sizes = sizes_of(config.max_num_seqs, config.max_cudagraph_capture_size)
    if mesh.place.pp > 1:  # a stage without the recording would hand on other rows
        sizes = [size for size in sizes if not dealing_wins(mesh, size, decoder.spec.hidden)]
    longest = min(max_model_len, config.max_seq_len_to_capture or max_model_len)
    device = decoder.device
    free = partial(free_bytes, device)
    return Graphs(decoder, cache, sizes, longest, CudaCapture(device), free, mesh.stage_agrees, mesh.apart)


def unrecordable(decoder: Decoder | Fallback) -> str:
    """Why its steps can't be recorded; empty: they can."""
    device = decoder.device.type
    if not isinstance(decoder, Decoder):
        return "the model runs by transformers' own code"
    chosen = decoder.attention_backend
    if (attention.choices(device)[0] if chosen == "auto" else chosen) == "plain":
        return "attention by its definition waits for the device"
    if decoder.spec.experts is not None and stacked_experts.choices(device)[0] == "plain":
        return "experts that run one by one wait for the device"
    return ""


def free_bytes(device: torch.device) -> int:
    """Of the device, for anybody."""
    return torch.cuda.mem_get_info(device)[0]


class CudaCapture:
    """Records into CUDA graphs that share their memory: one runs at a time.

    Other threads may go on meanwhile. With KVASIR_CHECK_GRAPHS=1, and a torch that can tell, a recording whose inputs are gone
    raises instead of reading what lies there now: for debugging, as every replay then looks at each of them in Python.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        knows = inspect.signature(torch.cuda.graph.__init__).parameters
        asked = os.environ.get("KVASIR_CHECK_GRAPHS", "0") not in ("", "0")
        self._checks = {"check_input_liveness": True} if asked and "check_input_liveness" in knows else {}

    def rehearse(self, run: Callable[[], Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.rehearse(run)  # kernels are compiled and loaded before anything is recorded
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # the threads of tiers and peers allocate and wait while this one records
        recording = torch.cuda.graph(graph, self._pool, self._stream, mode, **self._checks)
        # a recording that fails at its end leaves its stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            found = run()
        return graph.replay, found


@dataclass(frozen=True, eq=False)
class Static:
    """The buffers that one size reads, wherever they lie in memory for ever, and its recording."""

    tokens: Tensor
    rows: Tensor
    """[size] int64: all of them."""
    ragged: Ragged
    x: Tensor | None
    """[size, M] from the stage before."""
    replay: Replay
    found: Tensor
    """[size, V], or [size, M] for the next stage."""


class Graphs:
    """Calls the decoder; where a recording fits, it is replayed. agree: whether it is so on every rank of this stage; apart:
    meanwhile this one computes without the others."""

    def __init__(
        self,
        decoder: Stage,
        cache: KVCache,
        sizes: list[int],
        longest: int,
        capture: Capture,
        free: Callable[[], int],
        agree: Callable[[bool], bool] = bool,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.sizes, self.longest = sizes, longest
        self.captured: dict[int, Static] = {}
        self._decoder, self._cache, self._capture = decoder, cache, capture
        self._free, self._agree, self._apart = free, agree, apart
        self._stopped = False
        self._found: Tensor | None = None
        """[largest size, V] for all sizes, of which one is replayed at a time: for each alone they would take a gigabyte."""
        self._row: tuple[Tensor, Ragged, Tensor | None] | None = None
        """One row of the last step: to compute it again changes nothing as long as nothing else is."""

    def __call__(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor) -> Tensor | None:
        """As the decoder: float32 logits[R, V], here valid until the next call."""
        size, x = self._size(tokens, ragged, cache, rows), self._decoder.received(len(tokens))
        static = None if size is None else self.captured.get(size)
        if size is not None and self._lacks:
            at = shortest(ragged)
            self._row = tokens[at : at + 1], row_of(ragged, at), None if x is None else x[at : at + 1]
        if size is None or static is None:
            found = self._decoder.handed_on(self._decoder.part(tokens, ragged, cache, rows, x))
            if size is not None and not self._stopped:
                self._record(size, tokens, ragged, x)
            return found
        fill(static.tokens, tokens, pad := shortest(ragged))
        fill_ragged(static.ragged, ragged, pad)
        if static.x is not None and x is not None:
            fill(static.x, x, pad)
        static.replay()
        found = static.found[: len(tokens)]
        # on its way to the next stage it isn't to be overwritten by the next step
        return self._decoder.handed_on(found if self._decoder.share.last else found.clone())

    def _size(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor) -> int | None:
        """The size for a step of single rows whose logits are all wanted."""
        count = len(tokens)
        single = len(ragged.host_lengths) == count == len(rows) and ragged.stretched is None and cache is self._cache
        if not single or not 0 < count <= self.sizes[-1] or int(ragged.host_lengths.max()) > self.longest:
            return None
        return self.sizes[bisect.bisect_left(self.sizes, count)]

    @property
    def lacking(self) -> int | None:
        """The smallest size that isn't recorded and can be now."""
        sizes = (size for size in self.sizes if size not in self.captured)
        return next(sizes, None) if self._row is not None and self._lacks else None

    @property
    def _lacks(self) -> bool:
        return not self._stopped and len(self.captured) < len(self.sizes)

    def forget(self) -> None:
        """Blocks change."""
        self._row = None

    def record(self) -> None:
        """What is `lacking`."""
        if (size := self.lacking) is not None and self._row is not None:
            self._record(size, *self._row)

    def _record(self, size: int, tokens: Tensor, ragged: Ragged, x: Tensor | None) -> None:
        """Of the step that has just run: running it again changes nothing."""
        if not self._agree(self._free() >= LEAST_FREE_BYTES):
            self._stop(f"less than {LEAST_FREE_BYTES >> 20} MiB are free on the device")
            return
        ready, why = attempt(lambda: self._rehearsed(size, tokens, ragged, x))
        if not self._agree(ready is not None) or ready is None:
            every = torch.arange(len(tokens), device=tokens.device)
            # the keys and values of those who rehearsed were wrong
            self._decoder.part(tokens, ragged, self._cache, every, x)
            self._stop(why or "another rank has no room for this size")
            return
        run, buffers = ready
        found, why = attempt(lambda: self._capture(run))
        if not self._agree(found is not None) or found is None:
            self._stop(why or "another rank can't record this size")
            return
        self.captured[size] = Static(*buffers, *found)
        logger.info("captured a CUDA graph of %d rows (%d of %d)", size, len(self.captured), len(self.sizes))

    def _rehearsed(
        self, size: int, tokens: Tensor, ragged: Ragged, x: Tensor | None
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor, Ragged, Tensor | None]]:
        """(what is to be recorded, the buffers that it reads: see `Static`). It has run without the other ranks: one that runs out
        of memory in the middle would let them wait for its part of a sum."""
        pad = shortest(ragged)
        tokens_in = tokens.new_zeros(size)
        fill(tokens_in, tokens, pad)
        block_size = self._cache.block_size
        held = static_ragged(ragged, size, self.longest, -(-self.longest // block_size))
        fill_ragged(held, ragged, pad)
        rows = torch.arange(size, device=tokens.device)
        x_in = None
        if x is not None:
            fill(x_in := x.new_empty(size, x.shape[1]), x, pad)

        def run() -> Tensor:
            for part in (held, *held.others):
                part.plans.clear()  # of the step before
            found = self._decoder.part(tokens_in, held, self._cache, rows, x_in)
            if self._found is None:  # nothing is recorded yet
                self._found = found.new_empty(self.sizes[-1], found.shape[1])
            return self._found[:size].copy_(found)

        with self._apart():
            self._capture.rehearse(run)
        return run, (tokens_in, rows, held, x_in)

    def _stop(self, why: str) -> None:
        self._stopped = True
        logger.warning("no further CUDA graphs, after %d: %s", len(self.captured), why)


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """(what it gives, the first line of why it gives nothing): no memory, or something in it waits for the device."""
    try:
        return work(), ""
    except RuntimeError as error:
        return None, f"{error}".split("\n")[0]


def row_of(ragged: Ragged, at: int) -> Ragged:
    """Row `at` of single rows."""
    return Ragged(
        positions=ragged.positions[at : at + 1],
        slots=ragged.slots[at : at + 1],
        starts=ragged.starts[:2],
        lengths=ragged.lengths[at : at + 1],
        table=ragged.table[at : at + 1],
        host_starts=ragged.host_starts[:2],
        host_lengths=ragged.host_lengths[at : at + 1],
        others=tuple(row_of(other, at) for other in ragged.others),
    )


def shortest(ragged: Ragged) -> int:
    """The sequence that costs least to repeat."""
    return int(ragged.host_lengths.argmin())


def fill(buffer: Tensor, given: Tensor, pad: int) -> None:
    """given[T, ...] into the first rows of buffer[size, ...], its row `pad` into the others; what is narrower stays so."""
    count = len(given)
    target = buffer if given.dim() == 1 else buffer[:, : given.shape[1]]
    target[:count].copy_(given)
    if count < len(buffer):
        target[count:].copy_(given[pad : pad + 1].expand(len(buffer) - count, *given.shape[1:]))


def fill_ragged(held: Ragged, ragged: Ragged, pad: int) -> None:
    """A step's rows into the buffers."""
    fill(held.positions, ragged.positions, pad)
    fill(held.lengths, ragged.lengths, pad)
    for own, given in zip((held, *held.others), (ragged, *ragged.others), strict=True):
        fill(own.slots, given.slots, pad)
        fill(own.table, given.table, pad)


def static_ragged(ragged: Ragged, size: int, longest: int, blocks: int) -> Ragged:
    """Buffers for `size` single rows of sequences up to `longest` tokens: kernels see these on the host, and make room."""
    starts = np.arange(size + 1, dtype=np.int32)
    first = Ragged(
        positions=ragged.positions.new_zeros(size),
        slots=ragged.slots.new_zeros(size),
        starts=torch.from_numpy(starts).to(ragged.starts.device),
        lengths=ragged.lengths.new_ones(size),
        table=ragged.table.new_zeros(size, blocks),
        host_starts=starts,
        host_lengths=np.full(size, longest, np.int32),
    )
    others = tuple(
        replace(first, slots=torch.zeros_like(first.slots), table=torch.zeros_like(first.table), plans={})
        for _ in ragged.others
    )
    return replace(first, others=others, plans={})
