"""GGUF metadata -> what config.json would say (Hugging Face's names), so that `arch` makes the Spec of both.

Keys: gguf-py's constants.py.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import GGUF
from kvasir.engine.gguf_facts import Facts
from kvasir.engine.gguf_families import FAMILIES
from kvasir.engine.gguf_rope import rope_scaling

POOLING = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
RANK = 4
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16"}


def architecture(file: GGUF) -> str:
    """general.architecture; ConfigError names the supported ones."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{file.path}: general.architecture {arch!r:.40} is not supported; supported are {supported}")
    return arch


def config(file: GGUF) -> dict[str, Any]:
    """config.json's fields for the `arch` file of this model's family."""
    f = Facts(file, architecture(file))
    made = common(f) | FAMILIES[f.arch](f)
    made = {key: value for key, value in made.items() if value is not None}
    family = made.pop("class", None)
    return made if family is None else made | {"architectures": [family + _ending(f)]}


def _ending(f: Facts) -> str:
    """A decoder that says how its rows are pooled is used for that alone."""
    pooling = f.get("pooling_type", 0)
    return "ForSequenceClassification" if pooling == RANK else "Model" if pooling in POOLING else "ForCausalLM"


def common(f: Facts) -> dict[str, Any]:
    """What every family has, in the spelling that most configurations share."""
    labels = f.texts("classifier.output_labels")
    ids = {name: f.file.metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    turning = f.get("rope.dimension_count", f.head_dim)
    if not 0 < turning <= f.head_dim:
        f.fail(f"{f.arch}.rope.dimension_count is {turning}, a head has {f.head_dim}")
    return ids | {
        "hidden_size": f.hidden,
        "num_hidden_layers": f.depth,
        "num_attention_heads": f.heads,
        "num_key_value_heads": f.get("attention.head_count_kv", f.heads),
        "head_dim": f.head_dim,
        "intermediate_size": f.get("feed_forward_length"),
        "max_position_embeddings": f.count("context_length"),
        "vocab_size": f.tensor("token_embd.weight").shape[0],
        "rms_norm_eps": f.get("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": f.get("attention.layer_norm_epsilon"),
        "rope_theta": f.get("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(f),
        "partial_rotary_factor": None if turning == f.head_dim else turning / f.head_dim,
        "tie_word_embeddings": not f.has("output.weight"),
        "attention_bias": f.has("blk.0.attn_q.bias"),
        "mlp_bias": f.has("blk.0.ffn_down.bias"),
        "is_causal": False if f.get("attention.causal") is False else None,
        "id2label": {str(i): label for i, label in enumerate(labels)} if labels else None,
        "pooling_type": POOLING.get(f.get("pooling_type", 0)),
        "torch_dtype": _dtype(f.file),
    }


def _dtype(file: GGUF) -> str:
    """What most of the numbers are stored in; bfloat16 for blocks, whose few bits fit into it."""
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[DTYPES.get(tensor.type.name, "bfloat16")] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]
