"""From an EngineConfig to a model that is ready to run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from kvasir.engine.arch import load_spec, module_name, supported
from kvasir.engine.attention import refusal
from kvasir.engine.cache import KVCache
from kvasir.engine.config import EngineConfig
from kvasir.engine.cores import usable_cores
from kvasir.engine.decoder import Decoder
from kvasir.engine.determinism import indeterminate, of_device
from kvasir.engine.errors import ConfigError
from kvasir.engine.exchange import Exchange
from kvasir.engine.info import ModelInfo
from kvasir.engine.memory import keep_freed_memory, plan_memory, resolve_cache_dtype, resolve_device, resolve_dtype
from kvasir.engine.mesh import Mesh, Place
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.model_version import model_version
from kvasir.engine.open_exchange import open_exchange
from kvasir.engine.open_tiers import open_tiers
from kvasir.engine.pooler import Pooler, load_pooler
from kvasir.engine.pooling import Pooling, pooling_of, tasks_of
from kvasir.engine.sentence_transformers import read_text_rules
from kvasir.engine.share import Share, share_of
from kvasir.engine.spec import Spec
from kvasir.engine.tiers import Tiers
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.weights import load_decoder, random_decoder, weight_bytes
from kvasir.kernels.attention import attention
from kvasir.kernels.native import library

if TYPE_CHECKING:  # transformers, which is slow to import and seldom needed
    from kvasir.engine.fallback import Fallback


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run."""

    decoder: Decoder | Fallback
    cache: KVCache
    info: ModelInfo
    pooler: Pooler | None = None
    """None: it can only generate."""
    tokenizer: Callable[[], Tokenizer | None] = lambda: None
    """Reads the model's tokenizer, which the engine needs for grammars alone."""
    tiers: Tiers | None = None
    """None: blocks that leave the cache are gone."""
    exchange: Callable[[], Exchange | None] = lambda: None
    """Makes this rank's part in exchanging blocks with other groups; None: it doesn't."""


