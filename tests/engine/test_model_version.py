"""Which models count as the same: by weights, configuration and types, whatever their folders are called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from kvasir.engine.config import EngineConfig
from kvasir.engine.gguf import read_gguf
from kvasir.engine.llm import LLM
from kvasir.engine.model_files import ModelFiles
from kvasir.engine.model_version import _weights, model_version


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


def write(path: Path, tensors: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".gguf":
        writer = gguf.GGUFWriter(str(path), "llama")
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        path.write_bytes(b"".join(tensor.tobytes() for tensor in tensors.values()))


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "bin"])
def test_one_tensor_that_was_trained_further_is_noticed(tmp_path: Path, kind: str) -> None:
    """However small, among large ones; of a file that doesn't tell where they lie, one of some size."""
    path = tmp_path / f"model.{kind}"
    sizes = [300_000 if n % 3 else 5 for n in range(9)]
    tensors = {f"t{n}": np.full(size, n, np.float32) for n, size in enumerate(sizes)}
    write(path, tensors)
    known, trained = [weights(path)], [name for name in tensors if kind != "bin" or tensors[name].size > 5]
    for name in trained:
        write(path, tensors | {name: tensors[name] + 0.5})
        known.append(weights(path))
    write(path, tensors)
    assert weights(path) == known[0]
    assert len(set(known)) == 1 + len(trained)


def weights(path: Path) -> str:
    is_gguf = path.suffix == ".gguf"
    return repr(_weights(path if is_gguf else path.parent, read_gguf(path) if is_gguf else None))


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
