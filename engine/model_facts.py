"""What there is to know about a model before its weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvasir.engine.arch import families, load_spec, module_name, supported
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.decoder import Decoder
from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import is_gguf, read_gguf
from kvasir.engine.layout import Room, layout
from kvasir.engine.memory import activation_bytes, resolve_cache_dtype, resolve_device, resolve_dtype, token_budget
from kvasir.engine.mlp import Mixture
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.pooling import pooling_of, tasks_of
from kvasir.engine.spec import Layer, Rope, Spec
from kvasir.engine.weights import weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes at a length and a batch."""

    max_model_len: int
    batch: int
    weights: int
    kv_cache_per_sequence: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class ModelFacts:
    """`kvasir show`."""

    model: str
    path: str
    family: str
    """What runs it: a line about the family, or transformers."""
    model_type: str
    architectures: tuple[str, ...]
    tasks: tuple[str, ...]
    parameters: int
    active_parameters: int
    """That one token goes through: fewer where experts are chosen."""
    layers: str
    attention: str
    hidden: int
    vocabulary: int
    context: int
    rope: str
    dtype: str
    """Of weights and activations here."""
    kv_cache_dtype: str
    tensor_types: Mapping[str, int]
    """GGUF: type -> how many tensors."""
    disk: int
    """Bytes of weight files that are here."""
    tokenizer: str
    chat_template: bool
    generation: Mapping[str, Any]
    memory: Memory
    template: str | None = field(default=None, repr=False)


def model_facts(config: EngineConfig, batch: int = 1) -> ModelFacts:
    """The facts of a folder, hub id or GGUF file. Of a repository on the hub only small files are fetched."""
    remote = config.load_format == "auto" and ":" not in config.model and not Path(config.model).expanduser().exists()
    files = ModelFiles(replace(config, load_format="dummy") if remote else config)
    ours = module_name(files.config) in supported()
    spec = load_spec(files.config) if ours else _fallback_spec(config, files)
    device = resolve_device(config)
    dtype = resolve_dtype(config, files.config, device, packs=ours)
    total, active = _parameters(spec) if ours else _fallback_parameters(config, files)
    size = weight_bytes(spec, dtype, device) if ours else total * dtype.itemsize
    name = module_name(files.config)
    tokenizer, template = _tokenizer(files)
    return ModelFacts(
        model=config.model,
        path=str(files.path),
        family=next((f.about for f in families() if f.model_type == name), "runs by transformers' own code"),
        model_type=str(files.config.get("model_type")),
        architectures=tuple(files.config.get("architectures") or ()),
        tasks=tasks_of(spec, pooling_of(files.config, spec, files.path)) if ours else ("generate",),
        parameters=total,
        active_parameters=active,
        layers=_layers(spec),
        attention=_attention(spec),
        hidden=spec.hidden,
        vocabulary=spec.vocab,
        context=spec.max_len,
        rope=_ropes(spec),
        dtype=str(dtype).removeprefix("torch."),
        kv_cache_dtype=str(resolve_cache_dtype(config, dtype)).removeprefix("torch."),
        tensor_types=_types(files.path),
        disk=_disk(files.path),
        tokenizer=tokenizer,
        chat_template=template is not None,
        generation=files.default_sampling(),
        memory=_memory(config, spec, dtype, device, size, batch),
        template=template,
    )


def _parameters(spec: Spec) -> tuple[int, int]:
    """(all, those that a token goes through)."""
    decoder = Decoder(spec, torch.bfloat16, torch.device("meta"))
    total = sum(parameter.numel() for parameter in decoder.parameters())
    idle = 0
    for module in decoder.modules():
        if isinstance(module, Mixture):
            expert = sum(parameter.numel() for parameter in module.experts["0"].parameters())
            idle += (module.facts.count - module.facts.per_token) * expert
    return total, total - idle


def _fallback_spec(config: EngineConfig, files: ModelFiles) -> Spec:
    from kvasir.engine.fallback import fallback_spec

    return fallback_spec(files.config, files.path, trust_remote_code=config.trust_remote_code)


def _fallback_parameters(config: EngineConfig, files: ModelFiles) -> tuple[int, int]:
    from kvasir.engine.fallback import fallback_bytes

    trusted = config.trust_remote_code
    total = fallback_bytes(files.config, files.path, torch.int8, trust_remote_code=trusted)
    return total, total


def _layers(spec: Spec) -> str:
    """26 (22 see 512 tokens, 4 see all)."""
    seen = Counter(_sight(layer) for layer in spec.layers)
    mixed = sum(layer.experts for layer in spec.layers)
    parts = [f"{count} {what}" for what, count in seen.items()] if len(seen) > 1 else list(seen)
    if mixed and spec.experts:
        parts.append(f"{mixed} with {spec.experts.per_token} of {spec.experts.count} experts")
    return f"{len(spec.layers)} ({', '.join(parts)})"


def _sight(layer: Layer) -> str:
    if layer.chunk:
        return f"see their chunk of {layer.chunk} tokens"
    return f"see {layer.window} tokens" if layer.window else "see all"


def _attention(spec: Spec) -> str:
    if spec.latent:
        return f"{spec.heads} heads over a latent of {spec.key_dim} numbers a token"
    shared = "" if spec.kv_heads == spec.heads else f", {spec.kv_heads} of keys and values"
    return f"{spec.heads} heads of {spec.head_dim}{shared}"


def _ropes(spec: Spec) -> str:
    if spec.positions:
        return "learned positions"
    ropes = dict.fromkeys(layer.rope for layer in spec.layers if layer.rope)
    return "; ".join(map(_rope, ropes)) or ("ALiBi" if spec.alibi else "by the model's own code")


def _rope(rope: Rope) -> str:
    scaling = f", {type(rope.scaling).__name__} scaling" if rope.scaling else ""
    return f"rope of base {rope.theta:g} over {rope.dim} dimensions{scaling}"


def _types(path: Path) -> dict[str, int]:
    if not is_gguf(path):
        return {}
    return dict(Counter(tensor.type.name for tensor in read_gguf(path).tensors.values()).most_common())


def _disk(path: Path) -> int:
    if is_gguf(path):
        return sum(tensor.nbytes for tensor in read_gguf(path).tensors.values())
    files = [file for kind in ("safetensors", "bin", "pt", "pth") for file in path.glob(f"*.{kind}")]
    return sum(file.stat().st_size for file in files)


def _tokenizer(files: ModelFiles) -> tuple[str, str | None]:
    """(what it is, its chat template)."""
    try:
        tokenizer = files.tokenizer()
    except ConfigError as error:
        return f"none ({error.message})", None
    if tokenizer is None:
        return "not looked at (--skip-tokenizer-init)", None
    return f"{tokenizer.vocab_size} tokens", tokenizer.templates.sources.get("default")


def _memory(
    config: EngineConfig, spec: Spec, dtype: torch.dtype, device: torch.device, weights: int, batch: int
) -> Memory:
    length = config.max_model_len or spec.max_len
    shape = layout(spec, length)
    room = Room(shape, config.block_size, token_budget(config, spec, device))
    block = KVCache.block_bytes(spec, config.block_size, resolve_cache_dtype(config, dtype), shape.height)
    each = room.blocks(length) * block if spec.causal else 0
    activations = activation_bytes(replace(config, max_num_seqs=batch), spec, dtype, device)
    return Memory(length, batch, weights, each, each * batch, activations)
