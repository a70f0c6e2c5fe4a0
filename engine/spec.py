"""Spec: every fact that distinguishes one decoder-only architecture from another. No torch: facts only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvasir.engine.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3 Herd 2024, 3.2)."""

    factor: float
    low: float
    high: float
    original_len: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions. Equal ropes share their angles within a step."""

    theta: float
    factor: float = 1.0
    """All positions are divided by this (linear scaling)."""
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer to the next."""

    rope: Rope | None = None
    """None: no position encoding in this layer."""
    window: int | None = None
    """Positions a row may attend to, its own included; None: all before it."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Facts with neutral defaults: a decoder branches on them, never on a model's name."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    eps: float
    max_len: int
    """Positions the model was trained for."""
    layers: tuple[Layer, ...]
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Each head of q and k is RMS-normalised before it is rotated (Qwen 3)."""
    tied: bool = False
    """The output head is the embedding."""
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Fragment of a checkpoint's tensor name -> ours."""

    def __post_init__(self) -> None:
        counts = ("vocab", "hidden", "heads", "kv_heads", "head_dim", "ffn", "max_len")
        for name, value in [(name, getattr(self, name)) for name in counts] + [("layers", len(self.layers))]:
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"config.json: {name} must be a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"config.json: {self.heads} heads can't share {self.kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even, got {self.head_dim}")
