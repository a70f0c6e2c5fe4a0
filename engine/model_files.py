"""What a model's files say besides its weights: a folder of small JSON files, Mistral's params.json, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvasir.engine import hub
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.gguf import GGUF, is_gguf, read_gguf
from kvasir.engine.gguf_tokenizer import gguf_eos_token_ids
from kvasir.engine.tokenizer import Tokenizer
from kvasir.engine.tokenizer_files import own_eos_token_ids

if TYPE_CHECKING:  # torch, which a gateway does without
    from kvasir.engine.checkpoint import Checkpoint


class ModelFiles:
    """The files of the model that a config names; fetched from the hub when they aren't here. No torch until weights."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self.path = hub.locate(
            engine.model,
            engine.revision,
            load_format=engine.load_format,
            token=engine.hf_token,
            cache=engine.download_dir,
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or what it would say, with the overrides of the command line."""
        engine = self._engine
        if self.gguf is not None:
            from kvasir.engine.gguf_config import config

            found = dict(config(self.gguf))
        elif engine.config_format == "mistral" or not (self.path / "config.json").is_file():
            found = from_params(hub.read_json(self.path / "params.json"), self.path)
        else:
            found = hub.read_json(self.path / "config.json")
        overridden = _merged(found, engine.hf_overrides)
        return _with_rope(overridden, engine.rope_scaling, engine.rope_theta)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence."""
        if self.gguf is not None:
            return gguf_eos_token_ids(self.gguf.metadata)
        return hub.eos_token_ids(self.path) or own_eos_token_ids(self.path)

    def default_sampling(self) -> dict[str, Any]:
        """Sampling defaults, unless --generation-config none."""
        if self._engine.generation_config == "none":
            return {}
        if self.gguf is not None:
            return hub.gguf_sampling(self.gguf.metadata, self.path)
        return hub.default_sampling(self.path)

    def tokenizer(self) -> Tokenizer | None:
        """The model's own or the one that --tokenizer names; None with --skip-tokenizer-init."""
        engine = self._engine
        if engine.skip_tokenizer_init:
            return None
        path = self.path
        if engine.tokenizer:
            path = hub.locate(
                engine.tokenizer,
                engine.tokenizer_revision,
                load_format="tokenizer",
                token=engine.hf_token,
                cache=engine.download_dir,
            )
        elif engine.tokenizer_revision not in (None, engine.revision):
            path = hub.locate(
                engine.model,
                engine.tokenizer_revision,
                load_format="tokenizer",
                token=engine.hf_token,
                cache=engine.download_dir,
            )
        return load_tokenizer(path, engine.chat_template)

    def checkpoint(self) -> Checkpoint:
        """The weights; their headers are read."""
        from kvasir.engine.checkpoint import open_checkpoint

        return open_checkpoint(self.path, self._engine.load_format)

    @cached_property
    def gguf(self) -> GGUF | None:
        return read_gguf(self.path) if is_gguf(self.path) else None


def load_tokenizer(path: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or a GGUF file."""
    if is_gguf(path):
        return Tokenizer.from_gguf(read_gguf(path).metadata, chat_template=chat_template)
    return Tokenizer.load(path, chat_template=chat_template)


def from_params(params: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Mistral's params.json in the words of config.json."""
    try:
        heads, experts = params["n_heads"], params.get("moe")
        found: dict[str, Any] = {
            "model_type": "mixtral" if experts else "mistral",
            "architectures": ["MixtralForCausalLM" if experts else "MistralForCausalLM"],
            "vocab_size": params["vocab_size"],
            "hidden_size": params["dim"],
            "intermediate_size": params["hidden_dim"],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads", heads),
            "head_dim": params.get("head_dim") or params["dim"] // heads,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0),
            "sliding_window": params.get("sliding_window") or params.get("_sliding_window"),
            "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len") or 128000,
            "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
            "torch_dtype": "bfloat16",
        }
    except KeyError as missing:
        raise ConfigError(f"{folder / 'params.json'}: {missing.args[0]} is missing", param="model") from None
    if experts:
        found |= {"num_local_experts": experts["num_experts"], "num_experts_per_tok": experts["num_experts_per_tok"]}
    if yarn := params.get("yarn"):
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": yarn.get("beta", 32),
            "beta_slow": yarn.get("alpha", 1),
            **({} if yarn.get("apply_scale", True) else {"attention_factor": 1.0}),
        }
    if scale := params.get("llama_4_scaling"):
        key = "original_max_position_embeddings"
        rope = found.get("rope_scaling", {"rope_type": "default", key: scale[key]})
        if rope[key] != scale[key]:
            text = f"{folder / 'params.json'}: yarn and llama_4_scaling must have the same {key}"
            raise ConfigError(text, param="model")
        found["rope_scaling"] = {**rope, "llama_4_scaling_beta": scale["beta"]}
    return found


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over config.json; dictionaries are merged, anything else is replaced."""
    found = dict(config)
    for key, value in changes.items():
        old = found.get(key)
        found[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def _with_rope(config: dict[str, Any], scaling: Mapping[str, Any], theta: float | None) -> dict[str, Any]:
    """--rope-scaling and --rope-theta, in the text model's part where there are several."""
    if not scaling and theta is None:
        return config
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return {**config, "text_config": _with_rope(dict(inner), scaling, theta)}
    old = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in old.values()):
        text = "--rope-scaling and --rope-theta: this model's layers have several ropes; use --hf-overrides"
        raise ConfigError(text, param="rope_scaling")
    turns = theta or old.get("rope_theta") or config.get("rope_theta")
    new = dict(scaling) or {key: value for key, value in old.items() if key != "rope_theta"}
    if turns is not None:
        new["rope_theta"] = turns
    return {**config, "rope_parameters": None, "rope_scaling": new, "rope_theta": turns}
