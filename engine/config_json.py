"""What config.json's fields mean, whichever of their spellings a model uses: shared by the files in `arch`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Activation, Dynamic, Layer, Linear, Llama3, LongRope, Rope, Scaling, Yarn

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

OFF = frozenset({"sliding_window", "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping"})
"""Fields in which null says that there is no such thing, where leaving them out may mean a default."""


def activation(c: Mapping[str, Any], *keys: str, default: str = "silu") -> Activation:
    """The first of these fields (`hidden_act` by default) that is there, in our words."""
    key = next((key for key in keys or ("hidden_act",) if c.get(key)), "")
    name = c.get(key, default)
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: {key} {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def stated(c: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says: null is the same as nothing, but in the fields of OFF."""
    inner = c.get("text_config")
    found = {key: value for key, value in c.items() if value is not None or key in OFF}
    return {**found, "text_config": stated(inner)} if isinstance(inner, Mapping) else found


def only(c: Mapping[str, Any], key: str, *values: object, within: str = "") -> None:
    """ConfigError unless the field says one of these, or nothing."""
    if (given := c.get(key)) is not None and given not in values:
        listed = " or ".join(map(repr, values))
        raise ConfigError(
            f"config.json: {within and within + '.'}{key} {given!r} is not supported; it must be {listed}"
        )


def head_dim(c: Mapping[str, Any]) -> int:
    """`head_dim`, or what the heads divide the model's width into."""
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def lm_head(c: Mapping[str, Any]) -> bool:
    """The checkpoint's class ends in logits over the vocabulary (unlike `...Model`, `...ForSequenceClassification`)."""
    name = str((c.get("architectures") or [""])[0])
    return "classifier_from_token" in c or not name.endswith(("Model", "ForSequenceClassification"))


def text(c: Mapping[str, Any], *kinds: str) -> Mapping[str, Any]:
    """The text model's part of a model that also sees or hears, of one of these `kinds`, the first by default; its class and
    tying count from outside."""
    inner = c.get("text_config")
    if not inner:
        return c
    only(inner, "model_type", *kinds, within="text_config")
    outer = {key: c[key] for key in ("architectures", "tie_word_embeddings") if key in c}
    return {**inner, **outer}


def same(c: Mapping[str, Any], layer: Layer) -> tuple[Layer, ...]:
    """All layers alike."""
    return (layer,) * int(c["num_hidden_layers"])


def layer_kinds(c: Mapping[str, Any], kinds: Mapping[str, Layer], default: Sequence[str]) -> tuple[Layer, ...]:
    """The layer that each entry of `layer_types` names; `default` is what files without it mean."""
    depth = c["num_hidden_layers"]
    listed = c.get("layer_types") or list(default)
    unknown = sorted(set(listed) - set(kinds))
    if unknown:
        raise ConfigError(f"config.json: layer_types {unknown} are not supported; supported are {', '.join(kinds)}")
    if len(listed) != depth:
        raise ConfigError(f"config.json: layer_types has {len(listed)} entries for {depth} layers")
    return tuple(kinds[kind] for kind in listed)


def rope_fields(c: Mapping[str, Any], kind: str | None = None) -> Mapping[str, Any]:
    """Hub files say rope_theta and rope_scaling; transformers 5 writes both into rope_parameters, one per `kind` of layer
    where they differ."""
    found = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if kind in found:
        found = found[kind] or {}
    theta = found.get("rope_theta") or c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0
    partial = found.get("partial_rotary_factor") or c.get("partial_rotary_factor") or c.get("rotary_pct") or 1.0
    return {**found, "rope_theta": float(theta), "partial_rotary_factor": float(partial)}


def rope(c: Mapping[str, Any], *, kind: str | None = None, dim: int | None = None, interleaved: bool = False) -> Rope:
    """The rope of a layer of this kind; `dim` of a head's dimensions turn, by default as partial_rotary_factor says."""
    p = rope_fields(c, kind)
    if nested := [key for key, value in p.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"config.json: ropes that differ by kind of layer ({', '.join(nested)}) are not supported here"
        )
    turning = dim or int(head_dim(c) * p["partial_rotary_factor"])
    return Rope(p["rope_theta"], turning, interleaved, scaling(c, p))


def scaling(c: Mapping[str, Any], p: Mapping[str, Any]) -> Scaling | None:
    """How the rope with these fields is stretched."""
    name = p.get("rope_type") or p.get("type") or "default"
    try:
        match name:
            case "default" | "mrope":
                return None
            case "linear":
                return Linear(float(p["factor"]))
            case "dynamic":
                return Dynamic(float(p["factor"]), int(c["max_position_embeddings"]))
            case "llama3":
                low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
                return Llama3(float(p["factor"]), low, high, original_len(c, p))
            case "yarn":
                return _yarn(c, p)
            case "longrope" | "su":
                return _longrope(c, p)
    except KeyError as missing:
        raise ConfigError(f"config.json: rope_type {name!r} needs {missing.args[0]!r}") from None
    supported = "default, linear, dynamic, llama3, yarn, longrope"
    raise ConfigError(f"config.json: rope_type {name!r} is not supported; supported are {supported}")


def original_len(c: Mapping[str, Any], p: Mapping[str, Any]) -> int:
    """Positions that the model was trained for before its rope was stretched."""
    key = "original_max_position_embeddings"
    return int(p.get(key) or c.get(key) or c["max_position_embeddings"])


def max_len(c: Mapping[str, Any]) -> int:
    """Positions that the model can be served with: a rope that says by how much it was stretched may say more than
    max_position_embeddings does (YaRN by flag, dynamic NTK), and one that needs dual chunk attention beyond its original
    length ends there."""
    own, p = int(c["max_position_embeddings"]), rope_fields(c)
    own = min(own, int((c.get("dual_chunk_attention_config") or {}).get("original_max_position_embeddings", own)))
    kind = scaling(c, p) if not any(isinstance(value, Mapping) for value in p.values()) else None
    if isinstance(kind, (Yarn, Dynamic)):
        return max(own, int(kind.original_len * kind.factor))
    return own


def stretch(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor for longer contexts: 0.1 scale ln(factor) + 1 (arXiv:2309.00071, 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(c: Mapping[str, Any], p: Mapping[str, Any]) -> Yarn:
    original = original_len(c, p)
    factor = float(p.get("factor") or c["max_position_embeddings"] / original)
    scale, all_dim, given = p.get("mscale"), p.get("mscale_all_dim"), p.get("attention_factor")
    magnitude = stretch(factor, scale) / stretch(factor, all_dim) if scale and all_dim else stretch(factor)
    return Yarn(
        factor,
        original,
        float(p.get("beta_fast") or 32),
        float(p.get("beta_slow") or 1),
        magnitude if given is None else float(given),
        bool(p.get("truncate", True)),
    )


def _longrope(c: Mapping[str, Any], p: Mapping[str, Any]) -> LongRope:
    original = original_len(c, p)
    factor = float(p.get("factor") or c["max_position_embeddings"] / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if p.get("attention_factor") is not None:
        magnitude = float(p["attention_factor"])
    short = float(p.get("short_mscale") or magnitude)
    long = float(p.get("long_mscale") or magnitude)
    return LongRope(tuple(map(float, p["short_factor"])), tuple(map(float, p["long_factor"])), original, short, long)
