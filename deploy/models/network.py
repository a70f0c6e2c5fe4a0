"""A plain Qwen3 for training, its optimiser, and the Hugging Face files it is stored as.

The engine has its own Qwen3; this one is separate because training wants a differentiable model with no cache, and
because two independent readings of the architecture that agree on logits are a better check than one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """The numbers that a config.json must state about the model."""

    vocab_size: int = 3072
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, as the reference does; bfloat16 squares lose too much."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """A norm whose parameter is called `weight`, because the stored name ends so."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position; the two halves of a head turn together (neox layout)."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.arange(length, device=device).float()[:, None] / shape.rope_theta**exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + half) by its position's angle."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head, which tames high learning rates."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=length > 1)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        mixed, kept = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Body(nn.Module):
    """Everything under the `model.` prefix of the stored names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Qwen3(nn.Module):
    """The whole model; the output matrix is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self._initialise()

    def _initialise(self) -> None:
        """Small embeddings, because they are also the output matrix, and residual outputs that start near zero."""
        depth = math.sqrt(2 * self.shape.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    weight, std=0.02 if "embed" in name else weight.shape[1] ** -0.5 / (depth if out else 1)
                )

    def hidden(self, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """The last layer's normed states, and the keys and values to decode on with."""
        start = past[0][0].shape[2] if past else 0
        cos, sin = rope_tables(self.shape, start + tokens.shape[1], tokens.device)
        cos, sin = cos[start:], sin[start:]
        x: Tensor = self.model.embed_tokens(tokens)
        kept: Cache = []
        for index, layer in enumerate(self.model.layers):
            x, pair = layer(x, cos, sin, past[index] if past else None)
            kept.append(pair)
        return self.model.norm(x), kept

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for every position."""
        return F.linear(self.hidden(tokens)[0], self.model.embed_tokens.weight)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], stop: set[int], limit: int) -> list[int]:
        """Decode one prompt with a cache until a stop token (left out) or the limit."""
        tokens, past = torch.tensor([prompt]), None
        out: list[int] = []
        while len(out) < limit:
            states, past = self.hidden(tokens, past)
            token = int(F.linear(states[0, -1], self.model.embed_tokens.weight).argmax())
            if token in stop:
                break
            out.append(token)
            tokens = torch.tensor([[token]])
        return out


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz; a batch of equal shapes costs few kernel calls."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    found: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return found


class Muon:
    """Orthogonalised momentum for matrices: several times fewer steps than AdamW on models of this size."""

    def __init__(self, weights: list[nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        self.rate, self.momentum, self.decay = rate, momentum, decay
        shapes = sorted({tuple(w.shape) for w in weights})
        self.groups = [[w for w in weights if tuple(w.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros_like(torch.stack([w.data for w in group])) for group in self.groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Nesterov momentum, orthogonalised, at a size that is alike for all shapes."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([w.grad for w in group if w.grad is not None])
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonal(grads.lerp(buffer, self.momentum))
            size = self.rate * scale * max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - self.rate * scale * self.decay).add_(change, alpha=-size)


def store(tensors: dict[str, Tensor], path: Path) -> None:
    """Write beside, then rename: a reader meets the old file or the new one, never half of one."""
    halves = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in tensors.items()}
    fresh = path.with_suffix(".new")
    save_file(halves, fresh, metadata={"format": "pt"})
    fresh.chmod(0o644)
    fresh.rename(path)


def hf_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    """config.json as transformers writes it for Qwen3."""
    fields = asdict(shape)
    theta = fields["rope_theta"]
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_scaling": None,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": shape.num_hidden_layers, "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"],
        "torch_dtype": "bfloat16", "dtype": "bfloat16",
    }  # fmt: skip


def save_weights(model: Qwen3, folder: Path, ids: dict[str, int]) -> None:
    """Write config.json and model.safetensors; bfloat16 halves the size and costs no accuracy that we measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.shape, ids), indent=2) + "\n", encoding="utf-8")
    store(dict(model.named_parameters()), folder / "model.safetensors")


class Lora(nn.Module):
    """A frozen projection with a low-rank change beside it, under the names that PEFT stores."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * self.lora_B(self.lora_A(x))
        return out


def add_lora(model: Qwen3, targets: list[str], rank: int, alpha: float) -> None:
    """Freeze the model and put a trainable change beside each target projection."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    for module in list(model.modules()):
        for name in [n for n, child in module.named_children() if n in targets and isinstance(child, nn.Linear)]:
            setattr(module, name, Lora(getattr(module, name), rank, alpha))


def lora_weights(model: Qwen3) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return {f"base_model.model.{n}": p for n, p in model.named_parameters() if "lora_" in n}


def save_adapter(model: Qwen3, folder: Path, targets: list[str], rank: int, alpha: float) -> None:
    """The two files of a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "skald", "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": targets, "inference_mode": True,
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "use_rslora": False,
        "use_dora": False, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    store(lora_weights(model), folder / "adapter_model.safetensors")


def load_adapter(model: Qwen3, folder: Path) -> None:
    """Put a stored adapter on a model."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    dtype = model.model.embed_tokens.weight.dtype
    add_lora(model, config["target_modules"], config["r"], config["lora_alpha"])
    stored = load_file(folder / "adapter_model.safetensors")
    for name, weight in lora_weights(model).items():
        weight.data = stored[name].to(dtype)


def load_weights(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3:
    """The stored model, for evaluation: what is measured is what ships."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Qwen3(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(dtype).eval()
