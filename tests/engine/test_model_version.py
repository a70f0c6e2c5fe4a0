"""Which models count as the same: by weights, configuration and types, whatever their folders are called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvasir.engine.config import EngineConfig
from kvasir.engine.llm import LLM
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.model_version import model_version


def version(model: Path, *types: str, **options: Any) -> bytes:
    config = EngineConfig(model=str(model), **options)
    return model_version(config, ModelFiles(config), *types)


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkpoint("Llama")[0], tmp_path_factory.mktemp("v1") / "prod"))


@pytest.fixture
def tuned(llama: Path, tmp_path: Path) -> Path:
    """Other weights in a folder of the same name."""
    folder = Path(shutil.copytree(llama, tmp_path / "v2" / llama.name))
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-2000:-1000] = whole[-1000:]
    weights.write_bytes(whole)
    return folder


def test_names_and_times_of_files_make_no_version(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "other", copy_function=shutil.copyfile))
    assert version(copy, revision="v3", tensor_parallel_size=2, block_size=32) == version(llama)


def test_weights_overrides_types_and_seeds_do(llama: Path, tuned: Path) -> None:
    found = [version(llama), version(tuned), version(llama, "float16"), version(llama, "float16", "int8")]
    found += [version(llama, hf_overrides={"rms_norm_eps": eps}) for eps in (0.1, 0.2)]
    found += [version(llama, load_format="dummy", seed=seed) for seed in (0, 1)]
    assert len({*found}) == len(found)


def test_an_engine_tells_it_and_hashes_with_it(llama: Path, tuned: Path) -> None:
    """Without prefix caching, too: streams move all the same."""
    options = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 20, "num_threads": 1, "skip_tokenizer_init": True}
    infos = []
    for model, more in ((llama, {}), (tuned, {}), (llama, {"enable_prefix_caching": False})):
        with LLM(str(model), **options, **more) as llm:
            infos.append(llm.engine.info)
    one, other, bare = infos
    assert one.version == bare.version == version(llama, "float32", "float32")
    assert one.version != other.version
    assert (one.salt, other.salt, bare.salt) == (one.version, other.version, b"")
