"""Attention over blocks by torch's `varlen_attn`: FlashAttention 3 where it is installed (Shah et al. 2024, arXiv:2407.08608),
else torch's own FlashAttention 2. What it can't do, other backends do."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from kvasir.kernels.attention import Sparse
from kvasir.kernels.measured import kind_of_gpu
from kvasir.kernels.quantise import Cache, Quantised
from kvasir.kernels.ragged import Ragged

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""As Triton's: weights are rounded before they meet the values."""
WIDEST = 256
"""Head dim."""
PAGE = 256
"""FlashAttention 2 reads blocks of multiples of so many tokens; 3 reads any."""
LIMITS = (
    f"float16 and bfloat16, heads of up to {WIDEST}, causal or not, windows; no caches of another type, latents, sinks, ALiBi,"
    f" soft caps, chunks or block-sparse layers; without FlashAttention 3 (flash_attn_interface) --block-size {PAGE}"
)


def absent() -> str:
    """Why it can't be had in this process; empty: it can."""
    gpu, version = kind_of_gpu(), torch.__version__
    release = tuple(map(int, version.split(".")[:2]))
    if not gpu.startswith("sm_"):
        return "FlashAttention as torch calls it here is NVIDIA's alone"
    if int(gpu.removeprefix("sm_")) < 80:
        return f"FlashAttention needs sm_80, this GPU is {gpu}"
    if release < (2, 12):
        return f"varlen_attn of torch {version} has no block tables; 2.12 has"
    if not has_flash3() and release < (2, 13):
        return (
            f"torch {version} reads blocks by FlashAttention 3 alone (flash_attn_interface, Hopper), which isn't there"
        )
    return ""


@functools.cache
def has_flash3() -> bool:
    """Whether FlashAttention 3 is installed, and made for this GPU."""
    return kind_of_gpu() == "sm_90" and importlib.util.find_spec("flash_attn_interface") is not None


@functools.cache
def _varlen_attn() -> Callable[..., Tensor]:
    """Imported on first use: it loads torch's compiler, two seconds that ranks with another backend needn't wait."""
    from torch.nn.attention.varlen import varlen_attn

    return cast(Callable[..., Tensor], varlen_attn)


@functools.cache
def _flash3() -> bool:
    """Whether torch calls it, from now on: it has to be told once in a process."""
    if has_flash3():
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    return has_flash3()


def unfit(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache | None,
    ragged: Ragged | None,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    sparse: Sparse | None = None,
    value_dim: int | None = None,
) -> str:
    """Why it can't do this call; empty: it can."""
    if q.dtype not in TOLERANCE:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if isinstance(k_cache, Quantised) or k_cache.dtype != q.dtype:
        return "it takes keys and values of the queries' type alone (--kv-cache-dtype)"
    if v_cache is None or value_dim is not None:
        return "it takes no latent in which the values are part of the keys"
    if q.shape[-1] > WIDEST or q.shape[-1] % 8:
        return f"it takes heads of multiples of 8 up to {WIDEST}, not {q.shape[-1]}"
    shaped = {
        "attention sinks": sinks, "ALiBi": slopes, "a soft cap": softcap, "chunks": chunk, "block-sparse layers": sparse
    }  # fmt: skip
    if lacking := [name for name, fact in shaped.items() if fact is not None]:
        return f"it knows no {' and no '.join(name.removeprefix('a ') for name in lacking)}"
    if k_cache.shape[1] % PAGE and not has_flash3():
        return f"without FlashAttention 3 it takes blocks of multiples of {PAGE} tokens, not {k_cache.shape[1]} (--block-size)"
    return ""


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    **_: None,
) -> Tensor:
    """As the definition says, of calls that aren't `unfit`."""
    if not len(q):
        return q.new_empty(q.shape)
    flash3 = _flash3()
    left = -1 if window is None else window - 1
    if (longest := ragged.plans.get(__name__)) is None:
        counts = ragged.host_starts[1:] - ragged.host_starts[:-1]
        longest = ragged.plans[__name__] = int(counts.max()), int(ragged.host_lengths.max())
    starts = ragged.starts.contiguous()
    return _varlen_attn()(
        q,
        k_cache,
        v_cache,
        starts,
        # where blocks are, tells the table: 3 refuses to be told twice, 2 wants a tensor that it doesn't read
        None if flash3 else starts,
        *longest,
        scale=scale,
        window_size=(left, 0 if causal else left),
        enable_gqa=True,
        seqused_k=ragged.lengths.contiguous(),
        block_table=ragged.table.contiguous(),
        # cut along their keys, 2 forgets the rows of all sequences but the first (pytorch issue 194167)
        num_splits=None if flash3 else 1,
    )
