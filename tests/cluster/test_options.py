"""Flags, YAML and environment, and the spellings that users bring along."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvasir.cluster.compatibility import SPELLINGS, CompatibilityWarning
from kvasir.cluster.options import BUILD, from_environment, options, parse_engine, parse_spec, read_yaml
from kvasir.engine.errors import ConfigError

FLAGS_OF_VLLM = """
model tokenizer revision tokenizer-revision dtype max-model-len trust-remote-code download-dir load-format
config-format seed host port uvicorn-log-level api-key served-model-name chat-template response-role ssl-keyfile
ssl-certfile allowed-origins middleware max-log-len disable-log-requests tensor-parallel-size pipeline-parallel-size
distributed-executor-backend ray-workers-use-nsight data-parallel-size gpu-memory-utilization max-num-seqs
max-num-batched-tokens block-size swap-space enforce-eager max-seq-len-to-capture disable-custom-all-reduce
enable-prefix-caching enable-chunked-prefill num-scheduler-steps kv-cache-dtype quantization enable-lora max-loras
max-lora-rank lora-extra-vocab-size lora-modules long-lora-scaling-factors speculative-model num-speculative-tokens
speculative-draft-tensor-parallel-size speculative-disable-by-batch-size ngram-prompt-lookup-max
ngram-prompt-lookup-min attention-backend
"""


@pytest.mark.parametrize("flag", FLAGS_OF_VLLM.split())
def test_every_flag_of_vllm_means_something(flag: str) -> None:
    name = flag.replace("-", "_")
    assert (name in options()) != (name in SPELLINGS)


def test_every_option_has_help() -> None:
    for option in options().values():
        assert len(option.help) > 10, option.name


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("max_model_len", "16k", 16000),
        ("max_model_len", "16K", 16384),
        ("max_model_len", "auto", None),
        ("kv_cache_memory_bytes", "2GiB", 2 * 2**30),
        ("dtype", "half", "float16"),
        ("served_model_name", "a,b", ("a", "b")),
        ("served_model_name", ["a", "b,c"], ("a", "b", "c")),
        ("served_model_name", '["a", "b"]', ("a", "b")),
        ("enable_prefix_caching", "off", False),
        ("enable_prefix_caching", True, True),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("seed", -1, -1),
    ],
)
def test_values(name: str, given: Any, wanted: Any) -> None:
    for key in (name, name.replace("_", "-")):
        assert getattr(parse_spec({key: given}).engines[0], name) == wanted


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"port": "many"}, "--port must be a whole number"),
        ({"port": True}, "--port"),
        ({"port": None}, "--port"),
        ({"block_size": 0}, "--block-size must be at least 1"),
        ({"max_num_seqs": 1.5}, "--max-num-seqs"),
        ({"gpu_memory_utilization": 1.5}, "at most 1"),
        ({"dtype": "int8"}, "one of auto, float32, bfloat16, float16"),
        ({"enable_prefix_caching": "maybe"}, "true or false"),
        ({"log_level": "loud"}, "one of debug, info, warning, error"),
        ({"served_model_name": {"a": 1}}, "a list of texts"),
        ({"served_model_name": "[a"}, "a list of texts"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1"),
        ({"distributed_executor_backend": "uni", "pipeline_parallel_size": 2}, "uni runs one rank"),
        ({"pipeline_layer_partition": "3,x"}, "--pipeline-layer-partition must be a whole number"),
        ({"collective_timeout": 0}, "--collective-timeout must be above 0"),
        ({"distributed_executor_backend": "external_launcher"}, "one of auto, uni, mp, ray"),
        ({"quantization": "awq"}, "--quantization: quantised weights"),
        ({"enable_lora": True}, "adapters are not supported yet"),
        ({"models": []}, "at least one model"),
        ({"models": ["skald"]}, "option: value"),
        ({"models": [{"model": "a", "port": 1}]}, "belongs beside models"),
        ({"models": [{"model": "a"}], "model": "b"}, "not both"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "served as 'a'"),
        ({"port": 70000}, "from 0 to 65535"),
        ({"grpc_port": -7}, "from -1 to 65535"),
        ({"port": 8123, "grpc_port": 8123}, "must differ"),
        ({"port": 8123, "ollama_port": 8123}, "--port and --ollama-port are both 8123"),
        ({"num_gateways": 0}, "from 1"),
        ({"allowed_origins": "chat.example"}, "--allowed-origins must be origins as browsers send them"),
        ({"allowed_origins": ["http://localhost:3000", "http://localhost:*"]}, "got 'http://localhost:"),
        ({"allowed_origins": "https://chat.example/"}, "--allowed-origins"),
        ({"drain_timeout": -1}, "from 0"),
        ({"drain_timeout": "nan"}, "from 0"),
        ({"kv_cache_memory_bytes": -5}, "at least 1"),
        ({"ssl_certfile": "x.pem"}, "go together"),
        ({"ssl_certfile": "x.pem", "ssl_keyfile": "x.pem"}, "no such file"),
        ({"uvicorn_log_level": "info", "log_level": "error"}, "both"),
    ],
)
def test_what_is_wrong_is_named(spec: dict[str, Any], says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatibilityWarning)
        with pytest.raises(ConfigError, match=says):
            parse_spec(spec)


def test_mapped_spellings_warn_once_each() -> None:
    with pytest.warns(CompatibilityWarning) as found:
        config = parse_spec({"uvicorn_log_level": "error", "enforce_eager": True, "expert_parallel": False})
    assert config.gateway.log_level == "error"
    assert config.engines[0].enforce_eager
    assert len(found) == 2


def test_experts_are_not_dealt_out_over_copies() -> None:
    spec = {"model": "m", "enable_expert_parallel": True, "tensor_parallel_size": 2}
    with pytest.warns(
        CompatibilityWarning, match=r"of each copy: not over copies, each of which .--data-parallel-size. has"
    ):
        parse_spec({**spec, "data_parallel_size": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_spec(spec)


def test_spellings_of_parallel_layouts() -> None:
    with pytest.warns(CompatibilityWarning, match="--expert-parallel is spelled --enable-expert-parallel"):
        (engine,) = parse_spec({"expert_parallel": True, "disable_custom_all_reduce": True}).engines
    assert engine.enable_expert_parallel
    assert engine.disable_custom_all_reduce


def test_sizes_of_the_tiers() -> None:
    with pytest.warns(CompatibilityWarning, match="--swap-space is spelled --kv-offloading-size"):
        (engine,) = parse_spec({"swap_space": "4", "tensor_parallel_size": 2, "pipeline_parallel_size": 3}).engines
    assert engine.kv_offloading_size == 24.0  # vLLM's is each rank's
    with pytest.raises(ConfigError, match="both given"):
        parse_spec({"swap_space": 1, "kv_offloading_size": 1})
    with pytest.raises(ConfigError, match="--swap-space must be a number"):
        parse_spec({"swap_space": "much"})
    with pytest.raises(ConfigError, match="--kv-offloading-backend lmcache: not supported yet"):
        parse_spec({"kv_offloading_backend": "lmcache"})
    (engine,) = parse_spec({"kv_disk_size": "200G", "kv_disk_path": "/kv", "kv_offloading_size": 0.5}).engines
    assert (engine.kv_disk_size, engine.kv_disk_path, engine.kv_offloading_size) == (200 * 2**30, "/kv", 0.5)


def test_options_beside_models_hold_for_all() -> None:
    config = parse_spec({"models": [{"model": "a"}, {"model": "b", "seed": 2}], "seed": 1, "port": 0})
    assert [(engine.model, engine.seed) for engine in config.engines] == [("a", 1), ("b", 2)]
    assert config.gateway.port == 0


def test_an_engine_alone_takes_no_gateway_options() -> None:
    assert parse_engine({"max-num-seqs": 3}).max_num_seqs == 3
    with pytest.raises(ConfigError, match="'port'"):
        parse_engine({"port": 1})


def test_environment() -> None:
    environ = {
        "KVASIR_MAX_MODEL_LEN": "2k",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "KVASIR_API_KEY": "secret",
        "KVASIR_PORT": "",
    }
    found = from_environment(environ)
    assert found == {"max_model_len": 2000, "kv_cache_memory_bytes": 2**30}


@pytest.mark.parametrize(
    ("variable", "value"),
    [("KVASIR_PORT", "many"), ("VLLM_CPU_KVCACHE_SPACE", "lots"), ("VLLM_TARGET_DEVICE", "neuron")],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}='{value}'"):
        from_environment({variable: value})


def test_variables_that_do_nothing_are_named() -> None:
    with pytest.warns(CompatibilityWarning, match="^VLLM_ATTENTION_BACKEND, VLLM_PORT: no meaning") as found:
        assert from_environment({"VLLM_PORT": "1", "VLLM_ATTENTION_BACKEND": "X", "VLLM_API_KEY": "k"}) == {}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a: [", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        (b"- a", "option: value"),
        (b"port: 1\nport: 2\n", "port is given twice"),
        (b"grpc-port: 1\ngrpc_port: 2\n", "grpc_port is given twice"),
        (None, "No such file"),
    ],
)
def test_yaml_files(tmp_path: Path, text: bytes | None, says: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError, match=says):
        read_yaml(path)


@pytest.mark.parametrize(
    ("more", "own", "says"),
    [
        ({"http_options": {"port": 1}}, {}, "'http_options' works with `serve deploy` alone"),
        ({}, {"deployments": []}, "'deployments' works with `serve deploy` alone"),
        ({}, {"import_path": "other:app"}, "import_path must be kvasir.cluster.app:build, got 'other:app'"),
        ({}, {"name": "other"}, "name must be kvasir, got 'other'"),
        ({}, {"route_prefix": "/"}, "route_prefix must be null, got '/'"),
        ({"proxy_location": "HeadOnly"}, {}, "proxy_location must be Disabled, got 'HeadOnly'"),
        ({"applications": []}, {}, "a list of one"),
        ({}, {"args": [1]}, "option: value"),
    ],
)
def test_files_of_serve(tmp_path: Path, more: dict[str, Any], own: dict[str, Any], says: str) -> None:
    """What only Serve can do with such a file isn't left out silently."""
    app = {"name": "kvasir", "import_path": BUILD, "route_prefix": None, "args": {"max-model-len": "1k"}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [app]}))
    assert read_yaml(tmp_path / "x.yaml") == {"max_model_len": "1k"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"applications": [app | own]} | more))
    with pytest.raises(ConfigError, match=says):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("given", ["", " , ", [""]])
