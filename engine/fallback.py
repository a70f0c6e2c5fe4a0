"""Architectures without a file in `arch`: transformers' own modelling code, with our paged attention plugged in.

All rows of a step go through it as one sequence of length T; whose row is whose is known to the attention alone, which
transformers lets one replace (AttentionInterface), and to the positions, which are handed in.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvasir.engine.arch import supported
from kvasir.engine.cache import KVCache
from kvasir.engine.errors import ConfigError
from kvasir.engine.share import share_of
from kvasir.engine.spec import Layer, Spec
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import write
from kvasir.kernels.quantise import numbers
from kvasir.kernels.ragged import Ragged

logger = logging.getLogger(__name__)
NAME = "kvasir"
"""Of our attention among transformers' own."""
_STEP: ContextVar[tuple[Fallback, Ragged, KVCache]] = ContextVar("step")
STATEFUL = ("mamba", "linear_attention", "recurrent", "conv", "hybrid")
"""Parts of layer_types that keep another state than keys and values."""


class Fallback(nn.Module):
    """transformers' model with the interface of a `Decoder` that generates."""

    def __init__(self, model: Any, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model, self.spec, self.dtype, self.device = model, spec, dtype, device
        self.share = share_of(spec)
        self.mesh = self.share.mesh
        self.attention_backend = "auto"
        self.attend: Callable[..., Tensor] = attention

    def attend_by(self, backend: str) -> None:
        """As a `Decoder`'s."""
        self.attend, self.attention_backend = attention.backend(backend, self.device.type), backend

    @torch.inference_mode()
    def forward(self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor) -> Tensor:
        """tokens[T] int64, rows[R] int64 -> float32 logits[R, V] of those rows; keys and values go into the cache."""
        token = _STEP.set((self, ragged, cache))
        try:
            out = self.model(
                input_ids=tokens[None], position_ids=ragged.positions[None], use_cache=False, logits_to_keep=rows
            )
        finally:
            _STEP.reset(token)
        logits: Tensor = out.logits[0].float()
        return logits

    def hidden(
        self, tokens: Tensor, ragged: Ragged, cache: KVCache, rows: Tensor | None, token_types: Tensor | None = None
    ) -> Tensor:
        """Vectors aren't made of transformers' models."""
        raise NotImplementedError("a model that runs by transformers' code generates, it doesn't embed")

    def logits(self, x: Tensor) -> Tensor:
        """See `hidden`."""
        raise NotImplementedError("a model that runs by transformers' code generates, it doesn't embed")


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query[1, H, T, D] over the cache, into which key and value[1, K, T, D] are written -> ([1, T, H, D], None)."""
    fallback, ragged, cache = _STEP.get()
    kind, number = type(module).__name__, getattr(module, "layer_idx", None)
    if number is None or position_bias is not None:
        raise ConfigError(f"{kind} needs more of attention than keys and values: it can't run here", param="model")
    k_cache, v_cache = cache.layer(number)
    if v_cache is None or key.shape[1::2] != numbers(k_cache).shape[2:] or value.shape != key.shape:
        shapes = f"keys {list(key.shape[1::2])}, values {list(value.shape[1::2])}"
        raise ConfigError(
            f"{kind}: {shapes} (heads, width) aren't what config.json says: it can't run here", param="model"
        )
    own = ragged.group(cache.group_of[number])
    write(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, own)
    layer = fallback.spec.layers[number]
    out = fallback.attend(
        query[0].transpose(0, 1),
        k_cache,
        v_cache,
        own,
        scale=key.shape[-1] ** -0.5 if scaling is None else scaling,
        window=layer.window or sliding_window,
        chunk=layer.chunk,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def fallback_spec(config: Mapping[str, Any], path: Path, *, trust_remote_code: bool = False) -> Spec:
    """The facts of a model that transformers knows and we don't. ConfigError says why it can't run."""
    outer = _transformers_config(config, path, trust_remote_code)
    c = outer.get_text_config()
    if quantised := config.get("quantization_config"):
        what = f"quantization_config (quant_method {quantised.get('quant_method')!r})"
        text = f"config.json: {what} is not supported for models that run by transformers' code"
        raise ConfigError(text, param="model")
    _refuse_unless_plain(outer, c, trust_remote_code)
    heads = c.num_attention_heads
    return Spec(
        vocab=c.vocab_size,
        hidden=c.hidden_size,
        heads=heads,
        kv_heads=getattr(c, "num_key_value_heads", None) or heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
        ffn=getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        eps=1e-6,
        max_len=c.max_position_embeddings,
        layers=_layers(c),
    )


def load_fallback(
    path: Path,
    spec: Spec,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> Fallback:
    """The model with its weights, read by transformers (safetensors, or .bin without running what it holds)."""
    from transformers import AutoModelForCausalLM

    _register()
    kind = config.get("model_type")
    logger.warning(
        "model_type %r has no file here: transformers' own code runs it, with our cache and attention. Expect about half"
        " the speed, no packed weights, no embeddings.",
        kind,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=_transformers_config(config, path, trust_remote_code),
        dtype=dtype,
        attn_implementation=NAME,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    ready: nn.Module = model.eval().to(device)
    return Fallback(ready, spec, dtype, device)


def fallback_bytes(config: Mapping[str, Any], path: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> int:
    """Bytes of the weights, known before anything is loaded."""
    from transformers import AutoModelForCausalLM

    _register()
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _transformers_config(config, path, trust_remote_code),
            attn_implementation=NAME,
            trust_remote_code=trust_remote_code,
        )
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def tp_plan(config: Mapping[str, Any], path: Path, *, trust_remote_code: bool = False) -> Mapping[str, str]:
    """How transformers would divide the model's matrices among ranks: name pattern -> "colwise", "rowwise"... ."""
    found = getattr(_transformers_config(config, path, trust_remote_code), "base_model_tp_plan", None)
    if not found:
        raise ConfigError(f"model_type {config.get('model_type')!r} has no plan for tensor parallelism", param="model")
    return dict(found)


def refusal(config: Mapping[str, Any]) -> ConfigError:
    """For what neither of us can run: the nearest name that one can."""
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    near = difflib.get_close_matches(kind, [*supported(), *CONFIG_MAPPING], 1)
    hint = f"; the nearest known is {near[0]!r}" if near else ""
    remote = " (it comes with code of its own: --trust-remote-code runs that)" if config.get("auto_map") else ""
    text = f"config.json: model_type {kind!r} is not supported{remote}{hint}; `kvasir models` lists what is"
    return ConfigError(text, param="model")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **options: None)


