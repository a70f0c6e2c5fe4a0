"""From logits to tokens by compiled code (sample_cpu.cpp): each row by one thread, in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels import sample as plain
from kvasir.kernels import sample_cpu
from kvasir.kernels.native import library

NEAR = 1e-5
"""A draw this close to the border between two tokens may choose the other one: exponentials differ in their last bits."""
TOLERANCE = 1e-5
"""Of log probabilities."""
ALONE = 1 << 15
"""Numbers that one thread penalises sooner than two would have met."""


def penalise(
    logits: Tensor,
    outputs: Tensor,
    prompts: Tensor | None,
    *,
    repetition: Tensor | None,
    presence: Tensor,
    frequency: Tensor,
    seats: Tensor | None = None,
) -> Tensor:
    """As the definition says; float32 and counts as int32 alone are compiled."""
    compiled = library()
    if compiled is None or not _suits(logits) or outputs.dtype != torch.int32 or logits.shape[1] != outputs.shape[1]:
        return plain.penalise.reference(
            logits, outputs, prompts, repetition=repetition, presence=presence, frequency=frequency, seats=seats
        )
    rows, vocab = logits.shape
    _match(rows, repetition, presence, frequency, seats)
    out = torch.empty(rows, vocab)
    numbers = [_as(part, torch.float32) for part in (repetition, presence, frequency)]
    kept = [_as(outputs, torch.int32), _as(prompts, torch.bool), _as(seats, torch.int64)]
    compiled.penalise(
        logits.data_ptr(),
        logits.stride(0),
        *map(_address, kept),
        *map(_address, numbers),
        out.data_ptr(),
        rows,
        vocab,
        torch.get_num_threads() if logits.numel() > ALONE else 1,
    )
    return out


def draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    most: int = 0,
) -> Tensor:
    """As the definition says; of several that are equally likely, the first are kept. float32 alone is compiled. Of a row
    without a likeliest token (NaN, all barred) it is token 0."""
    compiled = library()
    if compiled is None or not _suits(logits):
        return sample_cpu.draw(logits, uniforms, temperature, min_p=min_p, top_k=top_k, top_p=top_p, most=most)
    rows, vocab = logits.shape
    _match(rows, uniforms, temperature, min_p, top_k, top_p)
    out = torch.empty(rows, dtype=torch.int64)
    numbers = [_as(part, torch.float32) for part in (temperature, min_p)]
    filters = [_as(top_k, torch.int64), _as(top_p, torch.float32)]
    chances = _as(uniforms, torch.float64)
    compiled.draw(
        logits.data_ptr(),
        logits.stride(0),
        *map(_address, (chances, *numbers, *filters)),
        out.data_ptr(),
        rows,
        vocab,
        torch.get_num_threads(),
    )
    return out


def score(logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the definition says; float32 alone is compiled."""
    compiled = library()
    if compiled is None or not _suits(logits) or best > logits.shape[1]:
        return plain.score.reference(logits, tokens, best)
    rows, vocab = logits.shape
    _match(rows, tokens)
    own, values = torch.empty(rows), torch.empty(rows, best)
    rank, ids = torch.empty(rows, dtype=torch.int64), torch.empty(rows, best, dtype=torch.int64)
    given = _as(tokens, torch.int64)
    compiled.score(
        logits.data_ptr(),
        logits.stride(0),
        _address(given),
        best,
        *map(_address, (own, rank, ids, values)),
        rows,
        vocab,
        torch.get_num_threads(),
    )
    return own, rank, ids, values


def _match(rows: int, *parts: Tensor | None) -> None:
    """Compiled code reads as far as there are rows."""
    for part in parts:
        if part is not None and part.shape != (rows,):
            raise ValueError(f"{rows} rows of logits need as many numbers each, got {tuple(part.shape)}")


def _suits(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.stride(-1) == 1


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
