"""Models are found where they are said to be; errors say what was tried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from kvasir.engine import hub
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError
from kvasir.engine.model_files import ModelFiles


def _write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder of its own, with two bundled models in the checkout's place."""
    _write(tmp_path / "deploy" / "models" / "skald", config={})
    _write(tmp_path / "deploy" / "models" / "skald-draft", config={})
    (tmp_path / "deploy" / "models" / "notes").mkdir()
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "engine" / "hub.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder(tmp_path: Path) -> None:
    assert hub.locate(str(_write(tmp_path / "m", config={}))) == tmp_path / "m"


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], r"has no config.json, so it isn't a model's folder \(it is empty\)"),
        (["tokenizer.json"], "it holds tokenizer.json"),
        (["adapter_config.json"], "is an adapter, and adapters are not supported yet"),
        (["a.gguf", "b.gguf"], r"several GGUF files; name one of them: a\.gguf, b\.gguf"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, files: list[str], match: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=match):
        hub.locate(str(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file; pass a GGUF file, or the folder"):
        hub.locate(str(tmp_path / "config.json"))


def test_bundled_models(bundled: Path) -> None:
    assert sorted(hub.bundled_models()) == ["skald", "skald-draft"]
    assert hub.locate("skald") == bundled / "deploy" / "models" / "skald"
    _write(bundled / "models" / "skald", config={})  # as in a wheel, which wins
    assert hub.locate("skald") == bundled / "models" / "skald"


@pytest.mark.parametrize("name", ["scald", "./absent", "/absent/model", "a/b/c", "~/absent", ""])
def test_what_was_tried_is_said(bundled: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hub.locate(name)
    if name:
        assert f"model {name!r} was not found" in caught.value.message
        assert "bundled: skald, skald-draft" in caught.value.message
        assert "Pass a GGUF file, or a folder" in caught.value.message


def test_the_gguf_file_of_a_folder(tmp_path: Path) -> None:
    names = [f"m-{part:05d}-of-00012.gguf" for part in range(1, 13)]
    for name in names:
        (tmp_path / name).touch()
    assert hub.locate(str(tmp_path)) == tmp_path / names[0]
    assert hub.locate(str(tmp_path / names[1])) == tmp_path / names[1]
    (tmp_path / "mmproj-F16.gguf").touch()
    assert hub.locate(str(tmp_path)) == tmp_path / names[0]
    (tmp_path / "sha256-0123").write_bytes(b"GGUF")
    assert hub.locate(str(tmp_path / "sha256-0123")) == tmp_path / "sha256-0123"


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_does_not_answer(bundled: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fake(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set" if offline else "can't be reached"):
        hub.locate("owner/name")


def test_a_hub_that_refuses(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fake(*args: object, **options: object) -> str:
        raise OSError("gated repository\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(ConfigError, match=r"doesn't give it at revision 'x' \(OSError: gated repository; .*HF_TOKEN"):
        hub.locate("owner/name", revision="x")
    with pytest.raises(ConfigError, match="was not found"):
        hub.locate("owner/..bad..")


def test_default_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert hub.default_sampling(tmp_path) == {}
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "min_p": None, "max_new_tokens": 99}
    _write(tmp_path, generation_config=given)
    assert hub.default_sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 99}
    given = {"typical_p": 0.9, "presence_penalty": 1.5}
    _write(tmp_path, generation_config=given)
    assert hub.default_sampling(tmp_path) == given
    assert not caplog.records
    _write(
        tmp_path, generation_config={"suppress_tokens": [7], "num_beams": 4, "no_repeat_ngram_size": 0, "top_h": None}
    )
    assert hub.default_sampling(tmp_path) == {}
    assert "generation_config.json: not heeded: suppress_tokens, num_beams" in caplog.text
    _write(tmp_path, generation_config={"top_p": 3})
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p must be .*--generation-config none"):
        hub.default_sampling(tmp_path)


def test_a_gguf_files_default_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_sampling_temp(0.6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = EngineConfig(model=str(tmp_path / "m.gguf"))
    assert ModelFiles(config).default_sampling() == {"temperature": 0.6}
    assert ModelFiles(replace(config, generation_config="none")).default_sampling() == {}

    given = {"temp": 0.6, "top_k": 20, "penalty_repeat": 1.05, "penalty_last_n": 64, "mirostat": 0}
    metadata = {f"general.sampling.{name}": value for name, value in given.items()} | {"general.name": "x"}
    expected = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "repeat_last_n": 64, "mirostat": 0}
    assert hub.gguf_sampling(metadata, tmp_path / "m.gguf") == expected
    assert not caplog.records
    hub.gguf_sampling({**metadata, "general.sampling.xtc_probability": 0.5}, tmp_path / "m.gguf")
    assert "m.gguf: not heeded: xtc_probability" in caplog.text
    with pytest.raises(ConfigError, match=r"m.gguf: temperature must be .*--generation-config none"):
        hub.gguf_sampling({"general.sampling.temp": -1.0}, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 7}}, (7,)),
        ({"config": {"eos_token_id": [7, 8, None]}}, (7, 8)),
        ({"config": {"text_config": {"eos_token_id": 9}}}, (9,)),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "</s>"}}, (5,)),
        (
            {
                "generation_config": {"eos_token_id": 5},
                "tokenizer_config": {
                    "eos_token": {"content": "</s>"},
                    "added_tokens_decoder": {"6": {"content": "</s>"}},
                },
            },
            (5, 6),
        ),
        ({"tokenizer_config": {"eos_token": "E"}, "tokenizer": {"added_tokens": [{"id": 3, "content": "E"}]}}, (3,)),
        ({"tokenizer_config": {"eos_token": "E"}, "tokenizer": {"model": {"vocab": {"E": 4}}}}, (4,)),
        ({"tokenizer_config": {"eos_token": "E"}, "tokenizer": {"model": {"vocab": [["E", 0.0]]}}}, ()),
        ({"tokenizer_config": {"eos_token": "E"}, "vocab": {"E": 5}}, (5,)),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 0}}, (0,)),
        ({"tokenizer_config": {"eos_token": "E"}, "vocab": {"E": 1}, "config": {"eos_token_id": [1, 106]}}, (1, 106)),
        ({"generation_config": {"temperature": 0.5}, "config": {"eos_token_id": [1, 106]}}, (1, 106)),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": [1, 106]}}}, (1, 106)),
    ],
)
def test_eos_token_ids(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert hub.eos_token_ids(_write(tmp_path, **files)) == expected


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="isn't valid JSON"):
        hub.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        hub.read_json(tmp_path / "config.json")