def _transformers_config(config: Mapping[str, Any], path: Path, trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING and not (trust_remote_code and config.get("auto_map")):
        raise refusal(config)
    try:
        if kind in CONFIG_MAPPING:
            return CONFIG_MAPPING[kind].from_dict(dict(config))
        return AutoConfig.from_pretrained(path, trust_remote_code=True, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        raise ConfigError(f"config.json (model_type {kind!r}): transformers says: {error}", param="model") from error


def _refuse_unless_plain(outer: Any, c: Any, trust_remote_code: bool) -> None:
    """Only causal decoders whose one state is keys and values, and whose attention can be replaced."""
    from transformers import AutoModelForCausalLM

    kind = outer.model_type
    if outer.is_encoder_decoder:
        raise ConfigError(f"model_type {kind!r} is an encoder with a decoder, which can't run here", param="model")
    cls: Any = AutoModelForCausalLM._model_mapping.get(type(outer), None)
    if cls is None and not trust_remote_code:
        raise ConfigError(f"model_type {kind!r}: transformers has no model of it that generates", param="model")
    plain = cls is None or (cls._supports_attention_backend and not getattr(cls, "_is_stateful", False))
    states = [name for name in getattr(c, "layer_types", None) or () if any(part in name for part in STATEFUL)]
    if not plain or states or getattr(c, "kv_lora_rank", None):
        why = f" ({states[0]})" if states else ""
        text = f"model_type {kind!r}{why}: its attention can't be replaced in transformers' code, so it can't run here"
        raise ConfigError(text, param="model")


def _layers(c: Any) -> tuple[Layer, ...]:
    """Windows where layer_types says so; elsewhere all is kept, and the model's own code says what is seen."""
    window, chunk = getattr(c, "sliding_window", None), getattr(c, "attention_chunk_size", None)
    kinds = {
        "full_attention": Layer(),
        "sliding_attention": Layer(window=window),
        "chunked_attention": Layer(chunk=chunk),
    }
    types = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    unknown = sorted(set(types) - set(kinds))
    if unknown:
        raise ConfigError(f"config.json: layer_types {unknown} are not supported", param="model")
    return tuple(kinds[name] for name in types)
