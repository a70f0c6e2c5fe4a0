"""EngineConfig: every default of the engine. Standard library only; `resolve` lives with the code that needs torch.

Field names are vLLM's flag names. The string under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One replica's engine. `None` and "auto" are settled against model and machine before the first step."""

    model: str = "skald"
    """Folder, Hugging Face hub id, or the name of a bundled model."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    served_model_name: tuple[str, ...] = ()
    """Names under which clients ask for the model; default: MODEL as given."""
    dtype: Dtype = "auto"
    """Type of weights and activations; auto: the checkpoint's, float32 if the device has no fast bfloat16."""
    device: Device = "auto"
    """auto: cuda when there is one. cuda fails where there is none; nothing falls back silently."""
    seed: int = 0
    """Seeds requests that bring none."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; default: the model's own limit, shrunk (and said so) when memory is short."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step; default: 256 on CPU, 8192 on CUDA. Long prompts are cut into chunks of at most this."""
    block_size: int = 16
    """Tokens per KV cache block."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and KV cache may take together."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache; default: what gpu_memory_utilization leaves, on CPU 40 % of free RAM (never more than is useful)."""
    enable_prefix_caching: bool = True
    """Reuse blocks of equal prefixes."""
    max_queue: int = 1024
    """Requests waiting for a place in the batch; one more is refused with 429."""
    chat_template: str | None = None
    """Jinja chat template, or a file that holds one; default: the model's own."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out: no tokenizer is loaded."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: default sampling parameters from the model's generation_config.json; none: Kvasir's own."""
    num_threads: int | None = None
    """CPU threads for tensor work; default: the cores this process may use."""