def load(config: EngineConfig, mesh: Mesh | None = None) -> Loaded:
    """Find, check and load the model, or this rank's share of it; all ranks call it at once. ConfigError says what is
    wrong and which flag to change."""
    mesh = mesh or Mesh()
    mesh.invariant = config.deterministic
    files = ModelFiles(config)
    ours = module_name(files.config) in supported()
    spec = load_spec(files.config) if ours else _fallback_spec(config, files)
    if ours:
        _check_rope(config, spec)
    if config.max_model_len is None and (trained := read_text_rules(files.path).max_len):
        spec = dataclasses.replace(spec, max_len=min(spec.max_len, trained))
    device = resolve_device(config, mesh.place.device_index)
    check_attention(config, device)  # these two are said before minutes of loading
    if config.deterministic and (obstacle := of_device(device, config.attention_backend)):
        raise ConfigError(f"--deterministic: {obstacle}", param="deterministic")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = resolve_dtype(config, files.config, device, packs=ours)
    cores = max(1, usable_cores() // mesh.place.local_ranks)
    torch.set_num_threads(config.num_threads or cores)  # Ray sets OMP_NUM_THREADS, which is torch's default
    keep_freed_memory()
    if device.type == "cpu":
        library()  # compiled now if ever, so that no request waits for it
    if not ours and mesh.place.size > 1:
        _refuse_ranks(config, files)
    partition, dealt = config.pipeline_layer_partition, config.enable_expert_parallel
    share = share_of(spec, mesh, expert_parallel=dealt, partition=partition)
    size = weight_bytes(spec, dtype, device, share) if ours else _fallback_bytes(config, files, dtype)
    kept = resolve_cache_dtype(config, dtype)
    if ours:
        check_layers(config, share, dtype, device, kept)
    elif config.attention_backend == "torch" and device.type == "cuda":
        text = "--attention-backend torch lacks what a model that runs by transformers' code may need; leave it out"
        raise ConfigError(text, param="attention_backend")
    mesh.assemble()  # one may have fetched files or compiled
    _agree(mesh, dtype, kept)
    plan = plan_memory(config, share, dtype=dtype, device=device, weight_bytes=size)
    pooling = pooling_of(files.config, spec, files.path)
    decoder: Decoder | Fallback
    if ours:
        decoder, pooler = _weights(config, files, share, pooling, dtype, device)
    else:
        decoder, pooler = _fallback(config, files, spec, dtype, device), None
    decoder.attend_by(config.attention_backend)
    cache = KVCache(share.spec, plan.num_blocks, config.block_size, kept, device, plan.layout, share.layers)
    obstacle = indeterminate(decoder)
    if config.deterministic and obstacle:
        raise ConfigError(f"--deterministic: {obstacle}", param="deterministic")
    types = [str(one).removeprefix("torch.") for one in (dtype, kept)]
    info = ModelInfo(
        name=(config.served_model_name or (config.model,))[0],
        max_model_len=plan.max_model_len,
        vocab_size=spec.vocab,
        eos_token_ids=files.eos_token_ids,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        dtype=types[0],
        kv_cache_dtype=types[1],
        version=model_version(config, files, *types),
        block_bytes=KVCache.block_bytes(spec, config.block_size, kept),
        device=str(device),
        indeterminate=obstacle,
        max_num_seqs=config.max_num_seqs,
        memory_report=plan.report,
        tasks=tasks_of(spec, pooling) if ours else ("generate",),
        labels=pooling.labels.names if pooling.labels else (),
    )
    mesh.assemble()  # weights may lie farther from one than from another
    tiers = open_tiers(config, files, share, cache)
    exchange = partial(open_exchange, config, info.version, share, cache, tiers)
    return Loaded(decoder, cache, info, pooler, files.tokenizer, tiers, exchange)


def _agree(mesh: Mesh, *dtypes: torch.dtype) -> None:
    """ConfigError where ranks took different types, each as its own machine does best: their tensors wouldn't fit."""
    marks = [crc32(str(dtype).encode()) for dtype in dtypes]
    least = mesh.least(*marks, *(-mark for mark in marks))
    if any(low != -high for low, high in zip(least[: len(marks)], least[len(marks) :], strict=True)):
        raise ConfigError(
            f"the ranks' machines don't agree on a type: this one would take {str(dtypes[0]).removeprefix('torch.')};"
            " name one with --dtype",
            param="dtype",
        )


def _check_rope(config: EngineConfig, spec: Spec) -> None:
    """ConfigError when the model has nothing that --rope-theta or --rope-scaling could change."""
    turns = any(layer.rope is not None for layer in spec.layers)
    for param, given in (("rope_theta", config.rope_theta), ("rope_scaling", config.rope_scaling)):
        if given and not turns:
            flag = param.replace("_", "-")
            raise ConfigError(f"--{flag}: this model has no rotary positions; leave the flag out", param=param)


def check_attention(config: EngineConfig, device: torch.device) -> None:
    """ConfigError where the device hasn't got what --attention-backend says."""
    try:
        attention.backend(config.attention_backend, device.type)
    except ValueError as error:
        raise ConfigError(f"--attention-backend: {error}", param="attention_backend") from None


def check_layers(
    config: EngineConfig, share: Share, dtype: torch.dtype, device: torch.device, kept: torch.dtype
) -> None:
    """ConfigError where --attention-backend, which the device has, can't do what the model needs. auto always can."""
    if config.attention_backend == "auto":
        return
    cache = KVCache(share.spec, 1, config.block_size, kept, torch.device("meta"), None, share.layers)
    if obstacle := refusal(config.attention_backend, share, dtype, device, cache):
        flag = f"--attention-backend {config.attention_backend}"
        raise ConfigError(f"{flag} can't run this model: {obstacle}; leave it out", param="attention_backend")


def check_ranks(config: EngineConfig) -> None:
    """Raise ConfigError when the model can't be held by so many ranks; before they are started. Of a model on the hub this
    fetches the files, once for all."""
    files = ModelFiles(config)
    if module_name(files.config) not in supported():
        _refuse_ranks(config, files)
    expert, partition = config.enable_expert_parallel, config.pipeline_layer_partition
    place = Place(config.tensor_parallel_size, config.pipeline_parallel_size)
    share_of(load_spec(files.config), Mesh(place), expert_parallel=expert, partition=partition)


def _refuse_ranks(config: EngineConfig, files: ModelFiles) -> None:
    kind = files.config.get("model_type")
    raise ConfigError(
        f"model_type {kind!r} runs by transformers' own code, on one rank only: leave the parallel sizes at 1",
        param="tensor_parallel_size" if config.tensor_parallel_size > 1 else "pipeline_parallel_size",
    )


def _weights(
    config: EngineConfig, files: ModelFiles, share: Share, pooling: Pooling, dtype: torch.dtype, device: torch.device
) -> tuple[Decoder, Pooler | None]:
    spec = share.full
    if config.load_format == "dummy":
        decoder = random_decoder(spec, dtype, device, config.seed, share=share)
        head = {"score.weight": torch.zeros(pooling.width, spec.hidden)}
        return decoder, load_pooler(pooling, head, device, hidden=spec.hidden, token_types=spec.token_types)
    checkpoint = files.checkpoint()
    progress = sys.stderr.isatty() and share.mesh.place.rank == 0
    decoder = load_decoder(checkpoint, spec, dtype=dtype, device=device, progress=progress, share=share)
    head = checkpoint.head() if pooling.labels else {}
    return decoder, load_pooler(pooling, head, device, hidden=spec.hidden, token_types=spec.token_types)


def _fallback_spec(config: EngineConfig, files: ModelFiles) -> Spec:
    from kvasir.engine.fallback import fallback_spec

    return fallback_spec(files.config, files.path, trust_remote_code=config.trust_remote_code)


def _fallback_bytes(config: EngineConfig, files: ModelFiles, dtype: torch.dtype) -> int:
    from kvasir.engine.fallback import fallback_bytes

    return fallback_bytes(files.config, files.path, dtype, trust_remote_code=config.trust_remote_code)


def _fallback(
    config: EngineConfig, files: ModelFiles, spec: Spec, dtype: torch.dtype, device: torch.device
) -> Fallback:
    from kvasir.engine.fallback import load_fallback

    trusted = config.trust_remote_code
    return load_fallback(files.path, spec, files.config, dtype=dtype, device=device, trust_remote_code=trusted)
