"""Flags, YAML and environment -> ClusterConfig. Every option is a field of EngineConfig or GatewayConfig.

The string under a field is its help text; spellings that users know from elsewhere are in `compatibility.py`.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kvasir.cluster.compatibility import ENVIRONMENT, translate, warn_of_variables
from kvasir.cluster.config import ClusterConfig, GatewayConfig
from kvasir.cluster.origins import check_origins
from kvasir.cluster.role_options import by_role
from kvasir.cluster.sockets import check_certificate
from kvasir.engine.config import EngineConfig, Role
from kvasir.engine.errors import ConfigError

BUILD = "kvasir.cluster.app:build"
"""What a file for `serve deploy` names to have Kvasir."""
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
GROUPS = {
    "model": ("model", "tokenizer", "revision", "tokenizer_revision", "served_model_name", "chat_template",
              "tool_call_parser", "reasoning_parser", "generation_config", "skip_tokenizer_init", "dtype", "device", "seed",
              "num_threads"),
    "files": ("load_format", "config_format", "hf_overrides", "rope_scaling", "rope_theta", "download_dir", "hf_token",
              "trust_remote_code"),
    "memory and batching": ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "max_queue",
                            "attention_backend", "enforce_eager", "max_cudagraph_capture_size", "max_seq_len_to_capture",
                            "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_prefix_caching",
                            "kv_offloading_size", "kv_disk_path", "kv_disk_size", "kv_transfer"),
    "parallelism": ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "data_parallel_size",
                    "pipeline_layer_partition", "distributed_executor_backend", "disable_custom_all_reduce",
                    "collective_timeout"),
    "listening": ("host", "port", "grpc_port", "ollama_port", "num_gateways", "allowed_origins", "max_body_bytes",
                  "receive_timeout", "max_stream_buffer", "drain_timeout", "failover_timeout", "stream_ttl",
                  "stream_memory", "enable_docs"),
    "routing": ("routing_policy", "max_ttft"),
    "storage": ("state_path", "response_ttl", "max_state_bytes"),
    "security": ("api_key", "api_key_file", "insecure", "ssl_keyfile", "ssl_certfile"),
}  # fmt: skip
"""Order and headings of --help; what isn't named here comes last, under "other"."""


@dataclass(frozen=True)
class Option:
    """One field: the flag --max-model-len, the YAML key max_model_len or max-model-len, and KVASIR_MAX_MODEL_LEN."""

    name: str
    field: str
    kind: Any
    default: Any
    help: str
    of_engine: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...] | None:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else None

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    def parse(self, value: Any) -> Any:
        """`value` from YAML (typed) or from a flag or variable (text) as the field wants it. ConfigError otherwise."""
        if value is None and self.default is None:
            return None
        if self.is_list:
            found = _texts(self, value)
            return found if typing.get_args(self.kind)[0] is str else tuple(_whole(self, part) for part in found)
        if self.choices is not None:
            return _choice(self, value)
        if typing.get_origin(self.kind) is collections.abc.Mapping:
            return _object(self, value)
        return {bool: _boolean, int: _whole, float: _real, str: _text}[self.kind](self, value)

    def wrong(self, expected: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.flag} must be {expected}, got {value!r:.60}", param=self.name)


@cache
def options() -> dict[str, Option]:
    """Name -> option, of engine and gateway."""
    found = {}
    for cls in (EngineConfig, GatewayConfig):
        hints, helps = typing.get_type_hints(cls), field_help(cls)
        for field in dataclasses.fields(cls):
            name = field.name.removesuffix("_s")
            kind = _without_none(hints[field.name])
            help_ = helps.get(field.name, "")
            default = None if field.default is dataclasses.MISSING else field.default
            found[name] = Option(name, field.name, kind, default, help_, cls is EngineConfig)
    return found


