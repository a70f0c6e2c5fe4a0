"""Write a checkpoint of random weights in the shape of a real model, with skald's tokenizer: for timing, not for talking.

python benchmarks/checkpoint.py 125M /tmp/llama-125m
kvasir serve /tmp/llama-125m
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvasir.engine.hub import locate

SHAPES = {
    "10M": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2},
    "125M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "mixture": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 1024,
                "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
                "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "norm_topk_prob": True},
}  # fmt: skip
COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 64, "vocab_size": 32000,
          "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
          "tie_word_embeddings": True, "dtype": "bfloat16"}  # fmt: skip


def write(shape: str, folder: Path) -> None:
    """A Llama of that shape, or a Qwen 3 mixture, bfloat16, tied embeddings."""
    config = COMMON | SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate("skald") / name, folder / name)
    save_file(tensors(config), folder / "model.safetensors")


def tensors(config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Checkpoint name -> random tensor."""
    hidden, ffn, layers, heads, kv = (
        int(str(config[name]))
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    )
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * 0.02).bfloat16()

    found = {"model.embed_tokens.weight": matrix(32000, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    for i in range(layers):
        sizes = {"self_attn.q_proj": (heads * 64, hidden), "self_attn.k_proj": (kv * 64, hidden),
                 "self_attn.v_proj": (kv * 64, hidden), "self_attn.o_proj": (hidden, heads * 64)}  # fmt: skip
        mlps, width = ["mlp"], ffn
        if "num_experts" in config:
            count, width = (int(str(config[name])) for name in ("num_experts", "moe_intermediate_size"))
            mlps, sizes["mlp.gate"] = [f"mlp.experts.{e}" for e in range(count)], (count, hidden)
            found |= {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.ones(64).bfloat16() for n in "qk"}
        for mlp in mlps:
            parts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
            sizes |= {f"{mlp}.{part}": size for part, size in parts.items()}
        found |= {f"model.layers.{i}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden).bfloat16()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, help="size of the model")
    parser.add_argument("folder", type=Path, help="where to write it")
    args = parser.parse_args()
    write(args.shape, args.folder)
    print(f"{args.folder}: {sum(f.stat().st_size for f in args.folder.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
