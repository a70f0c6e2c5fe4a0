"""What llama.cpp calls a tensor -> our canonical name. Names that mean something else in some architecture are listed."""

from __future__ import annotations

import re
from collections.abc import Container

GLOBAL = {
    "token_embd": "embed",
    "position_embd": "positions",
    "token_types": "token_types",
    "token_embd_norm": "embed_norm",
    "output_norm": "norm",
    "output": "head",
}
BLOCK = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_qkv": "attn.qkv",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_sinks": "attn.sinks",
    "attn_q_a": "attn.q_a",
    "attn_q_a_norm": "attn.q_a_norm",
    "attn_q_b": "attn.q_b",
    "attn_kv_a_mqa": "attn.kv_a",
    "attn_kv_a_norm": "attn.kv_a_norm",
    "attn_kv_b": "attn.kv_b",
    "attn_k_b": "attn.k_b",
    "attn_v_b": "attn.v_b",
    "post_attention_norm": "post_attn_norm",
    "post_ffw_norm": "post_mlp_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "ffn_gate_inp": "mlp.router",
    "exp_probs_b": "mlp.choice_bias",
    "ffn_gate_exps": "mlp.experts.gate",
    "ffn_up_exps": "mlp.experts.up",
    "ffn_down_exps": "mlp.experts.down",
    "ffn_gate_up_exps": "mlp.experts.gate_up",
    "ffn_gate_shexp": "mlp.shared.gate",
    "ffn_up_shexp": "mlp.shared.up",
    "ffn_down_shexp": "mlp.shared.down",
    "ffn_gate_inp_shexp": "mlp.shared_gate",
    "attn_output_norm": "attn_norm",
    "layer_output_norm": "mlp_norm",
}
"""The last two are encoders', which normalise after each branch."""
SPECIAL = {
    "gpt-oss": {"post_attention_norm": "mlp_norm"},
    "dbrx": {"attn_output_norm": "mlp_norm"},
}
TWO_NORMS = {"attn_norm": "mlp_norm", "attn_norm_2": "attn_norm"}
"""Falcon 40B and 180B: the second is attention's."""
SUFFIXLESS = ("attn.sinks", "mlp.choice_bias")
PERMUTED = frozenset({"llama", "mistral3", "granite", "internlm2", "minicpm", "smollm3"})
"""The converter reorders the rows of q and k within each head, so that the halves' equals, which turn together, are
neighbours."""

IN_BLOCK = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)(?:\.(\d+))?\.(weight|bias)")
OUTSIDE = re.compile(r"([a-z0-9_]+)\.(weight|bias)")
FACTS = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Tensors that say how the rope is scaled."""


def canonical(name: str, arch: str, *, two_norms: bool = False) -> str | None:
    """Our name, fused tensors under the names `attn.qkv`, `mlp.experts.gate`...; None: llama.cpp gives no such name."""
    if outside := OUTSIDE.fullmatch(name):
        found = GLOBAL.get(outside[1])
        return found and f"{found}.{outside[2]}"
    block = IN_BLOCK.fullmatch(name)
    if not block:
        return None
    special = TWO_NORMS if two_norms else SPECIAL.get(arch, {})
    part = special.get(block[2]) or BLOCK.get(block[2])
    if part is None:
        return None
    if block[3]:  # files of 2023 have a tensor for each expert
        part = part.replace("mlp.", f"mlp.experts.{block[3]}.")
    return f"blocks.{block[1]}.{part}" + ("" if part in SUFFIXLESS else f".{block[4]}")


def classifier(name: str, names: Container[str]) -> str | None:
    """Hugging Face's name of a part of a classifier's head: RoBERTa's two layers, BERT's one, a decoder's score."""
    found = re.fullmatch(r"cls(\.output)?\.(weight|bias)", name)
    if not found:
        return None
    two = "cls.weight" in names and "cls.output.weight" in names
    stem = ("classifier.out_proj" if found[1] else "classifier.dense") if two else "score" if found[1] else "classifier"
    return f"{stem}.{found[2]}"


def block_of(name: str) -> int | None:
    """The number of the block that this tensor is in."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None
