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
}  # fmt: skip
COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 64, "vocab_size": 32000,
          "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
          "tie_word_embeddings": True, "dtype": "bfloat16"}  # fmt: skip


def write(shape: str, folder: Path) -> None:
    """A Llama of that shape, bfloat16, tied embeddings."""
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
                 "self_attn.v_proj": (kv * 64, hidden), "self_attn.o_proj": (hidden, heads * 64),
                 "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}  # fmt: skip
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
