"""Spec: every fact that distinguishes one text architecture from another. No torch: facts only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from kvasir.engine.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped"]
"""clamped: gate * sigmoid(1.702 gate) * (up + 1), both clamped to `activation_limit` (gpt-oss, Phi-3-small)."""
Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_two", "after"]
"""Where a branch f is normalised: pre x + f(norm(x)); post x + norm(f(x)); sandwich x + norm(f(norm(x)));
parallel x + attn(norm(x)) + mlp(norm(x)), parallel_two the same with a norm for each; after norm(x + f(x))."""
QKNorm = Literal["head", "row", "each_head", "l2"]
"""head: one weight[D] for all heads; row: over all heads at once, weight[H * D]; each_head: weight[H, D];
l2: no weight, after the rotation, only in layers that rotate (Llama 4)."""


@dataclass(frozen=True)
class Linear:
    """All positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """Plain up to `original_len`; a longer sequence turns as NTK-aware theta for the longest one served says."""

    factor: float
    original_len: int
    doubling: bool = False
    """The length counts as the next power of two of `original_len`'s multiples (Qwen 1)."""


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3 Herd 2024, 3.2)."""

    factor: float
    low: float
    high: float
    original_len: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071). cos and sin are multiplied by `magnitude`."""

    factor: float
    original_len: int
    fast: float = 32.0
    slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True
    """Round the borders of the blend to whole dimensions."""


@dataclass(frozen=True)
class LongRope:
    """Each frequency is divided by its own factor: `short` up to `original_len` tokens, `long` for sequences that are
    longer (Ding et al. 2024, arXiv:2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_len: int
    short_magnitude: float = 1.0
    long_magnitude: float = 1.0


Scaling = Union[Linear, Dynamic, Llama3, Yarn, LongRope]


@dataclass(frozen=True)
class Rope:
    """Rotary positions. Equal ropes share their angles within a step."""

    theta: float
    dim: int
    """Dimensions of a head that turn, the first ones; the others stay."""
    interleaved: bool = False
    """Neighbours turn together (GPT-J) instead of the halves' equals (GPT-NeoX)."""
    scaling: Scaling | None = None

    @property
    def original_len(self) -> int | None:
        """Sequences longer than this turn by other angles from their first token on; None: all turn alike."""
        return self.scaling.original_len if isinstance(self.scaling, (Dynamic, LongRope)) else None


@dataclass(frozen=True)
class QueryScale:
    """Queries grow with their position p from 0: log: log(p + 1) / log(length), at least 1 (Qwen 1); floor:
    1 + factor * log(1 + floor((p + first) / length)) (Llama 4; Ministral 3 counts positions from 0)."""

    kind: Literal["log", "floor"]
    length: int
    factor: float = 1.0
    first: int = 1


@dataclass(frozen=True)
class BlockSparse:
    """A row in block b of `block` positions sees blocks b - local + 1 .. b, and those of its head's stride: block k
    when (k + head * max(1, stride // H) + 1) % stride == 0 (Phi-3 2024, arXiv:2404.14219)."""

    block: int
    local: int
    stride: int


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer to the next."""

    rope: Rope | None = None
    """None: no rotation in this layer."""
    window: int | None = None
    """Positions a row may attend to, its own included; None: all before it."""
    chunk: int | None = None
    """A row attends from the last multiple of this on (Llama 4)."""
    sparse: BlockSparse | None = None
    query_scale: QueryScale | None = None
    experts: bool = False
    """Its MLP is the mixture `Spec.experts`."""

    @property
    def reach(self) -> int | None:
        """Most positions behind a row that it can see, itself included; None: all."""
        return self.window or self.chunk


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: a router chooses `per_token` of `count` MLPs for each row."""

    count: int
    per_token: int
    ffn: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    renormalise: bool = True
    """The chosen scores are divided by their sum."""
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    """Only experts of the best groups are chosen (DeepSeek-V2, arXiv:2405.04434)."""
    group_score: Literal["max", "top2"] = "max"
    choice_bias: bool = False
    """A learned bias decides who is chosen, but not how much it counts (DeepSeek-V3, arXiv:2412.19437)."""
    router_bias: bool = False
    jitter: float = 0.01
    """sparsemixer's threshold (Liu et al. 2023, arXiv:2310.00811)."""
    on_input: bool = False
    """Scores multiply what goes into an expert, not what comes out (Llama 4)."""
    bias: bool = False
    shared_ffn: int = 0
    """Width of an MLP that every row goes through besides."""
    shared_gate: bool = False
    """Its output is multiplied by a learned sigmoid (Qwen 2 MoE)."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds kv_rank + rope_dim numbers a token."""

    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    """None: queries are projected directly."""


