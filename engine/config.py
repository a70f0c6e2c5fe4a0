"""EngineConfig: every default of the engine. Standard library only; `resolve` lives with the code that needs torch.

Field names are vLLM's flag names. The string under a field is its help text on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvasir.engine.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"]
Device = Literal["auto", "cpu", "cuda"]
Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One replica's engine. `None` and "auto" are settled against model and machine before the first step."""

    model: str = "skald"
    """Folder, GGUF file, Hugging Face hub id (OWNER/NAME, OWNER/NAME:FILE.gguf or OWNER/NAME:Q4_K_M), or the name of a
    bundled model."""
    tokenizer: str | None = None
    """Folder, GGUF file or hub id of the tokenizer; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of the tokenizer on the hub; default: the model's revision."""
    load_format: Literal["auto", "safetensors", "pt", "npcache", "mistral", "gguf", "dummy"] = "auto"
    """Files that weights are read from; auto: safetensors, else Mistral's consolidated files, else PyTorch's .bin, read
    without running what they hold. npcache keeps a copy that loads faster; dummy: random weights, for benchmarks."""
    config_format: Literal["auto", "hf", "mistral"] = "auto"
    """config.json (hf) or params.json (mistral); auto: config.json if it is there."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """JSON object that is merged into config.json: '{"max_position_embeddings": 65536}'."""
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    """JSON object for longer contexts: '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; default: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model when nothing else can read it. Only for models you trust."""
    download_dir: str | None = None
    """Where the hub's files are kept; default: huggingface_hub's cache (HF_HOME)."""
    hf_token: str | None = field(default=None, repr=False)
    """Token for private and gated models; default: HF_TOKEN, or the one that `hf auth login` stored."""
    tool_call_parser: str = "auto"
    """Format in which the model calls tools (hermes, llama3_json, mistral, qwen3_coder, ...); auto: what its chat template
    teaches."""
    reasoning_parser: str = "auto"
    """Format by which the model's thoughts are told from its answer (think, deepseek_r1, mistral, ...); auto: what its chat
    template teaches; none: they stay in the answer."""
    served_model_name: tuple[str, ...] = ()
    """Names under which clients ask for the model; default: MODEL as given."""
    dtype: Dtype = "auto"
    """Type of weights and activations; auto: the checkpoint's, float32 if the device has no fast bfloat16."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """Type of keys and values in the KV cache; auto: that of weights and activations. int8 and fp8 (which is fp8_e4m3) have a
    scale for each token and head, computed when it is written; they take half of what bfloat16 takes."""
    deterministic: bool = False
    """The logits of a sequence are equal bit for bit whatever else is in the batch, and however its prompt was chunked, cached
    or preempted; refused where that can't be had. On a CPU with compiled kernels most models run so anyway; on a GPU products
    are Triton's instead of cuBLAS's."""
    device: Device = "auto"
    """auto: cuda when there is one. cuda fails where there is none; nothing falls back silently."""
    seed: int = 0
    """Seeds requests that bring none."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens (16k = 16,000, 16K = 16,384); default and auto: the model's own limit, shrunk (and
    said so) when memory is short."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    attention_backend: Literal["auto", "triton", "native", "torch", "plain"] = "auto"
    """Kernels of attention: Triton's (GPUs), compiled C++ (native: CPUs), torch's operators (torch: on GPUs FlashAttention, for
    models that it can run), or the definition (plain: slow). auto: what was measured to be the fastest on such a GPU, or the
    default of the device. `kvasir doctor` shows what there is, and what was measured."""
    enforce_eager: bool = False
    """Launch every step kernel by kernel, without CUDA graphs. So do models that transformers' own code runs."""
    max_cudagraph_capture_size: int | None = None
    """Most sequences in a decoding step that is recorded as a CUDA graph; default: --max-num-seqs, up to 512."""
    max_seq_len_to_capture: int | None = None
    """Longest sequence, in tokens, whose decoding steps are replayed from CUDA graphs; default: any."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step; default: 256 on CPU (1024 for encoders), 8192 on CUDA. Long prompts are cut into chunks of
    at most this."""
    block_size: int = 16
    """Tokens per KV cache block."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and KV cache may take together."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache; default: what gpu_memory_utilization leaves, on CPU 40 % of free RAM (never more than is useful)."""
    enable_prefix_caching: bool = True
    """Reuse blocks of equal prefixes."""
    kv_offloading_size: float = 0.0
    """GiB of host memory, of all ranks of a copy together, for KV blocks that have to leave the cache."""
    kv_disk_path: str | None = None
    """Folder where KV blocks are kept: a prompt starts where an earlier one with the same beginning stopped, after a
    restart too. auto: ~/.cache/kvasir/kv ($XDG_CACHE_HOME), the default under `kvasir serve`, else none."""
    kv_disk_size: int | None = None
    """Most bytes in --kv-disk-path, of all copies of the model on a node together; default: 10 % of what is free, up to 50 GB; 0:
    nothing is kept there."""
    kv_transfer: Literal["auto", "shm", "tcp", "gloo", "nccl", "nixl", "off"] = "auto"
    """How groups of `kvasir serve` fetch KV blocks from each other instead of computing them. auto: shared memory on one node
    (shm), else tcp; gloo, nccl: torch.distributed; nixl: the library of that name; off: not at all. Both groups need the same
    way."""
    max_queue: int = 1024
    """Requests waiting for a place in the batch; one more is refused with 429."""
    chat_template: str | None = None
    """Jinja chat template, or a file that holds one; default: the model's own."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out: no tokenizer is loaded."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: default sampling parameters from the model's generation_config.json, or its GGUF file; none: Kvasir's own."""
    logits_processors: tuple[str, ...] = ()
    """Installed logits processors that requests may use: entry points of the group kvasir.logits_processors, by name."""
    num_threads: int | None = None
    """CPU threads of each rank for tensor work; default: the cores this process may use, shared by the ranks of a node."""
    tensor_parallel_size: int = 1
    """Ranks that hold a slice of every layer each, and add up their results twice per layer."""
    pipeline_parallel_size: int = 1
    """Stages of consecutive layers; ranks = tensor-parallel size x stages."""
    enable_expert_parallel: bool = False
    """Deal out experts whole over the tensor-parallel ranks of each copy, instead of a slice of each."""
    pipeline_layer_partition: tuple[int, ...] = ()
    """Layers of each stage (20,20,24); default: balanced by what a layer costs."""
    data_parallel_size: int = 1
    """Copies of the model, each with ranks of its own; requests go to the one with least to do."""
    distributed_executor_backend: Literal["auto", "uni", "mp", "ray"] = "auto"
    """Who runs the ranks: uni, this process (one rank); mp, processes on this node; ray, actors wherever the cluster has
    room; auto: uni for one rank, ray under `kvasir serve`, else mp."""
    disable_custom_all_reduce: bool = False
    """Sums over ranks go through NCCL (gloo on a CPU) alone, not through memory that GPUs share (connections of our own)."""
    collective_timeout: float = 30.0
    """Seconds after which an exchange between ranks that hangs counts as failed, at start and later."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
                raise _wrong(name, "a whole number", value)
            if value is not None and value < least:
                raise _wrong(name, f"at least {least}", value)
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise _wrong(name, f"one of {', '.join(words)}", getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise _wrong("gpu_memory_utilization", "above 0 and at most 1", self.gpu_memory_utilization)
        if not 0 <= self.kv_offloading_size < math.inf:
            raise _wrong("kv_offloading_size", "at least 0 (GiB)", self.kv_offloading_size)
        if not self.collective_timeout > 0:
            raise _wrong("collective_timeout", "above 0", self.collective_timeout)
        if self.distributed_executor_backend == "uni" and self.ranks > 1:
            raise ConfigError(
                f"--distributed-executor-backend uni runs one rank, --tensor-parallel-size {self.tensor_parallel_size} x"
                f" --pipeline-parallel-size {self.pipeline_parallel_size} are {self.ranks}; use mp or ray",
                param="distributed_executor_backend",
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise _wrong("rope_theta", "above 0", self.rope_theta)
        for name in ("hf_overrides", "rope_scaling"):
            if not isinstance(getattr(self, name), Mapping):
                raise _wrong(name, "a JSON object", getattr(self, name))

    @property
    def ranks(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


LEAST = {
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_cudagraph_capture_size": 1,
    "max_seq_len_to_capture": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
    "max_queue": 1,
    "num_threads": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "kv_cache_memory_bytes": 1,
    "kv_disk_size": 0,
}
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(EngineConfig).items() if get_origin(kind) is Literal}


def served_len(config: EngineConfig, longest: int) -> int:
    """--max-model-len, or the model's own limit of `longest` tokens; ConfigError above that."""
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        message = f"--max-model-len {config.max_model_len} is above the model's own limit of {longest} tokens"
        raise ConfigError(message, param="max_model_len")
    return config.max_model_len


def _wrong(name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} must be {expected}, got {value!r:.60}", param=name)
