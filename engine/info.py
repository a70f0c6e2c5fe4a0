"""ModelInfo: what an engine says about itself once it has loaded. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from kvasir.engine.errors import ClientError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The facts of a running engine that its clients need."""

    name: str
    """First of the served names."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    num_blocks: int = 0
    block_size: int = 16
    dtype: str = ""
    kv_cache_dtype: str = ""
    indeterminate: str = ""
    """Why the logits of a sequence may depend on what else is in the batch; empty: they don't."""
    device: str = ""
    max_num_seqs: int = 0
    tasks: tuple[str, ...] = ("generate",)
    """What requests may ask for: generate, embed, classify, score."""
    labels: tuple[str, ...] = ()
    """Names of what a classifier tells apart."""
    version: bytes = b""
    """Of weights, configuration and types (`model_version`): groups of another one say other tokens."""
    salt: bytes = b""
    """Where the content ids of its blocks start (`blocks.chain_start`); empty: it keeps no prefixes."""
    block_bytes: int = 0
    """Keys and values of `block_size` tokens in all layers and heads: what a fetch of a block moves."""
    stretch_len: int | None = None
    """Sequences longer than this have other content ids."""
    memory_report: str = ""
    """What took how much memory, for people."""

    def need(self, task: str) -> None:
        """ClientError unless the model can do `task`."""
        if task not in self.tasks:
            text = f"model {self.name!r} can't {task}; what it can do: {', '.join(self.tasks)}"
            raise ClientError(text, param="model")
