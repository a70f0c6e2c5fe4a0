"""The random Llamas of benchmarks/decoder.py on disk: safetensors for engines that read folders, GGUF for llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"1B": (2048, 8192, 16, 32, 8), "125M": (576, 1536, 30, 9, 3), "10M": (256, 512, 4, 4, 2)}
"""hidden, ffn, layers, heads, kv heads; heads of 64, a vocabulary of 32,000, tied"""


def folder_of(model: str, where: Path) -> Path:
    """A checkpoint in Hugging Face's layout, made if it isn't there."""
    folder = where / model
    if (folder / "config.json").exists():
        return folder
    hidden, ffn, layers, heads, kv_heads = SHAPES[model]
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (kv_heads * 64, hidden) for n in "kv"}
        shapes |= {
            p + "self_attn.q_proj.weight": (heads * 64, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * 64),
        }
        shapes |= {p + f"mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        shapes |= {p + "mlp.down_proj.weight": (hidden, ffn)}
    torch.manual_seed(0)
    tensors = {
        n: torch.ones(s).bfloat16() if len(s) == 1 else (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    facts = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    facts |= {"num_key_value_heads": kv_heads, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048}
    facts |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu"}
    facts |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    facts |= {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(facts, indent=1))
    return folder


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_of(model: str, where: Path, llama_cpp: Path) -> Path:
    """The same as GGUF, by llama.cpp's own writer; without a tokenizer. (Its queries turn in another order: the work is
    the same, the text isn't.)"""
    target = where / f"{model}.gguf"
    if target.exists():
        return target
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    import gguf
    from safetensors import safe_open

    hidden, ffn, layers, heads, kv_heads = SHAPES[model]
    out = gguf.GGUFWriter(str(target), "llama")
    out.add_context_length(2048)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(ffn)
    out.add_block_count(layers)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(64)
    out.add_value_length(64)
    out.add_rope_dimension_count(64)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(32000)
    out.add_tokenizer_model("none")
    out.add_file_type(32)  # bfloat16
    with safe_open(folder_of(model, where) / "model.safetensors", "pt") as tensors:
        names = tensors.keys()  # it isn't a mapping
        for name in names:
            tensor = tensors.get_tensor(name)
            raw = tensor.float().numpy() if tensor.dim() == 1 else tensor.view(torch.uint8).numpy()
            kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16
            out.add_tensor(_name(name), raw, raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    out.close()
    return target


def _name(name: str) -> str:
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in plain:
        return plain[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.weight"