def test_an_empty_key_is_not_no_key(given: Any) -> None:
    with pytest.raises(ConfigError, match="--api-key is empty"):
        parse_spec({"api_key": given})
    assert not parse_spec({"api_key": []}).gateway.api_key


def test_an_empty_yaml_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "x.yaml") == {}


def test_variables_that_mean_nothing_are_named() -> None:
    environ = {"KVASIR_MAX_MODLE_LEN": "1", "KVASIR_DATA": "/x", "KVASIR_PORT": "tcp://1:2", "KVASIR_SERVICE_HOST": "1"}
    with pytest.warns(CompatibilityWarning, match="^KVASIR_MAX_MODLE_LEN, VLLM_DP_RANK: no meaning"):
        assert from_environment(environ | {"VLLM_DP_RANK": "1"}) == {}
    assert from_environment({"VLLM_PP_LAYER_PARTITION": "1,2"}) == {"pipeline_layer_partition": (1, 2)}


@pytest.mark.parametrize(("given", "wanted"), [("q8_0", "int8"), ("f16", "float16"), ("fp8_e5m2", "fp8_e5m2")])
def test_spellings_of_kv_cache_types(given: str, wanted: str) -> None:
    assert parse_engine({"kv_cache_dtype": given}).kv_cache_dtype == wanted
    assert from_environment({"OLLAMA_KV_CACHE_TYPE": given}) == {"kv_cache_dtype": wanted}
    with pytest.raises(ConfigError, match=r"OLLAMA_KV_CACHE_TYPE='q4_0': --kv-cache-dtype must be one of"):
        from_environment({"OLLAMA_KV_CACHE_TYPE": "q4_0"})