Split = Callable[[str, Any, "Spec"], Iterable["tuple[str, Any]"]]
"""(tensor name, tensor, spec) -> the tensors it stands for, in the same checkpoint's naming."""


PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


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
    causal: bool = True
    """False: a row sees its whole sequence (encoders), which is then computed in one step."""

    # attention
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm | None = None
    latent: Latent | None = None
    attn_scale: float | None = None
    """Of the scores; None: head_dim ** -0.5."""
    attn_softcap: float | None = None
    clip_qkv: float | None = None
    sinks: bool = False
    """Each head has a learned logit that takes part in the softmax and has no value (gpt-oss)."""
    alibi: float = 0.0
    """Scores fall by the distance times the head's slope (Press et al. 2021, arXiv:2108.12409) times this; 0: no."""

    # MLP
    activation: Activation = "silu"
    activation_limit: float | None = None
    gated: bool = True
    """down(activation(gate) * up); otherwise down(activation(up))."""
    mlp_bias: bool = False
    down_bias: bool | None = None
    """Of the matrix that leads out of the MLP; None: as mlp_bias."""
    experts: Experts | None = None

    # norms and residuals
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    """Added to every norm's stored weight (Gemma: 1)."""
    placement: Placement = "pre"
    final_norm: bool = True
    residual_scale: float = 1.0

    # embedding and head
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_dim: int | None = None
    """Width of the embedding and the head where it isn't the model's: projections in and out (OPT-350m)."""
    positions: int = 0
    """Rows of a learned position embedding; 0: there is none."""
    position_offset: int = 0
    """Row of position 0."""
    token_types: int = 0
    lm_head: bool = True
    """False: there are no logits, the hidden states are the result (embedders, classifiers)."""
    tied: bool = False
    """The output head is the embedding."""
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    # checkpoint
    prefixes: tuple[str, ...] = field(
        default=("model.language_model.", "language_model.model.", "language_model.", "model."), repr=False
    )
    """What may stand before a tensor's name; the first that fits is taken off."""
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Fragment of a checkpoint's tensor name -> ours."""
    split: Split | None = field(default=None, repr=False)
    """Takes fused tensors apart before they are named."""
    ignored: tuple[str, ...] = field(default=(), repr=False)
    """Regular expressions of tensors that a text model has no use for: vision towers, further prediction heads."""

    def __post_init__(self) -> None:
        counts = ("vocab", "hidden", "heads", "kv_heads", "head_dim", "ffn", "max_len")
        for name, value in [(name, getattr(self, name)) for name in counts] + [("layers", len(self.layers))]:
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"config.json: {name} must be a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"config.json: {self.heads} heads can't share {self.kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even, got {self.head_dim}")
        if any(layer.experts for layer in self.layers) and self.experts is None:
            raise ConfigError("config.json: layers have experts, but nothing says how many")

    @property
    def stretch_len(self) -> int | None:
        """Sequences longer than this turn by other angles from their first token on; None: all turn alike."""
        lengths = [layer.rope.original_len for layer in self.layers if layer.rope is not None]
        return min((length for length in lengths if length is not None and length < self.max_len), default=None)

    @property
    def cache_heads(self) -> int:
        """K of the KV cache."""
        return 1 if self.latent else self.kv_heads

    @property
    def key_dim(self) -> int:
        """D of the keys in the cache."""
        return self.latent.kv_rank + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """D of the values in the cache; 0: the first part of the keys serves as values (latent attention)."""
        return 0 if self.latent else self.head_dim
