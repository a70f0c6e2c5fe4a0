"""One file per architecture, named like config.json's `model_type`: `spec(config) -> Spec`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kvasir.engine.config_json import only, stated
from kvasir.engine.errors import ConfigError
from kvasir.engine.spec import Spec

ALIASES = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "Yi": "llama",
    "yi": "llama",
    "PhiMoE": "phimoe",
    "ministral3": "mistral",
}
"""Other model_types -> the file here: those of older files, and one that differs in a fact."""


@dataclass(frozen=True)
class Family:
    """One of the files here."""

    model_type: str
    architectures: tuple[str, ...]
    about: str


def supported() -> list[str]:
    """Every model_type there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def families() -> list[Family]:
    """Every architecture there is a file for."""
    found = []
    for name in supported():
        module = importlib.import_module(f"{__name__}.{name}")
        about = " ".join((module.__doc__ or "").split()).partition(" (")[0].rstrip(".")
        found.append(Family(name, tuple(module.ARCHITECTURES), about))
    return found


def module_name(config: Mapping[str, Any]) -> str:
    """The file that a config.json asks for, whether it is there or not."""
    kind = str(config.get("model_type")).replace("-", "_")
    return ALIASES.get(kind, kind)


def load_spec(config: Mapping[str, Any]) -> Spec:
    """The facts in a parsed config.json; ConfigError names what is unknown, missing or not supported."""
    kind = module_name(config)
    if kind not in supported():
        raise ConfigError(f"config.json: model_type {kind!r} is not supported; supported are {', '.join(supported())}")
    _check_quantised(config.get("quantization_config") or {})
    architecture = importlib.import_module(f"{__name__}.{kind}")
    try:
        spec = cast("Spec", architecture.spec(stated(config)))
    except KeyError as missing:
        raise ConfigError(f"config.json: {missing.args[0]} is missing (model_type {kind!r})") from None
    if config.get("is_causal") is False and (spec.causal or spec.latent is not None):
        raise ConfigError(f"config.json: is_causal false is not supported for model_type {kind!r}")
    return spec


def _check_quantised(given: Mapping[str, Any]) -> None:
    """Whoever made it, FP8 is the same: numbers times scales. Activations, which some would round as well, aren't here."""
    method = given.get("quant_method")
    if method not in (None, "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4"):
        raise ConfigError(f"config.json: quantization_config (quant_method {method!r}) is not supported")
    if method == "compressed-tensors":
        only(given, "format", "float-quantized", within="quantization_config")
        only(given.get("transform_config") or {}, "config_groups", {}, within="quantization_config.transform_config")
    if method == "modelopt":
        only(given, "quant_algo", "FP8", within="quantization_config")