def field_help(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, on one line."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found, name = {}, ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[name] = " ".join(str(node.value.value).split())
    return found


def parse_spec(spec: Mapping[str, Any]) -> ClusterConfig:
    """A deployment spec: options of one model and the gateway side by side, or `models: [...]` for several models.

    In `models`, each entry has options of its own; those beside the list hold for all. `groups` says how many groups of
    each role a model has. Raises ConfigError.
    """
    spec = {_name(key): value for key, value in spec.items()}
    models = spec.pop("models", None)
    entries = [spec] if models is None else [spec | _mapping(entry) for entry in _entries(models, spec)]
    found = [[(role, _engine(one)) for role, one in _kinds(entry)] for entry in entries]
    spec.pop("groups", None)
    if models is not None:
        spec.pop("model", None)
    _distinct(tuple(groups[0][1] for groups in found))
    engines = tuple(engine for groups in found for _, engine in groups)
    return ClusterConfig(
        engines=engines, roles=tuple(role for groups in found for role, _ in groups), gateway=_gateway(spec)
    )


def _kinds(entry: Mapping[str, Any]) -> list[tuple[Role, dict[str, Any]]]:
    """(role, options of the engine) of each kind of groups."""
    found = [(role, {_name(key): value for key, value in own.items()}) for role, own in by_role(entry)]
    for _, own in found:
        for key in own.keys() - entry.keys():
            if not _known(key).of_engine:
                raise ConfigError(f"{key!r} belongs beside groups, not into an entry of it", param=key)
    return found


def parse_engine(values: Mapping[str, Any]) -> EngineConfig:
    """Options of an engine alone, for commands without a gateway."""
    values = translate({_name(key): value for key, value in values.items()})
    for name in values:
        _known(name, of_engine=True)
    return _engine(values)


class _Loader(yaml.SafeLoader):
    """Takes no key twice: the first value would be ignored."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [_name(key.value) for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. ConfigError when it isn't one."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", param="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}", param="config") from error
    found = _mapping(found if found is not None else {}, f"--config {path}")
    return _of_serve(found, path) if "applications" in found else found


SERVE_KEYS: tuple[dict[str, Any], ...] = (
    {"proxy_location": "Disabled", "applications": ...},
    {"name": "kvasir", "import_path": BUILD, "route_prefix": None, "args": ...},
)
"""What a file of Serve's may say, and an application in it: what `kvasir serve` does anyway, and what it takes (...)."""


def _of_serve(file: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options in a file for `serve deploy`: `args` of its one application, ours. ConfigError for what only Serve can do."""
    apps = file["applications"]
    if not isinstance(apps, list) or len(apps) != 1 or not isinstance(apps[0], Mapping):
        raise ConfigError(f"--config {path}: applications must be a list of one, Kvasir's", param="config")
    for given, known in zip((file, {"import_path": None, **apps[0]}), SERVE_KEYS, strict=True):
        if unknown := sorted(map(str, given.keys() - known.keys())):
            raise ConfigError(f"--config {path}: {unknown[0]!r} works with `serve deploy` alone", param="config")
        for key, value in given.items():
            if known[key] not in (..., value):
                wanted = json.dumps(known[key]).strip('"')
                raise ConfigError(f"--config {path}: {key} must be {wanted}, got {value!r:.60}", param="config")
    return _mapping(apps[0].get("args") or {}, f"--config {path}: args")


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Options set by KVASIR_* variables and those of `compatibility.ENVIRONMENT`. Keys are the gateway's to read.

    Raises ConfigError that names the variable.
    """
    known = ENVIRONMENT | {f"KVASIR_{name.upper()}": (name, str) for name in options() if name != "api_key"}
    found: dict[str, Any] = {}
    for variable, (name, convert) in known.items():
        value = environ.get(variable)
        if value and not value.startswith("tcp://"):  # Kubernetes sets KVASIR_PORT so for a Service named kvasir
            try:
                found[name] = options()[name].parse(translate({name: convert(value)})[name])
            except (ConfigError, ValueError) as error:
                raise ConfigError(f"{variable}={value!r:.60}: {error}", param=name) from error
    warn_of_variables(environ, known)
    return found


def _engine(spec: Mapping[str, Any]) -> EngineConfig:
    spec = translate(spec)
    own = {}
    for name, value in spec.items():
        option = _known(name)
        if option.of_engine:
            own[option.field] = option.parse(value)
    return EngineConfig(**own)


def _gateway(spec: Mapping[str, Any]) -> GatewayConfig:
    spec = translate(spec, warn=False)
    known = [(_known(name), value) for name, value in spec.items()]
    own = {option.field: option.parse(value) for option, value in known if not option.of_engine}
    if own.get("api_key") == () and spec["api_key"] != []:  # as of a variable that isn't set: nobody wants no key then
        raise ConfigError("--api-key is empty; give a key, or leave it out to serve without one", param="api_key")
    return _checked_gateway(GatewayConfig(**own))


GATEWAY_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "grpc_port": (-1, 65535),
    "ollama_port": (-1, 65535),
    "num_gateways": (1, 1024),
    "max_body_bytes": (1, 2**40),
    "receive_timeout": (0.001, 86400),
    "max_stream_buffer": (1, 2**31),
    "drain_timeout": (0, 86400),
    "max_ttft": (0, 86400),
    "failover_timeout": (0, 86400),
    "stream_ttl": (0, 86400),
    "stream_memory": (0, 2**40),
    "response_ttl": (1, 10 * 366 * 86400),
    "max_state_bytes": (2**20, 2**50),
}


def _checked_gateway(gateway: GatewayConfig) -> GatewayConfig:
    """Limits that types don't say, and options that only make sense together."""
    for name, (low, high) in GATEWAY_RANGES.items():
        value = getattr(gateway, options()[name].field)
        if not low <= value <= high:
            raise options()[name].wrong(f"from {low} to {high}", value)
    ports = ("port", "grpc_port", "ollama_port")
    for one, other in itertools.combinations(ports, 2):
        if (number := getattr(gateway, one)) == getattr(gateway, other) and number > 0:
            names = " and ".join(options()[name].flag for name in (one, other))
            raise ConfigError(f"{names} are both {number}; they must differ", param=other)
    check_origins(gateway.allowed_origins)
    if bool(gateway.ssl_certfile) != bool(gateway.ssl_keyfile):
        raise ConfigError(
            "--ssl-certfile and --ssl-keyfile go together; where one file holds both, name it twice",
            param="ssl_keyfile",
        )
    for name in ("ssl_certfile", "ssl_keyfile", "api_key_file"):
        file = getattr(gateway, name)
        if file and not Path(file).expanduser().is_file():
            raise ConfigError(f"{options()[name].flag} {file}: there is no such file", param=name)
    if gateway.ssl_certfile and gateway.ssl_keyfile:
        check_certificate(*(str(Path(file).expanduser()) for file in (gateway.ssl_certfile, gateway.ssl_keyfile)))
    return gateway


def _known(name: str, of_engine: bool = False) -> Option:
    found = options().get(name)
    if found is None or (of_engine and not found.of_engine):
        raise ConfigError(f"unknown option {name!r}{nearest(name, options())}", param=name)
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing when nothing is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _name(key: Any) -> str:
    name = str(key).lstrip("-").replace("-", "_")
    return name if name in options() else name.removesuffix("_s") if name.removesuffix("_s") in options() else name


def _entries(models: Any, spec: Mapping[str, Any]) -> list[Any]:
    if not isinstance(models, list) or not models:
        raise ConfigError(f"models must be a list of at least one model, got {models!r:.60}", param="models")
    if "model" in spec:
        raise ConfigError("give either model or models, not both", param="models")
    for entry in models:
        for key in _mapping(entry):
            if key != "groups" and not _known(key).of_engine:
                raise ConfigError(f"{key!r} belongs beside models, not into an entry of it", param=key)
    return models


def _mapping(value: Any, what: str = "an entry of models") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must hold `option: value` lines, got {value!r:.60}", param="config")
    return {_name(key): entry for key, entry in value.items()}


def _distinct(engines: tuple[EngineConfig, ...]) -> None:
    names = [name for engine in engines for name in (engine.served_model_name or (engine.model,))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two models are served as {twice[0]!r}; set served_model_name", param="served_model_name")


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    return kind


def _texts(option: Option, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        value = _json(option, value)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, int, float)) for part in value):
        raise option.wrong("a list of texts", value)
    return tuple(piece for part in value for piece in _texts(option, str(part)))


def _json(option: Option, text: str) -> Any:
    """A list as vLLM's flags take it: '["*"]'."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise option.wrong("a list of texts", text) from None


def _object(option: Option, value: Any) -> dict[str, Any]:
    """A JSON object, as text or as YAML has it."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise option.wrong(f"a JSON object ({error})", value) from None
    if not isinstance(found, Mapping):
        raise option.wrong("a JSON object", value)
    return dict(found)


def _choice(option: Option, value: Any) -> str:
    if value not in (option.choices or ()):
        raise option.wrong(f"one of {', '.join(option.choices or ())}", value)
    return str(value)


def _boolean(option: Option, value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise option.wrong("true or false", value)
    return word in ("true", "1", "yes", "on")


def _whole(option: Option, value: Any) -> int:
    found = re.fullmatch(r"(-?\d+)([kmgtKMGT]?)(?:i?B)?", str(value))
    if isinstance(value, bool) or found is None:
        raise option.wrong("a whole number (16k = 16,000; 16K = 16,384)", value)
    return int(found[1]) * SUFFIXES[found[2]]


def _real(option: Option, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise option.wrong("a number", value) from None


def _text(option: Option, value: Any) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise option.wrong("text", value)
    return str(value)
